// CUDA's words on the host, so that the tests run kernels as plain C++: blocks one after another, and the threads of a
// block in turns, each until it waits for the others.
#pragma once

#include <math.h>
#include <ucontext.h>

#include <functional>
#include <vector>

#define __global__ static
#define __device__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

namespace minbert {

struct Index {
  int x;
};
static Index threadIdx, blockIdx, blockDim;

constexpr int kMaxThreads = 256;

class HostBlock {
 public:
  HostBlock(int threads, const std::function<void()>& body) : body_(body) {
    running = this;
    blockDim.x = threads;
    static std::vector<char> stacks(kMaxThreads * kStack);
    for (int thread = 0; thread < threads; ++thread) {
      getcontext(&contexts_[thread]);
      contexts_[thread].uc_stack.ss_sp = stacks.data() + thread * kStack;
      contexts_[thread].uc_stack.ss_size = kStack;
      contexts_[thread].uc_link = &scheduler_;
      makecontext(&contexts_[thread], run_thread, 0);
    }
    for (bool any = true; any;) {
      any = false;
      for (int thread = 0; thread < threads; ++thread) {
        if (done_[thread]) continue;
        threadIdx.x = thread;
        swapcontext(&scheduler_, &contexts_[thread]);
        any = true;
      }
    }
  }

  static void wait() { swapcontext(&running->contexts_[threadIdx.x], &running->scheduler_); }

 private:
  static constexpr int kStack = 1 << 16;

  static void run_thread() {
    running->body_();
    running->done_[threadIdx.x] = true;
  }

  static inline HostBlock* running;
  const std::function<void()>& body_;
  ucontext_t scheduler_, contexts_[kMaxThreads];
  bool done_[kMaxThreads] = {};
};

inline void __syncthreads() { HostBlock::wait(); }

// Two sets of values in turns: nobody writes one before all have read it.
inline double __shfl_down_sync(unsigned, double value, int delta) {
  static double values[2][kMaxThreads];
  static bool turns[kMaxThreads];
  const int mine = threadIdx.x, other = mine % 32 + delta < 32 ? mine + delta : mine;
  const bool turn = turns[mine] = !turns[mine];
  values[turn][mine] = value;
  HostBlock::wait();
  return values[turn][other];
}

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), int64_t blocks, int threads, void*, const Arguments&... arguments) {
  for (int64_t block = 0; block < blocks; ++block) {
    blockIdx.x = static_cast<int>(block);
    HostBlock(threads, [&] { kernel(arguments...); });
  }
  return nullptr;
}

}  // namespace minbert
