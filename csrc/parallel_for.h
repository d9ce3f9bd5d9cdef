// Starts all threads of the native kernels.
#pragma once

#include <cstdint>

namespace minbert {

// Calls body(context, i) once for each i in [0, count), on at most `threads` threads, in any order.
void parallel_for(int threads, int64_t count, void (*body)(const void* context, int64_t i),
                  const void* context) noexcept;

}  // namespace minbert
