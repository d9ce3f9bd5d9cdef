// Softmax over rows of scores, with dropout, forward and backward.
#pragma once

#include "cpu/simd_math.h"
#include "cpu/simd_shuffle.h"

namespace minbert::MINBERT_ISA {
namespace {

template <int... lane>
inline Vector<int32_t, kFloats> lane_numbers(Lanes<lane...>) {
  return Vector<int32_t, kFloats>{lane...};
}

// Sets the elements after the first `length` in their last register.
inline void fill_last_register(float* row, int64_t length, float value) {
  const int64_t last = (length - 1) / kFloats * kFloats;
  const Floats v = load<Floats>(row + last);
  const auto inside = lane_numbers(EveryLane{}) < static_cast<int32_t>(length - last);
  store_raw(row + last, inside ? v : all_lanes(value));
}

inline Floats largest(const float* row, int64_t length) {
  Floats most = load<Floats>(row);
  for (int64_t at = kFloats; at < length; at += kFloats) most = larger(most, load<Floats>(row + at));
  return largest_of_lanes(most);
}

// The keep bytes of a mask, 0 or 1, as numbers.
inline Floats kept(const uint8_t* keep) {
  const auto bytes = load_raw<Vector<uint8_t, kFloats>>(keep);
  return __builtin_convertvector(__builtin_convertvector(bytes, Vector<int32_t, kFloats>), Floats);
}

// Scores become e^(score - largest), and 0 where dropped. Returns the sum over all, dropped or not.
template <bool dropout>
float exponentials(float* scores, int64_t length, const uint8_t* keep) {
  fill_last_register(scores, length, -__builtin_inff());
  const Floats most = largest(scores, length);
  Floats sum{};
  for (int64_t at = 0; at < length; at += kFloats) {
    Floats e = exp(load<Floats>(scores + at) - most);
    sum += e;
    if (dropout) e *= kept(keep + at);
    store_raw(scores + at, e);
  }
  return sum_of_lanes(sum)[0];
}

// The backward, from scores and the gradients g of the probabilities after dropout, which already contain its scale:
// scores become the probabilities P after dropout, gradients become those of the scores, P_j (g_j - sum of P_k g_k).
template <bool dropout>
void softmax_backward(float* scores, float* grads, int64_t length, const uint8_t* keep) {
  fill_last_register(scores, length, -__builtin_inff());
  fill_last_register(grads, length, 0);
  const Floats most = largest(scores, length);
  Floats sum{}, weighted{};
  for (int64_t at = 0; at < length; at += kFloats) {
    const Floats e = exp(load<Floats>(scores + at) - most);
    Floats g = load<Floats>(grads + at);
    if (dropout) {
      g *= kept(keep + at);
      store_raw(grads + at, g);
    }
    sum += e;
    weighted += e * g;
    store_raw(scores + at, e);
  }
  const Floats inverse = 1.0f / sum_of_lanes(sum), mean = sum_of_lanes(weighted) * inverse;
  for (int64_t at = 0; at < length; at += kFloats) {
    Floats p = load<Floats>(scores + at) * inverse;
    store_raw(grads + at, p * (load<Floats>(grads + at) - mean));
    if (dropout) p *= kept(keep + at);
    store_raw(scores + at, p);
  }
}

}  // namespace
}  // namespace minbert::MINBERT_ISA
