// parallel_for: by OpenMP where this file is compiled with it, by std::thread elsewhere (see CMakeLists.txt).
#include "parallel_for.h"

#ifndef _OPENMP
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>
#endif

namespace minbert {

void parallel_for(int threads, int64_t count, void (*body)(const void*, int64_t), const void* context) noexcept {
  if (count < threads) threads = static_cast<int>(count);
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) body(context, i);
    return;
  }
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t i = 0; i < count; ++i) body(context, i);
#else
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t i = next++; i < count; i = next++) body(context, i);
  };
  std::vector<std::thread> helpers;
  try {
    helpers.reserve(threads - 1);
    for (int t = 1; t < threads; ++t) helpers.emplace_back(work);
  } catch (const std::system_error&) {
    // The system starts no more threads: this thread and the ones that started do the work.
  }
  work();
  for (auto& helper : helpers) helper.join();
#endif
}

}  // namespace minbert
