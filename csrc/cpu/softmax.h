// Softmax over rows of scores, with dropout, forward and backward.
#pragma once

#include "cpu/shuffle.h"
#include "cpu/vector_math.h"

namespace minbert::MINBERT_ISA {
namespace {

template <int... lane>
inline Vector<int32_t, kFloats> lane_numbers(Lanes<lane...>) {
  return Vector<int32_t, kFloats>{lane...};
}

// Sets what follows the first `length` elements in their last register.
inline void fill_last_register(float* row, int64_t length, float value) {
  const int64_t last = (length - 1) / kFloats * kFloats;
  const Floats v = load<Floats>(row + last);
  const auto inside = lane_numbers(EveryLane{}) < static_cast<int32_t>(length - last);
  const Floats filled = inside ? v : all_lanes(value);
  std::memcpy(row + last, &filled, sizeof(filled));
}

inline Floats largest(const float* row, int64_t length) {
  Floats most = load<Floats>(row);
  for (int64_t at = kFloats; at < length; at += kFloats) most = larger(most, load<Floats>(row + at));
  return largest_of_lanes(most);
}

// Bytes of a mask, 0 or 1, as numbers.
inline Floats kept(const uint8_t* keep) {
  const auto bytes = load_raw<Vector<uint8_t, kFloats>>(keep);
  return __builtin_convertvector(__builtin_convertvector(bytes, Vector<int32_t, kFloats>), Floats);
}

// Scores become e^(score - largest), 0 where dropped. Returns the sum over all, dropped or not.
template <bool dropout>
float exponentials(float* scores, int64_t length, const uint8_t* keep) {
  fill_last_register(scores, length, -__builtin_inff());
  const Floats most = largest(scores, length);
  Floats sum{};
  for (int64_t at = 0; at < length; at += kFloats) {
    Floats e = exp(load<Floats>(scores + at) - most);
    sum += e;
    if (dropout) e *= kept(keep + at);
    std::memcpy(scores + at, &e, sizeof(e));
  }
  return sum_of_lanes(sum)[0];
}

// From scores s and the gradients g of the probabilities after dropout (without its scale, which g has already): scores
// become the probabilities P after dropout, gradients become those of the scores, P_j (g_j - sum of P_k g_k).
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
      std::memcpy(grads + at, &g, sizeof(g));
    }
    sum += e;
    weighted += e * g;
    std::memcpy(scores + at, &e, sizeof(e));
  }
  const Floats inverse = 1.0f / sum_of_lanes(sum), mean = sum_of_lanes(weighted) * inverse;
  for (int64_t at = 0; at < length; at += kFloats) {
    Floats p = load<Floats>(scores + at) * inverse;
    const Floats ds = p * (load<Floats>(grads + at) - mean);
    if (dropout) p *= kept(keep + at);
    std::memcpy(scores + at, &p, sizeof(p));
    std::memcpy(grads + at, &ds, sizeof(ds));
  }
}

}  // namespace
}  // namespace minbert::MINBERT_ISA
