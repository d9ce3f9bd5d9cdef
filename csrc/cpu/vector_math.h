// Functions of whole registers.
#pragma once

#include "cpu/vector.h"

namespace minbert::MINBERT_ISA {
namespace {

inline Floats all_lanes(float value) { return Floats{} + value; }

// e^x with an error below 1.2 units in the last place, 0.9 with fused products: 2^n times a polynomial in r = x - n ln
// 2, |r| <= ln 2 / 2. What would be subnormal becomes 0.
inline Floats exp(Floats x) {
  using Bits = Vector<uint32_t, kFloats>;
  constexpr float kRound = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  const Floats shifted = x * 0x1.715476p0f + kRound;
  const Floats n = shifted - kRound;
  const Floats r = x - n * 0x1.62e4p-1f - n * 0x1.7f7d1cp-20f;  // ln 2 in two parts: n times the first is exact
  Floats p = all_lanes(0x1.6a1a72p-10f);
  p = p * r + 0x1.123fc6p-7f;
  p = p * r + 0x1.555916p-5f;
  p = p * r + 0x1.55548ap-3f;
  p = p * r + 0x1.fffffcp-2f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  Floats result = (Floats)((Bits)p + ((Bits)shifted << 23));
  result = x > 0x1.62e42ep6f ? all_lanes(__builtin_inff()) : result;
  result = x < -0x1.5d589ep6f ? Floats{} : result;
  return x != x ? x : result;
}

}  // namespace
}  // namespace minbert::MINBERT_ISA
