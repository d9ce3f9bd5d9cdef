// Layer norm of one row (Ba et al. 2016), forward and backward, for any source of the row.
#pragma once

#include "cpu/rowwise.h"

namespace minbert::MINBERT_ISA {
namespace {

// read(at, count) gives the row, with zeros after `count`. Stores the row to `kept` (padded).
template <class Read>
MeanRstd mean_and_rstd(int64_t columns, float eps, float* kept, const Read& read) {
  const float inverse = 1.0f / static_cast<float>(columns);
  Floats sums[kSlots] = {}, squares[kSlots] = {};
  along_row(columns, [&](int64_t at, int slot, int64_t count) {
    const Floats value = read(at, count);
    store_raw(kept + at, value);
    sums[slot] += value;
  });
  const float mean = sum_of(sums) * inverse;
  along_row(columns, [&](int64_t at, int slot, int64_t count) {
    const Floats centred = load<Floats>(kept + at) - mean;
    squares[slot] += count == kFloats ? centred * centred : zero_after(centred * centred, count);
  });
  return {mean, 1.0f / __builtin_sqrtf(sum_of(squares) * inverse + eps)};
}

// write(at, count, value) receives weight * (row - mean) * rstd + bias.
template <class Write>
void normalise(int64_t columns, MeanRstd row, const float* kept, const float* weight, const float* bias,
               const Write& write) {
  along_row(columns, [&](int64_t at, int, int64_t count) {
    const Floats x = (load<Floats>(kept + at) - row.mean) * row.rstd;
    write(at, count, x * load_first(weight + at, count) + load_first(bias + at, count));
  });
}

// The backward, from the row and the gradient d_y of its layer norm, both with zeros after `count`. write(at, count,
// d_x) receives the gradient of the row; the gradients of weight and bias are added to d_weight and d_bias (padded).
// `x` (padded) is scratch.
template <class Read, class ReadGradient, class Write>
void normalise_backward(int64_t columns, MeanRstd row, const float* weight, float* x, float* d_weight, float* d_bias,
                        const Read& read, const ReadGradient& read_gradient, const Write& write) {
  const float inverse = 1.0f / static_cast<float>(columns);
  Floats sums[kSlots] = {}, products[kSlots] = {};
  along_row(columns, [&](int64_t at, int slot, int64_t count) {
    const Floats value = (read(at, count) - row.mean) * row.rstd, d_y = read_gradient(at, count);
    store_raw(x + at, value);
    store_raw(d_weight + at, load<Floats>(d_weight + at) + d_y * value);
    store_raw(d_bias + at, load<Floats>(d_bias + at) + d_y);
    const Floats g = d_y * load_first(weight + at, count);
    sums[slot] += g;
    products[slot] += g * value;
  });
  const float mean_of_g = sum_of(sums) * inverse, mean_of_gx = sum_of(products) * inverse;
  along_row(columns, [&](int64_t at, int, int64_t count) {
    const Floats g = read_gradient(at, count) * load_first(weight + at, count);
    write(at, count, (g - mean_of_g - load<Floats>(x + at) * mean_of_gx) * row.rstd);
  });
}

}  // namespace
}  // namespace minbert::MINBERT_ISA
