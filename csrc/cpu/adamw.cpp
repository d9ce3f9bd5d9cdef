// The AdamW step on the weighted sum of the task gradients, in one pass over memory.
#include "cpu/chunks.h"

namespace minbert::MINBERT_ISA {
namespace {

// share * from + (1 - share) * to, from the nearer end, which keeps the larger term unrounded.
template <class Scalar, class Register>
inline Register interpolate(Register from, Register to, double share) {
  const Register apart = to - from;
  return share < 0.5 ? to - static_cast<Scalar>(share) * apart : from + static_cast<Scalar>(1 - share) * apart;
}

// Moments, parameter and its average of one register (Loshchilov and Hutter 2019, algorithm 2), the bias corrections
// folded into the step's scalars.
template <class Register, class Scalar>
inline void update(Register grad, Scalar* param, Scalar* exp_avg, Scalar* exp_avg_sq, Scalar* average,
                   const AdamWStep& step) {
  const auto scalar = [](double value) { return static_cast<Scalar>(value); };
  const Register moment1 = load<Register>(exp_avg), moment2 = load<Register>(exp_avg_sq);
  const Register mean = interpolate<Scalar>(moment1, grad, step.beta1);
  const Register square = scalar(step.beta2) * moment2 + scalar(1 - step.beta2) * grad * grad;
  const Register change = scalar(step.step_size) * mean / (square_root(square) + scalar(step.eps));
  const Register result = scalar(step.keep) * load<Register>(param) - change;
  std::memcpy(exp_avg, &mean, sizeof(mean));
  std::memcpy(exp_avg_sq, &square, sizeof(square));
  std::memcpy(param, &result, sizeof(result));
  if (!average) return;
  const Register kept = interpolate<Scalar>(load<Register>(average), result, step.momentum);
  std::memcpy(average, &kept, sizeof(kept));
}

template <class Element>
void update_chunk(const TaskGradients& g, const Chunk& chunk, const double* weights, const AdamWState& state,
                  const AdamWStep& step) {
  using Register = typename AccumulatorOf<Element>::type;
  using Scalar = decltype(Register{}[0] + 0);
  constexpr int kLanes = sizeof(Register) / sizeof(Scalar), kDepth = 2, kStep = kDepth * kLanes;
  Scalar* const param = static_cast<Scalar*>(state.params[chunk.tensor]) + chunk.begin;
  Scalar* const exp_avg = static_cast<Scalar*>(state.exp_avgs[chunk.tensor]) + chunk.begin;
  Scalar* const exp_avg_sq = static_cast<Scalar*>(state.exp_avg_sqs[chunk.tensor]) + chunk.begin;
  Scalar* const average = state.averages ? static_cast<Scalar*>(state.averages[chunk.tensor]) + chunk.begin : nullptr;
  const auto update_step = [&](int64_t at, Scalar* p, Scalar* m, Scalar* v, Scalar* a) {
    Register total[kDepth] = {};
    add_weighted<Element>(g, chunk, weights, at, total);
    for (int i = 0; i < kDepth; ++i)
      update(total[i], p + i * kLanes, m + i * kLanes, v + i * kLanes, a ? a + i * kLanes : nullptr, step);
  };
  int64_t at = 0;
  for (; at + kStep <= chunk.length; at += kStep)
    update_step(at, param + at, exp_avg + at, exp_avg_sq + at, average ? average + at : nullptr);
  if (at < chunk.length) {
    const int64_t bytes = (chunk.length - at) * static_cast<int64_t>(sizeof(Scalar));
    Scalar padded[4][kStep] = {};
    std::memcpy(padded[0], param + at, bytes);
    std::memcpy(padded[1], exp_avg + at, bytes);
    std::memcpy(padded[2], exp_avg_sq + at, bytes);
    if (average) std::memcpy(padded[3], average + at, bytes);
    update_step(at, padded[0], padded[1], padded[2], average ? padded[3] : nullptr);
    std::memcpy(param + at, padded[0], bytes);
    std::memcpy(exp_avg + at, padded[1], bytes);
    std::memcpy(exp_avg_sq + at, padded[2], bytes);
    if (average) std::memcpy(average + at, padded[3], bytes);
  }
}

}  // namespace

void combine_adamw(const TaskGradients& g, const double* weights, AdamWState state, AdamWStep step,
                   int threads) noexcept {
  const int64_t kStateBytes = (state.averages ? 8 : 6) * sizeof(float);  // of one element, read and written
  int64_t elements = 0;
  for (int64_t tensor = 0; tensor < g.tensors; ++tensor) elements += g.sizes[tensor];
  const int64_t work = g.tasks * gradient_bytes(g) + kStateBytes * elements;
  parallel(threads, g.first_chunk[g.tensors], work, [&](int64_t index) {
    const Chunk chunk = find_chunk(g, index);
    with_element(g.dtypes[chunk.tensor],
                 [&](auto element) { update_chunk<decltype(element)>(g, chunk, weights, state, step); });
  });
}

}  // namespace minbert::MINBERT_ISA
