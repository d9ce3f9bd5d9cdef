// Standard normals from random words by the method of Box and Muller (1958), vectorised: reference.normal.
#pragma once

#include "box_muller.h"
#include "cpu/philox_simd.h"
#include "cpu/simd_math.h"

namespace minbert::MINBERT_ISA {
namespace {

// The random words of the radii and angles of pairs of normals. Each counter gives two pairs: the first by words 0 and
// 1, the second by words 2 and 3.
struct Polar {
  Bits radius, angle;
};
inline Polar polar(const Words* word) {
  const auto halves = [](Words even, Words odd) { return (Bits)((even & 0xFFFFFFFFu) | odd << 32); };
  return {halves(word[0], word[2]), halves(word[1], word[3])};
}

// The lanes of a and b in turns, within each 128 bits of the registers.
inline void interleave(Floats a, Floats b, Floats& low, Floats& high) {
#if defined(__AVX512F__)
  low = (Floats)_mm512_unpacklo_ps((__m512)a, (__m512)b), high = (Floats)_mm512_unpackhi_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  low = (Floats)_mm256_unpacklo_ps((__m256)a, (__m256)b), high = (Floats)_mm256_unpackhi_ps((__m256)a, (__m256)b);
#else
  low = Floats{a[0], b[0], a[1], b[1]}, high = Floats{a[2], b[2], a[3], b[3]};
#endif
}

// Two registers of normals from each of `count` registers of words, by the steps of minbert::normals: in the order of
// the counters if the words have even lanes first.
template <int count>
inline void normals(const Polar (&from)[count], Floats (&low)[count], Floats (&high)[count]) {
  Floats exponent[count], s[count], radius[count], y[count], cosine[count], sine_by_y[count];
  for (int i = 0; i < count; ++i) {
    const Floats u = __builtin_convertvector((Ints)(from[i].radius >> 8) + 1, Floats);  // times 2^24
    const Ints above = (Ints)u - (kSqrtHalf + (24 << 23));
    exponent[i] = __builtin_convertvector(above >> 23, Floats);
    s[i] = (Floats)((above & 0x7FFFFF) + kSqrtHalf) - 1.0f;
  }
  minus_two_log(exponent, s, radius);
  for (int i = 0; i < count; ++i) {
    radius[i] = square_root(radius[i]);
    const auto turned = from[i].angle + (1u << 30);  // by a quarter turn: the highest bit is the nearest half turn
    radius[i] = (Floats)((Bits)radius[i] | (turned & (1u << 31)));
    y[i] = (Floats)((turned >> 8 & 0x7FFFFF) | 0x3F800000) - 1.5f;  // in half turns, [-1/2, 1/2)
  }
  half_turns(y, cosine, sine_by_y);
  for (int i = 0; i < count; ++i) interleave(radius[i] * cosine[i], radius[i] * (y[i] * sine_by_y[i]), low[i], high[i]);
}

}  // namespace
}  // namespace minbert::MINBERT_ISA
