// The weighting rules that read the Gram matrix alone, but for Nash-MTL and FairGrad (fair_weightings.h), for host and
// device. The formulas are those of kernels/reference/weightings.py, which also names the papers.
#pragma once

#include "quadratic_program.h"
#include "weighting_part.h"

namespace minbert {
namespace {

// The v >= least with the least v' (G + eps I) v: with v = least + x, a quadratic program in x >= 0.
inline MINBERT_HOST_DEVICE void project_on_dual_cone(const WeightingPart& part, const double* least, double* v,
                                                     Scratch scratch) {
  const int64_t n = part.tasks;
  double *const matrix = scratch.take(n * n), *const b = scratch.take(n);
  for (int64_t i = 0; i < n; ++i) {
    b[i] = 0;
    for (int64_t j = 0; j < n; ++j) {
      matrix[i * n + j] = part.scaled[i * n + j] + (i == j ? part.options[0] : 0);
      b[i] += matrix[i * n + j] * least[j];
    }
  }
  minimise(QuadraticProgram{n, matrix, b, false}, v, scratch);
  for (int64_t i = 0; i < n; ++i) v[i] += least[i];
}

// Row `task` of UPGrad: the projection of that task's gradient.
inline MINBERT_HOST_DEVICE void upgrad_row(const WeightingPart& part, int64_t task, double* row, Scratch scratch) {
  double* const least = scratch.take(part.tasks);
  for (int64_t i = 0; i < part.tasks; ++i) least[i] = i == task ? 1 / static_cast<double>(part.tasks) : 0;
  project_on_dual_cone(part, least, row, scratch);
}

inline MINBERT_HOST_DEVICE void dualproj(const WeightingPart& part, Scratch scratch) {
  double* const least = scratch.take(part.tasks);
  for (int64_t i = 0; i < part.tasks; ++i) least[i] = 1 / static_cast<double>(part.tasks);
  project_on_dual_cone(part, least, part.weights, scratch);
}

inline MINBERT_HOST_DEVICE void mgda(const WeightingPart& part, Scratch scratch) {
  double* const zeros = scratch.take(part.tasks);
  for (int64_t i = 0; i < part.tasks; ++i) zeros[i] = 0;
  minimise(QuadraticProgram{part.tasks, part.scaled, zeros, true}, part.weights, scratch);
}

// The dual of CAGrad, min over the simplex of b' w + k |g_w| with b = G w0 and k = c |g_0|, is
// min over t > 0 and w of b' w + k (w' G w / t + t) / 2: quadratic in w. At the solution |g_w| = t. For the w of a
// given t, |g_w|^2 / t^2 decreases in t, and as long as the same weights are 0, |g_w|^2 = least + slope t^2, with the
// least square over the affine hull of those gradients. So the root is found exactly once these are the right ones.
inline MINBERT_HOST_DEVICE void cagrad(const WeightingPart& part, Scratch scratch) {
  constexpr double kLeastNorm = 1e-4;  // of g_w, below which all weights are 0
  const int64_t n = part.tasks;
  const double* const gram = part.scaled;
  double *const mean = scratch.take(n), *const b = scratch.take(n), *const of_hull = scratch.take(n),
                *const w = part.weights;
  for (int64_t i = 0; i < n; ++i) mean[i] = 1 / static_cast<double>(n);
  const double radius = part.options[0] * sqrt(quadratic_form(gram, mean, n));
  double low = kLeastNorm, high = 1, t = kLeastNorm, found = 0;
  for (int round = 0; radius > 0 && round < 100; ++round) {
    for (int64_t i = 0; i < n; ++i) {
      b[i] = 0;
      for (int64_t j = 0; j < n; ++j) b[i] += gram[i * n + j] * (t / radius * mean[j]);
    }
    const QuadraticProgram program{n, gram, b, true};
    const uint32_t set = minimise(program, w, scratch);
    const double square = quadratic_form(gram, w, n);
    found = sqrt(square);
    if (round == 0 && found < t) {
      for (int64_t i = 0; i < n; ++i) w[i] = 0;
      return;
    }
    (found > t ? low : high) = t;
    for (int64_t i = 0; i < n; ++i) b[i] = 0;
    const double least = minimise_over(program, set, of_hull, scratch) ? quadratic_form(gram, of_hull, n) : 0;
    double next = t * sqrt(least / (t * t - square + least));
    if (!(low < next && next < high)) next = sqrt(low * high);
    if (fabs(next - t) <= 2 * kEps * t) break;
    t = next;
  }
  for (int64_t i = 0; i < n; ++i) w[i] = mean[i] + (radius > 0 ? radius / found * w[i] : 0);
}

inline MINBERT_HOST_DEVICE void imtl_g(const WeightingPart& part, Scratch scratch) {
  constexpr double kLeastSum = 1e-12;
  const int64_t n = part.tasks;
  double* const norms = scratch.take(n);
  for (int64_t i = 0; i < n; ++i) norms[i] = part.square(i) > 0 ? sqrt(part.square(i)) : 0;
  multiply_inverse(eigenvalues(part.scaled, n, scratch), false, norms, part.weights);
  double sum = 0, size = 0;
  for (int64_t i = 0; i < n; ++i) {
    sum += part.weights[i];
    size += fabs(part.weights[i]);
  }
  const bool cancels = !(fabs(sum) > kLeastSum * size);
  for (int64_t i = 0; i < n; ++i) part.weights[i] = cancels ? 1 / static_cast<double>(n) : part.weights[i] / sum;
}

inline MINBERT_HOST_DEVICE void aligned_mtl(const WeightingPart& part, Scratch scratch) {
  const int64_t n = part.tasks;
  double* const mean = scratch.take(n);
  for (int64_t i = 0; i < n; ++i) mean[i] = 1 / static_cast<double>(n);
  const Spectrum of = eigenvalues(part.scaled, n, scratch);
  multiply_inverse(of, true, mean, part.weights);
  double* const kept = scratch.take(n);  // the eigenvalues above rounding, in ascending order
  const double least = rounding_of(of);
  int64_t count = 0;
  double total = 0;
  for (int64_t k = 0; k < n; ++k) {
    if (!(of.values[k] > least)) continue;
    int64_t at = count++;
    for (; at > 0 && kept[at - 1] > of.values[k]; --at) kept[at] = kept[at - 1];
    kept[at] = of.values[k];
    total += of.values[k];
  }
  const double mode = part.options[0];
  const double common = mode == 0 ? kept[0] : mode == 1 ? kept[(count - 1) / 2] : total / static_cast<double>(count);
  for (int64_t i = 0; i < n; ++i) part.weights[i] *= sqrt(common);
}

inline MINBERT_HOST_DEVICE void config(const WeightingPart& part, Scratch scratch) {
  constexpr double kLeastSquare = 1e-12;  // of the direction's length: opposing gradients have none
  const int64_t n = part.tasks;
  double *const norms = scratch.take(n), *const ones = scratch.take(n), *const solution = scratch.take(n),
                *const cosines = scratch.take(n * n);
  for (int64_t i = 0; i < n; ++i) {
    ones[i] = part.square(i) > 0;
    norms[i] = ones[i] > 0 ? sqrt(part.square(i)) : 0;
  }
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j)
      cosines[i * n + j] = ones[i] > 0 && ones[j] > 0 ? part.scaled[i * n + j] / norms[i] / norms[j] : 0;
  multiply_inverse(eigenvalues(cosines, n, scratch), false, ones, solution);
  double square = 0, length = 0;
  for (int64_t i = 0; i < n; ++i) {
    double projection = 0;
    for (int64_t j = 0; j < n; ++j) projection += cosines[i * n + j] * solution[j];
    square += solution[i] * projection;
    length += norms[i] * projection;
  }
  for (int64_t i = 0; i < n; ++i)
    part.weights[i] = square > kLeastSquare && ones[i] > 0 ? length * solution[i] / norms[i] / square : 0;
}

inline MINBERT_HOST_DEVICE void gradvac(const WeightingPart& part, Scratch scratch) {
  const int64_t n = part.tasks;
  const double beta = part.options[0], *const gram = part.scaled;
  double* const own = scratch.take(n);  // the changed gradient as a combination of the original ones
  for (int64_t i = 0; i < n; ++i) part.weights[i] = 0;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) own[j] = i == j;
    for (int64_t k = 0; k < n; ++k) {
      const int64_t j = part.orders[i * n + k];
      if (j == i || j < 0 || j >= n || !(part.square(j) > 0)) continue;
      const double norm = sqrt(quadratic_form(gram, own, n)), other = sqrt(part.square(j));
      if (!(norm * other > 0)) continue;
      double product = 0;
      for (int64_t m = 0; m < n; ++m) product += own[m] * gram[j * n + m];
      double cosine = product / (norm * other);
      cosine = cosine > 1 ? 1 : cosine < -1 ? -1 : cosine;
      double& average = part.state[i * n + j];
      const double sine = sqrt(1 - cosine * cosine), target = average;
      const double target_sine = target * target < 1 ? sqrt(1 - target * target) : 0;
      if (cosine < target && target_sine > 0)
        own[j] += norm * (target * sine - cosine * target_sine) / (other * target_sine);
      average = (1 - beta) * target + beta * cosine;
    }
    for (int64_t j = 0; j < n; ++j) part.weights[j] += own[j];
  }
}

}  // namespace
}  // namespace minbert
