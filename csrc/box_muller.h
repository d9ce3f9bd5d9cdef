// Standard normals from random words by the method of Box and Muller (1958), for host and device: reference.normal.
//
// The radius is sqrt(-2 log u) with u = 2^e (1 + s), 1 + s in [sqrt(1/2), sqrt(2)), by a minimax polynomial for
// -2 log(1 + s) / s with a relative error of 2e-8 before rounding. Cosine and sine are taken of the angle from the
// nearest half turn, which determines the sign, by minimax polynomials with an error of 4e-8 before rounding.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>

#include "philox.h"

namespace minbert {

constexpr int32_t kSqrtHalf = 0x3F3504F3;  // the bits of sqrt(1/2)

// The polynomials of several numbers or registers V, evaluated together to hide the latency of each operation.

// -2 log(2^exponent (1 + s)).
template <class V, int count>
static inline MINBERT_HOST_DEVICE void minus_two_log(const V (&exponent)[count], const V (&s)[count],
                                                     V (&result)[count]) {
  constexpr float kMinusTwoLog2 = -1.38629436f;
  constexpr float kLog[] = {-0.177865982f, 0.289420933f, -0.298534364f, 0.330869406f, -0.399166107f,
                            0.500061691f,  -0.66668272f, 0.999999523f,  -2.0f};
  for (int i = 0; i < count; ++i) result[i] = s[i] * kLog[0] + kLog[1];
  for (int step = 2; step < 9; ++step)
    for (int i = 0; i < count; ++i) result[i] = result[i] * s[i] + kLog[step];
  for (int i = 0; i < count; ++i) result[i] = exponent[i] * kMinusTwoLog2 + result[i] * s[i];
}

// cos(pi y) and sin(pi y) / y for |y| <= 1/2.
template <class V, int count>
static inline MINBERT_HOST_DEVICE void half_turns(const V (&y)[count], V (&cosine)[count], V (&sine_by_y)[count]) {
  constexpr float kSine[] = {0.0779482722f, -0.598476708f, 2.55011511f, -5.16771269f, 3.14159274f};
  constexpr float kCosine[] = {0.219535798f, -1.3317945f, 4.05839777f, -4.93479204f, 0.99999994f};
  V square[count];
  for (int i = 0; i < count; ++i) {
    square[i] = y[i] * y[i];
    sine_by_y[i] = square[i] * kSine[0] + kSine[1];
    cosine[i] = square[i] * kCosine[0] + kCosine[1];
  }
  for (int step = 2; step < 5; ++step)
    for (int i = 0; i < count; ++i) {
      sine_by_y[i] = sine_by_y[i] * square[i] + kSine[step];
      cosine[i] = cosine[i] * square[i] + kCosine[step];
    }
}

// The four normals of a counter, in the order of their columns.
static inline MINBERT_HOST_DEVICE void normals(Words4 words, float* z) {
  const auto from_bits = [](uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  };
  float exponent[2], s[2], y[2], radius[2], cosine[2], sine_by_y[2];
  uint32_t sign[2];
  for (int i = 0; i < 2; ++i) {
    const float u = static_cast<float>((words.word[2 * i] >> 8) + 1);  // times 2^24
    int32_t above;
    std::memcpy(&above, &u, sizeof(above));
    above -= kSqrtHalf + (24 << 23);
    exponent[i] = static_cast<float>(above >> 23);
    s[i] = from_bits((above & 0x7FFFFF) + kSqrtHalf) - 1.0f;
    const uint32_t turned = words.word[2 * i + 1] + (1u << 30);      // by a quarter turn: the highest bit is the sign
    y[i] = from_bits((turned >> 8 & 0x7FFFFF) | 0x3F800000) - 1.5f;  // in half turns, [-1/2, 1/2)
    sign[i] = turned & (1u << 31);
  }
  minus_two_log(exponent, s, radius);
  half_turns(y, cosine, sine_by_y);
  for (int i = 0; i < 2; ++i) {
    uint32_t bits;
    radius[i] = sqrtf(radius[i]);
    std::memcpy(&bits, &radius[i], sizeof(bits));
    radius[i] = from_bits(bits | sign[i]);
    z[2 * i] = radius[i] * cosine[i];
    z[2 * i + 1] = radius[i] * (y[i] * sine_by_y[i]);
  }
}

}  // namespace minbert
