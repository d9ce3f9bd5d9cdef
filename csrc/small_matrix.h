// Linear algebra of matrices of a few rows, for host and device: one thread, scratch memory of the caller. Matrices are
// row-major. Every loop has a bound that does not depend on the numbers.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace minbert {
namespace {

constexpr double kEps = 2.220446049250313e-16;

// Memory of the caller. A copy gives out the same memory again: a function that takes it by value frees what it took.
struct Scratch {
  double* next;

  MINBERT_HOST_DEVICE double* take(int64_t count) {
    double* const taken = next;
    next += count;
    return taken;
  }
};

// Cholesky: the lower triangle of the symmetric a [n, n] becomes L, a = L L'. Returns false where pivot i is at most
// tolerance scale[i]; then a is destroyed.
inline MINBERT_HOST_DEVICE bool factor(double* a, int64_t n, double tolerance, const double* scale) {
  for (int64_t j = 0; j < n; ++j) {
    double* const row = a + j * n;
    double pivot = row[j];
    for (int64_t k = 0; k < j; ++k) pivot -= row[k] * row[k];
    if (!(pivot > tolerance * scale[j])) return false;
    row[j] = sqrt(pivot);
    for (int64_t i = j + 1; i < n; ++i) {
      double entry = a[i * n + j];
      for (int64_t k = 0; k < j; ++k) entry -= a[i * n + k] * row[k];
      a[i * n + j] = entry / row[j];
    }
  }
  return true;
}

// x becomes the solution y of L L' y = x.
inline MINBERT_HOST_DEVICE void solve(const double* l, int64_t n, double* x) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t k = 0; k < i; ++k) x[i] -= l[i * n + k] * x[k];
    x[i] /= l[i * n + i];
  }
  for (int64_t i = n - 1; i >= 0; --i) {
    for (int64_t k = i + 1; k < n; ++k) x[i] -= l[k * n + i] * x[k];
    x[i] /= l[i * n + i];
  }
}

// x' A x; what cancels to less than 0 counts as 0.
inline MINBERT_HOST_DEVICE double quadratic_form(const double* a, const double* x, int64_t n) {
  double total = 0;
  for (int64_t i = 0; i < n; ++i) {
    double product = 0;
    for (int64_t j = 0; j < n; ++j) product += a[i * n + j] * x[j];
    total += x[i] * product;
  }
  return total < 0 ? 0 : total;
}

// A symmetric matrix by its eigenvalues [n] and eigenvectors, the rows of `vectors` [n, n].
struct Spectrum {
  int64_t n;
  double *values, *vectors;
};
constexpr int64_t spectrum_numbers(int64_t n) { return (2 * n + 1) * n; }

// Cyclic Jacobi iteration (Golub and Van Loan, section 8.5) on a copy of the symmetric a [n, n], until each entry off
// the diagonal is below the rounding of its two diagonal entries: five to ten sweeps.
inline MINBERT_HOST_DEVICE Spectrum eigenvalues(const double* matrix, int64_t n, Scratch& scratch) {
  constexpr int kSweeps = 40;
  const Spectrum found{n, scratch.take(n), scratch.take(n * n)};
  double* const a = scratch.take(n * n);
  for (int64_t i = 0; i < n * n; ++i) {
    a[i] = matrix[i];
    found.vectors[i] = i % (n + 1) == 0;
  }
  bool rotated = true;
  for (int sweep = 0; sweep < kSweeps && rotated; ++sweep) {
    rotated = false;
    for (int64_t p = 0; p < n; ++p)
      for (int64_t q = p + 1; q < n; ++q) {
        const double off = a[p * n + q];
        if (!(fabs(off) > kEps * sqrt(fabs(a[p * n + p])) * sqrt(fabs(a[q * n + q])))) continue;
        rotated = true;
        const double theta = (a[q * n + q] - a[p * n + p]) / (2 * off);
        const double tangent = (theta < 0 ? -1 : 1) / (fabs(theta) + sqrt(theta * theta + 1));
        const double cosine = 1 / sqrt(tangent * tangent + 1), sine = tangent * cosine;
        for (int64_t k = 0; k < n; ++k) {
          const double left = a[p * n + k], right = a[q * n + k];
          if (k != p && k != q) {
            a[p * n + k] = a[k * n + p] = cosine * left - sine * right;
            a[q * n + k] = a[k * n + q] = sine * left + cosine * right;
          }
          double *const v = found.vectors + p * n + k, *const w = found.vectors + q * n + k, before = *v;
          *v = cosine * before - sine * *w;
          *w = sine * before + cosine * *w;
        }
        a[p * n + p] -= tangent * off;
        a[q * n + q] += tangent * off;
        a[p * n + q] = a[q * n + p] = 0;
      }
  }
  for (int64_t k = 0; k < n; ++k) found.values[k] = a[k * n + k];
  return found;
}

// Eigenvalues up to this one count as 0: the largest one's rounding.
inline MINBERT_HOST_DEVICE double rounding_of(const Spectrum& of) {
  double largest = 0;
  for (int64_t k = 0; k < of.n; ++k)
    if (of.values[k] > largest) largest = of.values[k];
  return largest * static_cast<double>(of.n) * kEps;
}

// out = A^-1 b, or A^-1/2 b where `root`: the pseudo-inverse, without the eigenvectors whose eigenvalue counts as 0.
inline MINBERT_HOST_DEVICE void multiply_inverse(const Spectrum& of, bool root, const double* b, double* out) {
  const double least = rounding_of(of);
  for (int64_t i = 0; i < of.n; ++i) out[i] = 0;
  for (int64_t k = 0; k < of.n; ++k) {
    if (!(of.values[k] > least)) continue;
    const double* const vector = of.vectors + k * of.n;
    double along = 0;
    for (int64_t i = 0; i < of.n; ++i) along += vector[i] * b[i];
    along /= root ? sqrt(of.values[k]) : of.values[k];
    for (int64_t i = 0; i < of.n; ++i) out[i] += along * vector[i];
  }
}

}  // namespace
}  // namespace minbert
