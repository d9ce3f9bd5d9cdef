// Standard normals from random words, by Box and Muller (1958): reference.normal, vectorised.
#pragma once

#include "cpu/philox_rows.h"

namespace minbert::MINBERT_ISA {
namespace {

using Ints = Vector<int32_t, kFloats>;

// The random words behind the radii and angles of pairs of normals. Each counter gives two pairs: words 0 and 1 are the
// first one's, words 2 and 3 the second one's.
struct Polar {
  Vector<uint32_t, kFloats> radius, angle;
};
inline Polar polar(const Words* word) {
  const auto halves = [](Words even, Words odd) {
    return (Vector<uint32_t, kFloats>)((even & 0xFFFFFFFFu) | odd << 32);
  };
  return {halves(word[0], word[2]), halves(word[1], word[3])};
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

// Two registers of normals from each of `count` registers of words, step by step together: one alone would wait for the
// result before. They come in the order of the counters, of which even lanes lie first.
//
// The radius is sqrt(-2 log u) with u = 2^e (1 + s), 1 + s in [sqrt(1/2), sqrt(2)): a minimax fit of our own to
// -2 log(1 + s) / s, off by 2e-8 of it before rounding. Cosine and sine are those of the angle from the nearest half
// turn, which decides on the sign: fits again, off by 4e-8 before rounding.
template <int count>
inline void normals(const Polar (&from)[count], Floats (&low)[count], Floats (&high)[count]) {
  constexpr int32_t kSqrtHalf = 0x3F3504F3;  // the bits of sqrt(1/2)
  constexpr float kMinusTwoLog2 = -1.38629436f;
  constexpr float kLog[] = {-0.177865982f, 0.289420933f, -0.298534364f, 0.330869406f, -0.399166107f,
                            0.500061691f,  -0.66668272f, 0.999999523f,  -2.0f};
  constexpr float kSine[] = {0.0779482722f, -0.598476708f, 2.55011511f, -5.16771269f, 3.14159274f};
  constexpr float kCosine[] = {0.219535798f, -1.3317945f, 4.05839777f, -4.93479204f, 0.99999994f};
  Floats exponent[count], s[count], radius[count], y[count], square[count], sine[count], cosine[count];
  for (int i = 0; i < count; ++i) {
    const Floats u = __builtin_convertvector((Ints)(from[i].radius >> 8) + 1, Floats);  // times 2^24
    const Ints above = (Ints)u - (kSqrtHalf + (24 << 23));
    exponent[i] = __builtin_convertvector(above >> 23, Floats);
    s[i] = (Floats)((above & 0x7FFFFF) + kSqrtHalf) - 1.0f;
    radius[i] = s[i] * kLog[0] + kLog[1];
  }
  for (int step = 2; step < 9; ++step)
    for (int i = 0; i < count; ++i) radius[i] = radius[i] * s[i] + kLog[step];
  for (int i = 0; i < count; ++i) {
    radius[i] = square_root(exponent[i] * kMinusTwoLog2 + radius[i] * s[i]);
    const auto turned = from[i].angle + (1u << 30);  // by a quarter: its highest bit is that of the nearest half turn
    radius[i] = (Floats)((Vector<uint32_t, kFloats>)radius[i] | (turned & (1u << 31)));
    y[i] = (Floats)((turned >> 8 & 0x7FFFFF) | 0x3F800000) - 1.5f;  // in half turns, [-1/2, 1/2)
    square[i] = y[i] * y[i];
    sine[i] = square[i] * kSine[0] + kSine[1];
    cosine[i] = square[i] * kCosine[0] + kCosine[1];
  }
  for (int step = 2; step < 5; ++step)
    for (int i = 0; i < count; ++i) {
      sine[i] = sine[i] * square[i] + kSine[step];
      cosine[i] = cosine[i] * square[i] + kCosine[step];
    }
  for (int i = 0; i < count; ++i) interleave(radius[i] * cosine[i], radius[i] * (y[i] * sine[i]), low[i], high[i]);
}

}  // namespace
}  // namespace minbert::MINBERT_ISA
