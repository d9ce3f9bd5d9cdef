// Launches CUDA kernels.
#pragma once

#include <cstdint>

namespace minbert {
namespace {

// Launches a kernel on a stream of the current device. Returns null, or CUDA's error message.
template <class... Argument>
const char* launch(void (*kernel)(Argument...), int64_t blocks, int threads, void* stream,
                   const Argument&... argument) {
  kernel<<<static_cast<unsigned>(blocks), threads, 0, static_cast<cudaStream_t>(stream)>>>(argument...);
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace
}  // namespace minbert
