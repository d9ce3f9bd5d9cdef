// The weighting rules that read the task losses or random numbers, for host and device. The formulas are those of
// kernels/reference/loss_weightings.py, which also says what is in each state.
#pragma once

#include "weighting_part.h"

namespace minbert {
namespace {

// torch.optim.Adam with betas 0.9 and 0.999, an eps of 1e-8 and L2 regularisation: a step of one number.
inline MINBERT_HOST_DEVICE void adam(double& value, double gradient, double& first, double& second, double step,
                                     double lr, double decay) {
  gradient += decay * value;
  first = 0.9 * first + 0.1 * gradient;
  second = 0.999 * second + 0.001 * gradient * gradient;
  value -= lr / (1 - pow(0.9, step)) * first / (sqrt(second / (1 - pow(0.999, step))) + 1e-8);
}

inline MINBERT_HOST_DEVICE double at_least(double least, double x) { return x < least ? least : x; }

inline MINBERT_HOST_DEVICE void famo(const WeightingPart& part, Scratch scratch) {
  constexpr double kLeastLoss = 1e-8;
  const int64_t n = part.tasks;
  double &calls = part.state[0], *const logits = part.state + 1, *const first = logits + n, *const second = first + n,
         *const last = second + n, *const shares = scratch.take(n), *const change = scratch.take(n);
  double mean = 0, total = 0;
  softmax(logits, n, shares);
  for (int64_t i = 0; i < n; ++i) {
    const double loss = at_least(0, part.losses[i]) + kLeastLoss;
    change[i] = log(last[i]) - log(loss);
    mean += shares[i] * change[i];
    last[i] = loss;
  }
  for (int64_t i = 0; calls > 0 && i < n; ++i)
    adam(logits[i], shares[i] * (change[i] - mean), first[i], second[i], calls, part.options[0], part.options[1]);
  calls += 1;
  softmax(logits, n, shares);
  for (int64_t i = 0; i < n; ++i) total += part.weights[i] = shares[i] / last[i];
  for (int64_t i = 0; i < n; ++i) part.weights[i] /= total;
}

inline MINBERT_HOST_DEVICE void uncertainty(const WeightingPart& part) {
  const int64_t n = part.tasks;
  double &calls = part.state[0], *const s = part.state + 1, *const first = s + n, *const second = first + n;
  calls += 1;
  for (int64_t i = 0; i < n; ++i) {
    part.weights[i] = exp(-s[i]) / 2;
    adam(s[i], 0.5 - part.weights[i] * part.losses[i], first[i], second[i], calls, part.options[0], 0);
  }
}

inline MINBERT_HOST_DEVICE void dwa(const WeightingPart& part, Scratch scratch) {
  const int64_t n = part.tasks;
  const double temperature = part.options[0], every = part.options[1];
  double &calls = part.state[0], *const total = part.state + 1, *const newer = total + n, *const older = newer + n,
         *const rates = scratch.take(n);
  for (int64_t i = 0; i < n; ++i) {
    const double ratio = newer[i] / older[i];
    rates[i] = (is_finite(ratio) ? ratio : 1) / temperature;
  }
  softmax(rates, n, part.weights);
  for (int64_t i = 0; i < n; ++i) part.weights[i] = calls >= 2 * every ? static_cast<double>(n) * part.weights[i] : 1;
  calls += 1;
  const bool ends = fmod(calls, every) == 0;
  for (int64_t i = 0; i < n; ++i) {
    total[i] += part.losses[i];
    if (!ends) continue;
    older[i] = newer[i];
    newer[i] = total[i] / every;
    total[i] = 0;
  }
}

inline MINBERT_HOST_DEVICE void gradnorm(const WeightingPart& part, Scratch scratch) {
  constexpr double kLeastWeight = 1e-3;
  const int64_t n = part.tasks;
  const double tasks = static_cast<double>(n);
  double &calls = part.state[0], *const weights = part.state + 1, *const initial = weights + n,
         *const first = initial + n, *const second = first + n, *const ratios = scratch.take(n);
  double mean_ratio = 0, mean_norm = 0, sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (calls == 0) {
      weights[i] = 1;
      initial[i] = part.losses[i];
    }
    part.weights[i] = weights[i];
    const double ratio = part.losses[i] / initial[i];
    ratios[i] = is_finite(ratio) ? at_least(0, ratio) : 1;
    mean_ratio += ratios[i];
    mean_norm += weights[i] * sqrt(at_least(0, part.gram[i * n + i]));
  }
  mean_ratio /= tasks;
  mean_norm /= tasks;
  calls += 1;
  for (int64_t i = 0; i < n; ++i) {
    const double norm = sqrt(at_least(0, part.gram[i * n + i]));
    const double beyond =
        weights[i] * norm - mean_norm * pow(mean_ratio > 0 ? ratios[i] / mean_ratio : 1, part.options[0]);
    adam(weights[i], (beyond > 0) * norm - (beyond < 0) * norm, first[i], second[i], calls, part.options[1], 0);
    weights[i] = at_least(kLeastWeight, weights[i]);
    sum += weights[i];
  }
  for (int64_t i = 0; i < n; ++i) weights[i] *= tasks / sum;
}

inline MINBERT_HOST_DEVICE void geometric_mean(const WeightingPart& part) {
  constexpr double kLeastLoss = 1e-8;
  const double tasks = static_cast<double>(part.tasks);
  double mean = 0;
  for (int64_t i = 0; i < part.tasks; ++i) mean += log(at_least(kLeastLoss, part.losses[i])) / tasks;
  for (int64_t i = 0; i < part.tasks; ++i) part.weights[i] = exp(mean) / (tasks * at_least(kLeastLoss, part.losses[i]));
}

}  // namespace
}  // namespace minbert
