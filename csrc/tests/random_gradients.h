// Gram matrices of random and degenerate gradients, and the conditions that a solution of a quadratic program meets.
#pragma once

#include <random>

#include "check.h"
#include "quadratic_program.h"

namespace minbert {
namespace {

using Matrix = std::vector<double>;

inline std::mt19937_64 generator(7);

inline double normal() { return std::normal_distribution<double>()(generator); }
inline int64_t below(int64_t count) { return std::uniform_int_distribution<int64_t>(0, count - 1)(generator); }

// Gradients of T tasks in `dimensions` dimensions: kind 1 scales them by 1e-8 to 1e8, 2 makes some equal, 3 opposes
// some, 4 makes some zero, 5 mixes all of these; 0 leaves them as they are.
inline Matrix gram_of(int64_t tasks, int64_t dimensions, int kind) {
  Matrix rows(tasks * dimensions), gram(tasks * tasks);
  for (auto& entry : rows) entry = normal();
  for (int64_t i = 0; i < tasks; ++i) {
    const int own = kind == 5 ? static_cast<int>(below(5)) : below(3) || kind == 1 ? kind : 0;
    const double scale = own == 1 ? std::pow(10, 8 * (2 * (below(1000) / 999.0) - 1)) : own == 4 ? 0 : 1;
    const int64_t other = below(tasks);
    for (int64_t e = 0; e < dimensions; ++e) {
      double& entry = rows[i * dimensions + e];
      if (own == 2) entry = rows[other * dimensions + e];
      if (own == 3) entry = -rows[other * dimensions + e];
      entry *= scale;
    }
  }
  for (int64_t i = 0; i < tasks; ++i)
    for (int64_t j = 0; j <= i; ++j) {
      for (int64_t e = 0; e < dimensions; ++e)
        gram[i * tasks + j] += rows[i * dimensions + e] * rows[j * dimensions + e];
      gram[j * tasks + i] = gram[i * tasks + j];
    }
  return gram;
}

inline double trace(const Matrix& gram, int64_t tasks) {
  double total = 0;
  for (int64_t i = 0; i < tasks; ++i) total += gram[i * (tasks + 1)];
  return total;
}

inline Matrix product(const Matrix& a, const Matrix& x) {
  Matrix out(x.size());
  for (size_t i = 0; i < x.size(); ++i)
    for (size_t j = 0; j < x.size(); ++j) out[i] += a[i * x.size() + j] * x[j];
  return out;
}

inline double dot_of(const Matrix& a, const Matrix& b) {
  double total = 0;
  for (size_t i = 0; i < a.size(); ++i) total += a[i] * b[i];
  return total;
}

// The Karush-Kuhn-Tucker conditions of a matrix with a trace of 1, each within the rounding of its sums; or, of
// gradients of very different lengths, within 1e-8: there a short gradient may count as dependent on long ones.
inline void check_optimal(const QuadraticProgram& program, const double* x, bool scaled) {
  const int64_t n = program.n;
  const double unit = 1000 * static_cast<double>(n) * kEps;
  double sum = 0, level = 0, rounding = 0;
  Matrix slope(n), size(n);
  for (int64_t i = 0; i < n; ++i) {
    CHECK(x[i] >= -unit, "a variable is %g", x[i]);
    slope[i] = program.b[i];
    size[i] = std::abs(program.b[i]);
    for (int64_t j = 0; j < n; ++j) {
      slope[i] += program.a[i * n + j] * x[j];
      size[i] += std::abs(program.a[i * n + j] * x[j]);
    }
    sum += x[i];
    level += program.simplex ? x[i] * slope[i] : 0;
    rounding += program.simplex ? x[i] * size[i] : 0;
  }
  CHECK(!program.simplex || std::abs(sum - 1) <= unit, "the sum is %.17g", sum);
  for (int64_t i = 0; i < n; ++i) {
    const double least = -unit * (size[i] + rounding) - 1e-8 * scaled, gain = slope[i] - level;
    CHECK(gain >= least, "growth of variable %d of %d gains %g, rounding %g, simplex %d", static_cast<int>(i),
          static_cast<int>(n), gain, least, program.simplex);
    CHECK(x[i] <= unit || gain <= -least || x[i] * gain <= -least, "variable %d is %g with a slope of %g, rounding %g",
          static_cast<int>(i), x[i], gain, least);
  }
}

}  // namespace
}  // namespace minbert
