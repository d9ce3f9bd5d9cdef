// Computes the weights of the task gradients from their Gram matrices, for host and device: the operations of
// reference.surgery_weights in the same order. Each of `workers` threads calls the function for a share of the rows;
// `sync` is their barrier.
#pragma once

#include <cmath>

#include "host_device.h"
#include "kernels.h"

namespace minbert {

// a b, rounded before any addition: a fused multiply-add would give other bits.
static inline MINBERT_HOST_DEVICE double times(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  volatile double product = a * b;
  return product;
#endif
}

static inline MINBERT_HOST_DEVICE bool is_finite(double x) { return x - x == 0; }

static inline MINBERT_HOST_DEVICE double dot(const double* a, const double* b, int64_t length) {
  double total = 0;
  for (int64_t i = 0; i < length; ++i) total += times(a[i], b[i]);
  return total;
}

// Row `task` of the coefficients: the projected gradient of the task as a combination of the original gradients (Yu et
// al. 2020, algorithm 1).
static inline MINBERT_HOST_DEVICE void project(const double* gram, const int64_t* orders, bool projects, int64_t task,
                                               int64_t tasks, double* coefficients) {
  double* const own = coefficients + task * tasks;
  for (int64_t j = 0; j < tasks; ++j) own[j] = j == task;
  for (int64_t i = 0; projects && i < tasks; ++i) {
    const int64_t j = orders[task * tasks + i];
    if (j == task || j < 0 || j >= tasks) continue;
    const double product = dot(own, gram + j * tasks, tasks), square = gram[j * tasks + j];
    if (product < 0 && square > 0) own[j] -= product / square;
  }
}

// Negative sums, which cancellation leaves, become 0; -Inf stays, so that its root is NaN.
static inline MINBERT_HOST_DEVICE double at_least_0(double x) { return x < 0 && is_finite(x) ? 0 : x; }
static inline MINBERT_HOST_DEVICE double root(double x) { return sqrt(at_least_0(x)); }

static inline MINBERT_HOST_DEVICE bool all_finite(const double* from, int64_t count) {
  bool finite = true;
  for (int64_t i = 0; finite && i < count; ++i) finite = is_finite(from[i]);
  return finite;
}

template <class Sync>
static inline MINBERT_HOST_DEVICE void surgery_weights(const SurgeryProblem& problem, const SurgeryResult& result,
                                                       int64_t worker, int64_t workers, const Sync& sync) {
  const int64_t tasks = problem.tasks, entries = tasks * tasks, rows = problem.parts * tasks;  // task by task, by part
  const double plain = problem.mean ? 1.0 / static_cast<double>(tasks) : 1.0;
  double *const weights = result.weights, *const coefficients = result.scratch;

  if (problem.orders) {
    bool projects = false;
    for (int64_t row = worker, last = -1; row < rows; row += workers) {
      const int64_t part = row / tasks;
      const double* const gram = problem.gram + part * entries;
      if (part != last) projects = all_finite(gram, entries);
      last = part;
      project(gram, problem.orders + part * entries, projects, row % tasks, tasks, coefficients + part * entries);
    }
  }
  sync();
  for (int64_t row = worker; row < rows; row += workers) {
    double total = problem.weights ? problem.weights[row] : plain;
    if (problem.orders) {
      const double* const of_part = coefficients + row / tasks * entries;
      total = 0;
      for (int64_t i = 0; i < tasks; ++i) total += of_part[i * tasks + row % tasks];
      if (problem.mean) total /= static_cast<double>(tasks);
    }
    weights[row] = total;
  }
  sync();

  // Three quadratic forms v' G v of each part: of the weights, of the difference that surgery makes, and of the plain
  // weights. First the products v_i (G v)_i, then their sums.
  double* const forms = coefficients + problem.parts * entries;  // [3, G, T]
  for (int64_t row = worker; row < rows; row += workers) {
    const double* const gram = problem.gram + row * tasks;
    const double* const of_part = weights + row / tasks * tasks;
    double of_weights = 0, of_change = 0, of_plain = 0;
    for (int64_t j = 0; j < tasks; ++j) {
      of_weights += times(gram[j], of_part[j]);
      of_change += times(gram[j], of_part[j] - plain);
      of_plain += times(gram[j], plain);
    }
    forms[row] = times(weights[row], of_weights);
    forms[rows + row] = times(weights[row] - plain, of_change);
    forms[2 * rows + row] = times(plain, of_plain);
  }
  sync();
  double square[3] = {0, 0, 0};  // of all parts
  for (int64_t part = 0; part < problem.parts; ++part)
    for (int form = 0; form < 3; ++form) {
      double of_part = 0;
      for (int64_t i = 0; i < tasks; ++i) of_part += forms[form * rows + part * tasks + i];
      square[form] += at_least_0(of_part);
    }
  const double norm = root(square[0] + (problem.own_square ? *problem.own_square : 0));
  const bool finite = is_finite(norm);
  const double scale = finite && 0 < problem.max_norm && problem.max_norm < norm ? problem.max_norm / norm : 1;
  sync();
  for (int64_t row = worker; row < rows; row += workers) weights[row] = times(weights[row], scale);
  if (worker == 0) {
    result.stats[0] = norm;
    result.stats[1] = scale;
    result.stats[2] = finite;
    result.stats[3] = square[2] > 0 ? root(square[1] / square[2]) : NAN;
  }
}

}  // namespace minbert
