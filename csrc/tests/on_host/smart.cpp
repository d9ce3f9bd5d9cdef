// The CUDA kernels of SMART on the host: tests/kernels/test_smart_cuda.py builds and calls this.
#include "cuda/launch.h"
//
#include "cuda/smart.cu"

extern "C" const char* smart_init(const minbert::NormalStart* start) {
  return minbert::cuda_smart_init(*start, nullptr);
}
extern "C" const char* smart_ascend(const minbert::Ascent* a) { return minbert::cuda_smart_ascend(*a, nullptr); }
extern "C" int last_threads() { return minbert::on_host::last_threads; }
