// The standard normal distribution.
#pragma once

#include "cpu/vector.h"

namespace minbert::MINBERT_ISA {
namespace {

// phi(z) and Phi(z) of several registers, step by step together: one alone would wait for the result before.
//
// Phi(-a) = exp(-a^2 / 2) q(a) for a = |z|, where q is smooth (erfcx(a / sqrt 2) / 2) and a polynomial in a / (a + 4.5)
// gives it to 1e-8. The relative error of Phi is below 4e-7 for z > -3, and grows to 2e-6 at z = -6.
template <int count>
inline void normal(const Floats (&z)[count], Floats (&density)[count], Floats (&distribution)[count]) {
  using Bits = Vector<uint32_t, kFloats>;
  constexpr float kBeyond = 13.27f;  // where exp(-a^2 / 2) is 2^-127: below what the exponent holds, so it becomes 0
  constexpr float kRound = 0x1.8p23f + 127;  // adding it leaves n + 127, the exponent's bits, in the low bits
  constexpr float kTail[] = {-0x1.b08ee6p-4f, 0x1.8abdf8p-2f,  -0x1.586058p-2f,
                             -0x1.954618p-1f, 0x1.54ee14p+1f,  -0x1.e4d42cp+1f,
                             0x1.a2350cp+1f,  -0x1.cb94dcp+0f, 0.5f};
  constexpr float kPower[] = {
      0x1.41fbc6p-13f, 0x1.5f3e58p-10f, 0x1.3b2d4cp-7f, 0x1.c6aee8p-5f, 0x1.ebfbdcp-3f, 0x1.62e430p-1f, 1.0f};
  Floats w[count], s[count], shifted[count], r[count], p[count], q[count];
  for (int i = 0; i < count; ++i) {
    const Floats a = smaller_or_second(Floats{} + kBeyond, (Floats)((Bits)z[i] & 0x7FFFFFFF));
    w[i] = a / (a + 4.5f);
    s[i] = a * 0x1.b2da4ep-1f;  // sqrt(log2(e) / 2)
  }
  // exp(-a^2 / 2) = 2^-(s^2) = 2^n 2^r, with a whole n and |r| <= 1/2.
  for (int i = 0; i < count; ++i) {
    shifted[i] = kRound - s[i] * s[i];
    r[i] = (kRound - shifted[i]) - s[i] * s[i];
    p[i] = r[i] * kPower[0] + kPower[1];
    q[i] = w[i] * kTail[0] + kTail[1];
  }
  for (int step = 2; step < 7; ++step)
    for (int i = 0; i < count; ++i) p[i] = p[i] * r[i] + kPower[step];
  for (int i = 0; i < count; ++i) p[i] *= (Floats)((Bits)shifted[i] << 23);
  for (int step = 2; step < 9; ++step)
    for (int i = 0; i < count; ++i) q[i] = q[i] * w[i] + kTail[step];
  for (int i = 0; i < count; ++i) {
    const Floats tail = p[i] * q[i];
    density[i] = p[i] * 0x1.988454p-2f;  // 1 / sqrt(2 pi)
    distribution[i] = (Vector<int32_t, kFloats>)z[i] < 0 ? tail : 1 - tail;
  }
}

}  // namespace
}  // namespace minbert::MINBERT_ISA
