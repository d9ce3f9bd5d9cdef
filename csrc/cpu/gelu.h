// GELU with the exact error function, and its derivative, of registers.
#pragma once

#include "cpu/simd_math.h"

namespace minbert::MINBERT_ISA {
namespace {

// The density phi(z) and the distribution function Phi(z) of the standard normal distribution, of several registers
// together to hide the latency of each operation.
//
// Phi(-a) = exp(-a^2 / 2) q(a) for a = |z|, where q is smooth (erfcx(a / sqrt 2) / 2), and a polynomial in a / (a
// + 4.5) approximates it to 1e-8. The relative error of Phi is below 4e-7 for z > -3, and grows to 2e-6 at z = -6.
template <int count>
inline void normal(const Floats (&z)[count], Floats (&density)[count], Floats (&distribution)[count]) {
  constexpr float kLargest = 13.27f;         // where exp(-a^2 / 2) is 2^-127, below the exponent's range, and becomes 0
  constexpr float kRound = 0x1.8p23f + 127;  // adding it leaves the biased exponent n + 127 in the low bits
  constexpr float kTail[] = {-0x1.b08ee6p-4f, 0x1.8abdf8p-2f,  -0x1.586058p-2f,
                             -0x1.954618p-1f, 0x1.54ee14p+1f,  -0x1.e4d42cp+1f,
                             0x1.a2350cp+1f,  -0x1.cb94dcp+0f, 0.5f};
  constexpr float kPower[] = {
      0x1.41fbc6p-13f, 0x1.5f3e58p-10f, 0x1.3b2d4cp-7f, 0x1.c6aee8p-5f, 0x1.ebfbdcp-3f, 0x1.62e430p-1f, 1.0f};
  Floats w[count], s[count], shifted[count], r[count], p[count], q[count];
  for (int i = 0; i < count; ++i) {
    const Floats a = smaller_or_second(all_lanes(kLargest), absolute(z[i]));
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
    distribution[i] = (Ints)z[i] < 0 ? tail : 1 - tail;
  }
}

// GELU is z Phi(z), and its derivative is Phi(z) + z phi(z). In float32:
template <int count>
inline void gelu(const Floats (&z)[count], Floats (&y)[count], float) {
  Floats density[count], distribution[count];
  normal(z, density, distribution);
  for (int i = 0; i < count; ++i) y[i] = z[i] * distribution[i];
}
template <int count>
inline void gelu_derivative(const Floats (&z)[count], Floats (&derivative)[count], float) {
  Floats density[count], distribution[count];
  normal(z, density, distribution);
  for (int i = 0; i < count; ++i) derivative[i] = distribution[i] + z[i] * density[i];
}

// For results that are rounded to bfloat16. Multiplications, not memory, bound these loops: they contain no division
// and no exponential. With a = |z|, the tails Phi(-a) and Phi(-a) - a phi(a) are p(a)^16 and (root - a) p(a)^8, with
// minimax polynomials p that reach 0 at kLargest. The relative error of the first is 2^-13 for a < 4 (bfloat16 keeps
// 2^-9); that of the second is 2^-17, because the gradient of the bias is a float32 sum of it. For larger a the
// absolute errors are below 3e-9 and 1e-8.
constexpr float kLargest = 8.5f;

// a = |z|, power = p(a)^(2^squarings).
template <int squarings, int count, int terms>
inline void power_of_polynomial(const Floats (&z)[count], const float (&p)[terms], Floats (&a)[count],
                                Floats (&power)[count]) {
  Floats near[count];
  for (int i = 0; i < count; ++i) {
    a[i] = absolute(z[i]);
    near[i] = smaller_or_second(all_lanes(kLargest), a[i]);
    power[i] = near[i] * p[0] + p[1];
  }
  for (int step = 2; step < terms; ++step)
    for (int i = 0; i < count; ++i) power[i] = power[i] * near[i] + p[step];
  for (int squaring = 0; squaring < squarings; ++squaring)
    for (int i = 0; i < count; ++i) power[i] *= power[i];
}

template <int count>
inline void gelu(const Floats (&z)[count], Floats (&y)[count], BFloat16) {
  constexpr float p[] = {-0x1.795bd2p-15f, 0x1.66071cp-11f, -0x1.634a26p-10f,
                         -0x1.24151ep-6f,  -0x1.873e20p-5f, 0x1.ea4bd2p-1f};
  Floats a[count], tail[count];
  power_of_polynomial<4>(z, p, a, tail);
  for (int i = 0; i < count; ++i) y[i] = z[i] * ((Ints)z[i] < 0 ? tail[i] : 1 - tail[i]);
}
template <int count>
inline void gelu_derivative(const Floats (&z)[count], Floats (&derivative)[count], BFloat16) {
  constexpr float kRoot = 0.75179154f;
  constexpr float p[] = {-0x1.2e912cp-22f, 0x1.f58836p-18f, -0x1.fabfe2p-15f, -0x1.ee9014p-16f, 0x1.31f1a8p-9f,
                         -0x1.760472p-9f,  -0x1.76770ap-5f, -0x1.0258c8p-5f,  0x1.e68d30p-1f};
  Floats a[count], power[count];
  power_of_polynomial<3>(z, p, a, power);
  for (int i = 0; i < count; ++i) {
    const Floats tail = (kRoot - a[i]) * power[i];
    derivative[i] = (Ints)z[i] < 0 ? tail : 1 - tail;
  }
}

// The number of registers that hides the latency of the multiplications.
template <class Element>
constexpr int kTogether = sizeof(Element) == 2 ? 8 : 3;

}  // namespace
}  // namespace minbert::MINBERT_ISA
