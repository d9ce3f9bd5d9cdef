// What a weighting rule reads and writes for one part of the model, for host and device.
#pragma once

#include "kernels.h"
#include "pcgrad.h"
#include "small_matrix.h"

namespace minbert {
namespace {

struct WeightingPart {
  int64_t tasks;
  const double* gram;    // [T, T] as it came
  double trace;          // of it
  const double* scaled;  // gram / trace, where the trace is above 0
  const double *options, *losses, *noise;
  const int64_t* orders;
  double *state, *weights;

  MINBERT_HOST_DEVICE double square(int64_t i) const { return scaled[i * tasks + i]; }  // |g_i|^2 / trace
};

// The softmax of x [n].
inline MINBERT_HOST_DEVICE void softmax(const double* x, int64_t n, double* out) {
  double largest = x[0], total = 0;
  for (int64_t i = 1; i < n; ++i)
    if (x[i] > largest) largest = x[i];
  for (int64_t i = 0; i < n; ++i) total += out[i] = exp(x[i] - largest);
  for (int64_t i = 0; i < n; ++i) out[i] /= total;
}

}  // namespace
}  // namespace minbert
