// Replaces csrc/cuda/launch.h in tests without a GPU: a launch runs the kernel on the host. This folder comes first on
// the include path when a .cu file is compiled as C++, with the headers of CUDA's toolkit where it is installed.
//
// Blocks run one after another. The threads of a block are fibers; each runs until it waits for others, and a warp runs
// as long as it can, so that a missing barrier leads to the same wrong reads and writes in every run. Every other block
// runs its threads from the last to the first.
#pragma once

#if __has_include(<cuda_runtime_api.h>)
#include <cuda_runtime_api.h>
#else
#define __global__
#define __device__
#endif
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#undef __shared__
#define __shared__ static  // of the one block that runs
#undef __grid_constant__
#define __grid_constant__
#define __launch_bounds__(...)

namespace minbert::on_host {

constexpr int kWarp = 32, kMaxThreads = 1024, kStackBytes = 1 << 16;

// Threads that wait for each other.
struct Barrier {
  int threads = 0, waiting = 0, opened = 0;

  void open_if_all_wait() {
    if (waiting == threads) waiting = 0, ++opened;
  }
};

struct Warp {
  Barrier barrier;
  uint64_t shared[kWarp];  // what the lanes exchange
};

struct Fiber {
  ucontext_t start;
  jmp_buf resume;  // where it waits: cheaper than a ucontext_t, which needs a system call
  const Barrier* awaited = nullptr;
  int opened_before = 0;  // the awaited barrier's `opened` when the wait began
  bool started = false, ended = false;

  bool ready() const { return !ended && (!awaited || awaited->opened != opened_before); }
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barrier;
  jmp_buf scheduler;
  Fiber* running = nullptr;
  void (*body)(const void*) = nullptr;
  const void* arguments = nullptr;
};

inline Block* block = nullptr;
struct Index {
  unsigned x = 0;
};
inline Index thread_index, block_index, block_size;
inline int last_threads = 0;  // of a block, in the last launch: identifies the kernel that a launch chose

inline Warp& warp() { return block->warps[thread_index.x / kWarp]; }

inline void wait(Barrier& barrier) {
  block->running->awaited = &barrier;
  block->running->opened_before = barrier.opened;
  ++barrier.waiting;
  barrier.open_if_all_wait();
  if (_setjmp(block->running->resume) == 0) _longjmp(block->scheduler, 1);
}

inline void run_fiber() {
  block->body(block->arguments);
  block->running->ended = true;
  for (Barrier* barrier : {&block->barrier, &warp().barrier}) {
    --barrier->threads;
    barrier->open_if_all_wait();
  }
  _longjmp(block->scheduler, 1);
}

// Runs a fiber until it waits or ends.
inline void run(Fiber& fiber) {
  block->running = &fiber;
  if (_setjmp(block->scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

inline void run_block(int threads, bool backwards, void (*body)(const void*), const void* arguments) {
  static std::vector<char> stacks(int64_t{kMaxThreads} * kStackBytes);
  Block here;
  block = &here;
  block_size.x = threads;
  here.fibers.resize(threads);
  here.warps.resize((threads + kWarp - 1) / kWarp);
  here.barrier.threads = threads;
  here.body = body;
  here.arguments = arguments;
  for (int i = 0; i < threads; ++i) {
    ++here.warps[i / kWarp].barrier.threads;
    ucontext_t& start = here.fibers[i].start;
    getcontext(&start);
    start.uc_stack.ss_sp = stacks.data() + int64_t{i} * kStackBytes;
    start.uc_stack.ss_size = kStackBytes;
    makecontext(&start, run_fiber, 0);
  }
  const auto run_where_ready = [&](int first, int end) {  // returns false where none was ready
    bool any = false;
    for (int i = first; i < end; ++i) {
      thread_index.x = backwards ? threads - 1 - i : i;
      Fiber& fiber = here.fibers[thread_index.x];
      if (!fiber.ready()) continue;
      any = true;
      run(fiber);
    }
    return any;
  };
  for (bool any = true; any;) {
    any = false;
    for (int first = 0; first < threads; first += kWarp)
      while (run_where_ready(first, std::min(first + kWarp, threads))) any = true;
  }
  for (const Fiber& fiber : here.fibers)
    if (!fiber.ended) std::abort();  // a deadlock: it waits for threads that have ended
}

// The `value`s of all lanes.
template <class T>
std::vector<T> exchange(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a lane shares one word");
  std::memcpy(&warp().shared[thread_index.x % kWarp], &value, sizeof(value));
  wait(warp().barrier);
  std::vector<T> all(kWarp);
  for (int lane = 0; lane < kWarp; ++lane) std::memcpy(&all[lane], &warp().shared[lane], sizeof(T));
  wait(warp().barrier);
  return all;
}

}  // namespace minbert::on_host

#define threadIdx minbert::on_host::thread_index
#define blockIdx minbert::on_host::block_index
#define blockDim minbert::on_host::block_size

inline void __syncthreads() { minbert::on_host::wait(minbert::on_host::block->barrier); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int lanes) {
  return minbert::on_host::exchange(value)[(threadIdx.x % minbert::on_host::kWarp) ^ lanes];
}
template <class T>
T __shfl_down_sync(unsigned, T value, int lanes) {
  const int from = static_cast<int>(threadIdx.x) % minbert::on_host::kWarp + lanes;
  return minbert::on_host::exchange(value)[from < minbert::on_host::kWarp ? from : from - lanes];
}
inline int __reduce_max_sync(unsigned, int value) {
  int largest = value;
  for (const int other : minbert::on_host::exchange(value)) largest = other > largest ? other : largest;
  return largest;
}
template <class T>
T __ldg(const T* from) {
  return *from;
}
template <class To, class From>
To same_bits(From from) {
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
inline float __int_as_float(int v) { return same_bits<float>(v); }
inline float __uint_as_float(unsigned v) { return same_bits<float>(v); }
inline int __float_as_int(float v) { return same_bits<int>(v); }

namespace minbert {
namespace {

template <class... Argument>
const char* launch(void (*kernel)(Argument...), int64_t blocks, int threads, void*, const Argument&... argument) {
  const auto call = [&] { kernel(argument...); };
  const auto body = [](const void* context) { (*static_cast<decltype(call)*>(context))(); };
  for (int64_t i = 0; i < blocks; ++i) {
    on_host::block_index.x = static_cast<unsigned>(i);
    on_host::run_block(threads, i % 2, body, &call);
  }
  on_host::last_threads = threads;
  return nullptr;
}

}  // namespace
}  // namespace minbert
