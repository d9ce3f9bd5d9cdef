// The weighting rules Nash-MTL and FairGrad, for host and device: G w = w^-p, by a damped Newton iteration. The
// formulas are those of kernels/reference/weightings.py.
#pragma once

#include "weighting_part.h"

namespace minbert {
namespace {

// Minimises y' M y / 2 + sum over i of c_i psi(y_i), psi' = -y^-p, over y > 0: then M y = c y^-p. M is positive
// definite with a diagonal of about c, so that y = 1 is a good start.
struct FairProgram {
  int64_t n;
  const double *m, *c;
  double power;

  MINBERT_HOST_DEVICE double pull(int64_t i, double y) const { return c[i] * (power == 1 ? 1 / y : pow(y, -power)); }

  // The gradient at y [n]; returns whether it is nothing but rounding. size: the sums of its terms' absolute values.
  MINBERT_HOST_DEVICE bool gradient(const double* y, double* of, double* size) const {
    bool zero = true;
    for (int64_t i = 0; i < n; ++i) {
      of[i] = -pull(i, y[i]);
      size[i] = -of[i];
      for (int64_t j = 0; j < n; ++j) {
        of[i] += m[i * n + j] * y[j];
        size[i] += fabs(m[i * n + j]) * y[j];
      }
      zero = zero && fabs(of[i]) <= kEps * size[i];
    }
    return zero;
  }
};

inline MINBERT_HOST_DEVICE void minimise(const FairProgram& program, double* y, Scratch scratch) {
  constexpr int kSteps = 200, kHalvings = 40;
  const int64_t n = program.n;
  double *const hessian = scratch.take(n * n), *const gradient = scratch.take(n), *const size = scratch.take(n),
                *const step = scratch.take(n), *const next = scratch.take(n);
  // The share of each y that a step leaves at least. With a small power y has to fall far to change c y^-p.
  const double shrinks = program.power < 0.3 ? pow(10, -1 / program.power) : 1e-3;
  for (int64_t i = 0; i < n; ++i) y[i] = 1;
  bool done = program.gradient(y, gradient, size);
  for (int round = 0; round < kSteps && !done; ++round) {
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < n; ++j) hessian[i * n + j] = program.m[i * n + j];
      hessian[i * n + i] += program.power * program.pull(i, y[i]) / y[i];
      step[i] = -gradient[i];
    }
    if (!factor(hessian, n, 0, size)) return;
    solve(hessian, n, step);
    double slope = 0, share = 1;
    done = true;
    for (int64_t i = 0; i < n; ++i) {
      slope += step[i] * gradient[i];
      if (y[i] + share * step[i] < shrinks * y[i]) share = (shrinks - 1) * y[i] / step[i];
      done = done && fabs(step[i]) <= kEps * y[i];
    }
    // The objective is convex along the step: it decreases as long as the slope is below 0. A quarter of the first
    // slope beyond it leaves the steps near the solution whole.
    for (int halving = 0; halving < kHalvings; ++halving, share /= 2) {
      for (int64_t i = 0; i < n; ++i) next[i] = y[i] + share * step[i];
      done = program.gradient(next, gradient, size) || done;
      double end = 0, rounding = 0;
      for (int64_t i = 0; i < n; ++i) {
        end += step[i] * gradient[i];
        rounding += fabs(step[i]) * size[i] * static_cast<double>(n) * kEps;
      }
      if (end <= -slope / 4 + rounding) break;
    }
    for (int64_t i = 0; i < n; ++i) y[i] = next[i];
  }
}

// The w > 0 with G w = w^-p for G = scaled / norm; 0 for a gradient of 0. With w_i = d_i y_i, d_i = |g_i|^(-2 / (1 +
// p)), it is a FairProgram with M_ij = cos_ij h_i h_j and c_i = h_i^2, h_i = |g_i| d_i. 1e-14 on the cosines' diagonal
// keep y finite for opposing gradients.
inline MINBERT_HOST_DEVICE void fair_weights(const WeightingPart& part, double norm, double power, double* w,
                                             Scratch scratch) {
  constexpr double kRidge = 1e-14;
  const int64_t n = part.tasks;
  double *const lengths = scratch.take(n), *const h = scratch.take(n), *const c = scratch.take(n),
                *const y = scratch.take(n), *const m = scratch.take(n * n);
  for (int64_t i = 0; i < n; ++i) {
    lengths[i] = part.square(i) > 0 ? sqrt(part.square(i) / norm) : 0;
    h[i] = lengths[i] > 0 ? pow(lengths[i], (power - 1) / (power + 1)) : 0;
  }
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (!(lengths[i] > 0)) continue;
    c[count++] = h[i] * h[i];
  }
  int64_t row = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (!(lengths[i] > 0)) continue;
    int64_t column = 0;
    for (int64_t j = 0; j < n; ++j) {
      if (!(lengths[j] > 0)) continue;
      const double cosine = i == j ? 1 + kRidge : part.scaled[i * n + j] / norm / lengths[i] / lengths[j];
      m[row * count + column++] = cosine * h[i] * h[j];
    }
    ++row;
  }
  minimise(FairProgram{count, m, c, power}, y, scratch);
  row = 0;
  for (int64_t i = 0; i < n; ++i) w[i] = lengths[i] > 0 ? y[row++] * h[i] / lengths[i] : 0;
}

// State: the calls so far, alpha before it is scaled [T].
inline MINBERT_HOST_DEVICE void nash_mtl(const WeightingPart& part, Scratch scratch) {
  const int64_t n = part.tasks;
  const double max_norm = part.options[0], every = part.options[1];
  double &calls = part.state[0], *const alpha = part.state + 1;
  if (fmod(calls, every) == 0) {
    double frobenius = 0;
    for (int64_t i = 0; i < n * n; ++i) frobenius += part.scaled[i] * part.scaled[i];
    fair_weights(part, sqrt(frobenius), 1, alpha, scratch);
  }
  calls += 1;
  const double norm = sqrt(quadratic_form(part.scaled, alpha, n)) * sqrt(part.trace);
  for (int64_t i = 0; i < n; ++i)
    part.weights[i] = 0 < max_norm && max_norm < norm ? alpha[i] * (max_norm / norm) : alpha[i];
}

inline MINBERT_HOST_DEVICE void fairgrad(const WeightingPart& part, Scratch scratch) {
  const int64_t n = part.tasks;
  const double alpha = part.options[0];
  if (alpha == 0) {
    for (int64_t i = 0; i < n; ++i) part.weights[i] = 1 / static_cast<double>(n);
    return;
  }
  fair_weights(part, 1, 1 / alpha, part.weights, scratch);
  const double factor = pow(part.trace, -alpha / (1 + alpha));
  for (int64_t i = 0; i < n; ++i) part.weights[i] *= factor;
}

}  // namespace
}  // namespace minbert
