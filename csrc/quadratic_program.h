// Convex quadratic programs of a few variables, for host and device: a primal active-set method, which ends at the
// exact solution (Lawson and Hanson 1974, chapter 23, for x >= 0; Wolfe 1976 for the simplex).
#pragma once

#include "small_matrix.h"

namespace minbert {
namespace {

// Minimises x' A x / 2 + b' x over x >= 0, or over the simplex: x >= 0 with a sum of 1. A is positive semi-definite,
// and b is A times some vector, so that a minimum exists.
struct QuadraticProgram {
  int64_t n;        // up to 32
  const double* a;  // [n, n]
  const double* b;  // [n]
  bool simplex;
};
constexpr int64_t quadratic_program_numbers(int64_t n) { return (n + 5) * n; }

inline MINBERT_HOST_DEVICE bool contains(uint32_t set, int64_t i) { return set >> i & 1; }

// The minimum where the variables outside `set` are 0 and the others of any sign. Returns false where it is not unique.
// On the simplex the variables but one are free, that of the shortest vector of the Gram matrix A: all differences are
// to it, so that they keep the digits of short vectors beside long ones.
inline MINBERT_HOST_DEVICE bool minimise_over(const QuadraticProgram& program, uint32_t set, double* x,
                                              Scratch scratch) {
  const int64_t n = program.n;
  const double* const a = program.a;
  double *const matrix = scratch.take(n * n), *const right = scratch.take(n), *const scale = scratch.take(n);
  int64_t base = -1, free = 0;
  for (int64_t i = 0; i < n; ++i)
    if (contains(set, i)) {
      ++free;
      if (program.simplex && (base < 0 || a[i * n + i] < a[base * n + base])) base = i;
    }
  if (base >= 0) --free;
  int64_t row = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (!contains(set, i) || i == base) continue;
    int64_t column = 0;
    for (int64_t j = 0; j < n; ++j) {
      if (!contains(set, j) || j == base) continue;
      const double entry = a[i * n + j];
      matrix[row * free + column++] =
          base < 0 ? entry : (entry - a[i * n + base]) - (a[base * n + j] - a[base * n + base]);
    }
    scale[row] = a[i * n + i];
    right[row] = -program.b[i];
    if (base >= 0) {
      scale[row] += a[base * n + base];
      right[row] += program.b[base] + (a[base * n + base] - a[i * n + base]);
    }
    ++row;
  }
  if (!factor(matrix, free, 8 * static_cast<double>(n) * kEps, scale)) return false;
  solve(matrix, free, right);
  double rest = 1;
  row = 0;
  for (int64_t i = 0; i < n; ++i) {
    x[i] = 0;
    if (!contains(set, i) || i == base) continue;
    x[i] = right[row++];
    rest -= x[i];
  }
  if (base >= 0) x[base] = rest;
  return true;
}

// Writes the solution x [n], and returns the variables that are not 0. Where several solve the program, x is one of
// them.
inline MINBERT_HOST_DEVICE uint32_t minimise(const QuadraticProgram& program, double* x, Scratch scratch) {
  const int64_t n = program.n;
  const double *const a = program.a, *const b = program.b, unit = 4 * static_cast<double>(n) * kEps;
  double *const target = scratch.take(n), *const slope = scratch.take(n), *const size = scratch.take(n);
  uint32_t set = 0, refused = 0;
  int64_t first = 0;
  for (int64_t i = 0; i < n; ++i) {
    x[i] = 0;
    if (a[i * n + i] / 2 + b[i] < a[first * n + first] / 2 + b[first]) first = i;
  }
  if (program.simplex) {
    x[first] = 1;
    set = 1u << first;
  }
  for (int64_t round = 0; round < 40 * n; ++round) {
    // The variable whose growth decreases the objective most, beyond the rounding of the slopes.
    double level = 0, rounding = 0, most = 0;
    for (int64_t i = 0; i < n; ++i) {
      slope[i] = b[i];
      size[i] = fabs(b[i]);
      for (int64_t j = 0; j < n; ++j) {
        slope[i] += a[i * n + j] * x[j];
        size[i] += fabs(a[i * n + j]) * x[j];
      }
      if (program.simplex) {
        level += x[i] * slope[i];
        rounding += x[i] * size[i];
      }
    }
    int64_t added = -1;
    for (int64_t i = 0; i < n; ++i) {
      const double gain = level - slope[i];
      if (contains(set | refused, i) || !(gain > unit * (size[i] + rounding)) || !(gain > most)) continue;
      most = gain;
      added = i;
    }
    if (added < 0) return set;
    const uint32_t larger = set | 1u << added;
    if (!minimise_over(program, larger, target, scratch) || !(target[added] > 0)) {
      refused |= 1u << added;  // it depends on the others, and gains nothing but rounding
      continue;
    }
    refused = 0;
    set = larger;
    // Towards the minimum over the set, as far as no variable becomes negative; one that would leaves the set.
    for (int64_t left = 0; left <= n; ++left) {
      double share = 1;
      int64_t leaving = -1;
      for (int64_t i = 0; i < n; ++i) {
        if (!contains(set, i) || !(target[i] <= 0)) continue;
        const double until = x[i] / (x[i] - target[i]);
        if (leaving >= 0 && !(until < share)) continue;
        share = until;
        leaving = i;
      }
      for (int64_t i = 0; i < n; ++i)
        if (contains(set, i)) x[i] = leaving < 0 ? target[i] : x[i] + share * (target[i] - x[i]);
      if (leaving < 0) break;
      x[leaving] = 0;
      for (int64_t i = 0; i < n; ++i)
        if (!(x[i] > 0)) {
          x[i] = 0;
          set &= ~(1u << i);
        }
      if (!minimise_over(program, set, target, scratch)) break;
    }
  }
  return set;
}

}  // namespace
}  // namespace minbert
