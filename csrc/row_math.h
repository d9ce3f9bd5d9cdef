// The arithmetic of the row-wise kernels, for host and device: V is one number or a register of them.
#pragma once

#ifdef __CUDACC__
#define MINBERT_HOST_DEVICE __host__ __device__
#else
#define MINBERT_HOST_DEVICE
#endif

namespace minbert {

// `static`, as in philox.h: every instruction set keeps its own copies.

template <class V, class S>
static inline MINBERT_HOST_DEVICE V normalised(V value, S mean, S rstd) {
  return (value - mean) * rstd;
}

// The gradient of `value` above, where g is the gradient of its normalised form x, and the means are over the row.
template <class V, class S>
static inline MINBERT_HOST_DEVICE V normalised_backward(V g, V x, S mean_of_g, S mean_of_gx, S rstd) {
  return (g - mean_of_g - x * mean_of_gx) * rstd;
}

// GELU is z Phi(z), with the distribution function Phi and the density phi of the standard normal distribution.
template <class V>
static inline MINBERT_HOST_DEVICE V gelu_derivative(V z, V distribution, V density) {
  return distribution + z * density;
}

}  // namespace minbert
