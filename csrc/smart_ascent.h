// The arithmetic of SMART's gradient ascent (reference.smart_ascend), for host and device: V is a number or a register
// of numbers.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace minbert {
namespace {

// The unit of lengths: the number that `scale` points to, or 1.
inline MINBERT_HOST_DEVICE float unit_of(const float* scale) { return scale ? *scale : 1.0f; }

// Whether a vector of this norm has a direction: the norm is not 0, infinite or NaN.
inline MINBERT_HOST_DEVICE bool has_direction(float norm) { return norm > 0 && norm <= 0x1.fffffep127f; }

// Multiplies vectors of norm `norm` so that their norm becomes `target`, without a division: first by a power of two,
// which is exact and brings any norm near 1, then by the remaining factor.
struct Rescaling {
  float power = 0, factor = 0;

  Rescaling() = default;
  MINBERT_HOST_DEVICE Rescaling(float norm, float target) {
    int32_t bits;
    std::memcpy(&bits, &norm, sizeof(bits));
    const int32_t exponent = 254 - (bits >> 23);  // the biased exponent of 1 / norm
    bits = (exponent > 0 ? exponent : 1) << 23;
    std::memcpy(&power, &bits, sizeof(power));
    factor = target / (norm * power);
  }

  template <class V>
  MINBERT_HOST_DEVICE V operator()(V v) const {
    return v * power * factor;
  }
};

// v limited to [low, high]; NaN stays NaN.
template <class V>
inline MINBERT_HOST_DEVICE V clamped(V v, V low, V high) {
  v = v < low ? low : v;
  return v > high ? high : v;
}

}  // namespace
}  // namespace minbert
