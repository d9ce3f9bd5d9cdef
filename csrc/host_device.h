// MINBERT_HOST_DEVICE marks a function that the host and CUDA devices share. Such functions have internal linkage
// (`static`, or an unnamed namespace): every instruction set keeps its own copy, and the linker merges none.
#pragma once

#ifdef __CUDACC__
#define MINBERT_HOST_DEVICE __host__ __device__
#else
#define MINBERT_HOST_DEVICE
#endif
