// Mathematical functions of whole registers.
#pragma once

#include "cpu/simd.h"

namespace minbert::MINBERT_ISA {
namespace {

inline Floats all_lanes(float value) { return Floats{} + value; }
inline Floats absolute(Floats v) { return (Floats)((Bits)v & 0x7FFFFFFF); }

// a where a < b, else b: NaN where b is NaN.
inline Floats smaller_or_second(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Floats)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

inline Floats square_root(Floats v) {
#if defined(__AVX512F__)
  return (Floats)_mm512_sqrt_ps((__m512)v);
#elif defined(__AVX2__)
  return (Floats)_mm256_sqrt_ps((__m256)v);
#elif defined(__SSE2__)
  return (Floats)_mm_sqrt_ps((__m128)v);
#else
  for (int lane = 0; lane < kFloats; ++lane) v[lane] = __builtin_sqrtf(v[lane]);
  return v;
#endif
}
inline Doubles square_root(Doubles v) {
#if defined(__AVX512F__)
  return (Doubles)_mm512_sqrt_pd((__m512d)v);
#elif defined(__AVX2__)
  return (Doubles)_mm256_sqrt_pd((__m256d)v);
#elif defined(__SSE2__)
  return (Doubles)_mm_sqrt_pd((__m128d)v);
#else
  for (int lane = 0; lane < kDoubles; ++lane) v[lane] = __builtin_sqrt(v[lane]);
  return v;
#endif
}

// The larger one; b where either is NaN.
inline Floats larger_or_second(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// e^x for x of at most 88 with an error below 1.2 units in the last place, 0.9 with fused products: 2^n times a
// polynomial in r = x - n ln 2, |r| <= ln 2 / 2. Subnormal results may become 0; NaN stays NaN.
inline Floats exp(Floats x) {
  constexpr float kRound = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
#if defined(__AVX512F__)
  x = larger_or_second(all_lanes(-110), x);  // where the result is 0 already
#endif
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
#if defined(__AVX512F__)
  return (Floats)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const Floats result = x < -0x1.5d589ep6f ? Floats{} : (Floats)((Bits)p + ((Bits)shifted << 23));
  return x != x ? x : result;
#endif
}

}  // namespace
}  // namespace minbert::MINBERT_ISA
