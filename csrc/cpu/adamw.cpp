// The AdamW step on the weighted sum of the task gradients, in one pass over memory.
#include "cpu/chunks.h"

namespace minbert::MINBERT_ISA {
namespace {

// Moments and parameter of one register (Loshchilov and Hutter 2019, algorithm 2), the bias corrections folded into the
// step's scalars.
template <class Register, class Scalar>
inline void update(Register grad, Scalar* param, Scalar* exp_avg, Scalar* exp_avg_sq, const AdamWStep& step) {
  const auto scalar = [](double value) { return static_cast<Scalar>(value); };
  const Register moment1 = load<Register>(exp_avg), moment2 = load<Register>(exp_avg_sq);
  const Register apart = grad - moment1;  // interpolating from the nearer end keeps the larger term unrounded
  const Register mean = step.beta1 < 0.5 ? grad - scalar(step.beta1) * apart : moment1 + scalar(1 - step.beta1) * apart;
  const Register square = scalar(step.beta2) * moment2 + scalar(1 - step.beta2) * grad * grad;
  const Register change = scalar(step.step_size) * mean / (square_root(square) + scalar(step.eps));
  const Register result = scalar(step.keep) * load<Register>(param) - change;
  std::memcpy(exp_avg, &mean, sizeof(mean));
  std::memcpy(exp_avg_sq, &square, sizeof(square));
  std::memcpy(param, &result, sizeof(result));
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
  const auto update_step = [&](int64_t at, Scalar* p, Scalar* m, Scalar* v) {
    Register total[kDepth] = {};
    add_weighted<Element>(g, chunk, weights, at, total);
    for (int i = 0; i < kDepth; ++i) update(total[i], p + i * kLanes, m + i * kLanes, v + i * kLanes, step);
  };
  int64_t at = 0;
  for (; at + kStep <= chunk.length; at += kStep) update_step(at, param + at, exp_avg + at, exp_avg_sq + at);
  if (at < chunk.length) {
    const int64_t bytes = (chunk.length - at) * static_cast<int64_t>(sizeof(Scalar));
    Scalar padded[3][kStep] = {};
    std::memcpy(padded[0], param + at, bytes);
    std::memcpy(padded[1], exp_avg + at, bytes);
    std::memcpy(padded[2], exp_avg_sq + at, bytes);
    update_step(at, padded[0], padded[1], padded[2]);
    std::memcpy(param + at, padded[0], bytes);
    std::memcpy(exp_avg + at, padded[1], bytes);
    std::memcpy(exp_avg_sq + at, padded[2], bytes);
  }
}

}  // namespace

void combine_adamw(const TaskGradients& g, const double* weights, AdamWState state, AdamWStep step,
                   int threads) noexcept {
  constexpr int64_t kStateBytes = 6 * sizeof(float);  // of one element: three tensors read and written
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
