// The arithmetic of AdamW (Loshchilov and Hutter 2019, algorithm 2), for host and device: V is a number or a register
// of numbers of type S.
#pragma once

#include "host_device.h"
#include "kernels.h"

namespace minbert {

// weight * from + (1 - weight) * to, computed from the nearer end, so that the larger term is not rounded.
template <class S>
class Interpolation {
 public:
  explicit MINBERT_HOST_DEVICE Interpolation(double weight)
      : to_is_nearer_(weight < 0.5), factor_(static_cast<S>(to_is_nearer_ ? -weight : 1 - weight)) {}

  template <class V>
  MINBERT_HOST_DEVICE V operator()(V from, V to) const {
    return (to_is_nearer_ ? to : from) + factor_ * (to - from);
  }

 private:
  bool to_is_nearer_;
  S factor_;
};

// An AdamWStep in the precision of the state.
template <class S>
struct AdamWScalars {
  S keep, beta2, rest2, eps, step_size;
  Interpolation<S> mean, average;

  explicit MINBERT_HOST_DEVICE AdamWScalars(const AdamWStep& step)
      : keep(static_cast<S>(step.keep)),
        beta2(static_cast<S>(step.beta2)),
        rest2(static_cast<S>(1 - step.beta2)),
        eps(static_cast<S>(step.eps)),
        step_size(static_cast<S>(step.step_size)),
        mean(step.beta1),
        average(step.momentum) {}
};

// One step. The bias corrections are folded into eps and step_size; `root` computes the square root of a V.
template <class V, class S, class Root>
static inline MINBERT_HOST_DEVICE void adamw(V grad, V& param, V& exp_avg, V& exp_avg_sq, const AdamWScalars<S>& s,
                                             const Root& root) {
  exp_avg = s.mean(exp_avg, grad);
  exp_avg_sq = s.beta2 * exp_avg_sq + s.rest2 * grad * grad;
  param = s.keep * param - s.step_size * exp_avg / (root(exp_avg_sq) + s.eps);
}

// A split float32 parameter is a bfloat16 number, the parameter rounded to nearest with ties away from zero, and an
// int16 number: bits of the parameter = (bits of the first << 16) + the second. U is uint32_t or a register of them;
// the int16 numbers are sign-extended to it, or their low 16 bits are what counts of it. A parameter that is NaN
// becomes kNaN.
constexpr uint32_t kNaN = 0x7FC00000;
template <class U>
static inline MINBERT_HOST_DEVICE U joined_bits(U high, U low) {
  return (high << 16) + low;
}
template <class U>
static inline MINBERT_HOST_DEVICE U high_bits(U bits) {
  return (bits + 0x8000) >> 16;
}

// Whether the update is made.
static inline MINBERT_HOST_DEVICE bool is_open(Gate gate) {
  if (!gate.flag) return true;
  return gate.is_bool ? *static_cast<const uint8_t*>(gate.flag) != 0 : *static_cast<const double*>(gate.flag) != 0;
}

}  // namespace minbert
