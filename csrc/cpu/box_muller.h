// Standard normals from random words, by Box and Muller (1958): reference.normal, vectorised.
#pragma once

#include "cpu/philox_rows.h"

namespace minbert::MINBERT_ISA {
namespace {

using Ints = Vector<int32_t, kFloats>;

// A polynomial by Horner's rule, the highest coefficient first.
template <int count>
inline Floats polynomial(Floats x, const float (&coefficients)[count]) {
  Floats total = Floats{} + coefficients[0];
  for (int i = 1; i < count; ++i) total = total * x + coefficients[i];
  return total;
}

// The coefficients below are minimax fits of our own, in float64 and rounded once.

// log(x) for normal positive x, to 1 unit in the last place or so: x = 2^e (1 + s) with 1 + s in [sqrt(1/2), sqrt(2)).
inline Floats natural_logarithm(Floats x) {
  constexpr int32_t kSqrtHalf = 0x3F3504F3;  // the bits of sqrt(1/2)
  constexpr float kCoefficients[] = {0.08700436539f, -0.1426748653f, 0.1491476753f, -0.1657758474f,
                                     0.1996306384f,  -0.2500133704f, 0.3333391074f};
  const Ints exponent = ((Ints)x - kSqrtHalf) >> 23;
  const Floats s = (Floats)((Ints)x - (exponent << 23)) - 1.0f;
  const Floats logarithm = s + s * s * (s * polynomial(s, kCoefficients) - 0.5f);
  return __builtin_convertvector(exponent, Floats) * 0.693147181f + logarithm;
}

// Cosine and sine of `turn` / 2^24 of a full turn, turn in [0, 2^24): exact down to the eighth of a turn next to an axis.
inline void cosine_sine(Ints turn, Floats& cosine, Floats& sine) {
  constexpr float kSine[] = {-0.004601657889f, 0.07968003277f, -0.6459634602f, 1.570796322f};
  constexpr float kCosine[] = {-0.02042625128f, 0.2536063623f, -1.233697954f, 1.0f};
  const Ints quarter = (turn + (1 << 21)) >> 22;
  const Floats t = __builtin_convertvector(turn - (quarter << 22), Floats) * 0x1p-22f;  // quarters, in [-1/2, 1/2)
  const Floats along = polynomial(t * t, kCosine), across = t * polynomial(t * t, kSine);
  const Ints odd = quarter << 31;
  cosine = (Floats)((Ints)(odd < 0 ? across : along) ^ ((quarter + 1) & 2) << 30);
  sine = (Floats)((Ints)(odd < 0 ? along : across) ^ (quarter & 2) << 30);
}

// a and b lane by lane in turns, within each 128 bits of the registers.
inline void interleave(Floats a, Floats b, Floats& low, Floats& high) {
#if defined(__AVX512F__)
  low = (Floats)_mm512_unpacklo_ps((__m512)a, (__m512)b), high = (Floats)_mm512_unpackhi_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  low = (Floats)_mm256_unpacklo_ps((__m256)a, (__m256)b), high = (Floats)_mm256_unpackhi_ps((__m256)a, (__m256)b);
#else
  low = Floats{a[0], b[0], a[1], b[1]}, high = Floats{a[2], b[2], a[3], b[3]};
#endif
}

// Four normals per counter, of counters with even lanes first: words 0 and 1 give the first two, words 2 and 3 the others.
inline void normals(const Words* word, Floats& low, Floats& high) {
  using Bits = Vector<uint32_t, kFloats>;
  const auto top24 = [](Words even, Words odd) {
    return (Ints)((Bits)((even & 0xFFFFFFFFu) | odd << 32) >> 8);
  };
  const Floats uniform = __builtin_convertvector(top24(word[0], word[2]) + 1, Floats) * 0x1p-24f;  // in (0, 1]
  const Floats radius = square_root(-2.0f * natural_logarithm(uniform));
  Floats cosine, sine;
  cosine_sine(top24(word[1], word[3]), cosine, sine);
  interleave(radius * cosine, radius * sine, low, high);
}

}  // namespace
}  // namespace minbert::MINBERT_ISA
