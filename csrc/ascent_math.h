// The arithmetic of SMART's ascent (reference.smart_ascend), for host and device: V is one number or a register of
// them.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define MINBERT_HOST_DEVICE __host__ __device__
#else
#define MINBERT_HOST_DEVICE
#endif

namespace minbert {
namespace {  // every instruction set keeps its own copies

// The unit of lengths that a scalar tensor gives.
inline MINBERT_HOST_DEVICE float unit_of(const float* scale) { return scale ? *scale : 1.0f; }

// Whether vectors of this norm have a direction: it is neither 0 nor infinite nor NaN.
inline MINBERT_HOST_DEVICE bool has_direction(float norm) { return norm > 0 && norm <= 0x1.fffffep127f; }

// Multiplies vectors of one norm so that they get another, without a division: a power of two first, which is exact and
// brings the norm near 1 however large or small it is, and then the factor that is left.
struct Rescaling {
  float power = 0, factor = 0;

  Rescaling() = default;
  MINBERT_HOST_DEVICE Rescaling(float norm, float wanted) {
    int32_t bits;
    std::memcpy(&bits, &norm, sizeof(bits));
    const int32_t exponent = 254 - (bits >> 23);  // of 1 / norm, as its bits hold it
    bits = (exponent > 0 ? exponent : 1) << 23;
    std::memcpy(&power, &bits, sizeof(power));
    factor = wanted / (norm * power);
  }

  template <class V>
  MINBERT_HOST_DEVICE V operator()(V v) const {
    return v * power * factor;
  }
};

// v, or the bound that it lies beyond; NaN stays.
template <class V>
inline MINBERT_HOST_DEVICE V clamped(V v, V low, V high) {
  v = v < low ? low : v;
  return v > high ? high : v;
}

}  // namespace
}  // namespace minbert
