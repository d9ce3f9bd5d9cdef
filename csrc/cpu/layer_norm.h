// Layer norm of one row (Ba et al. 2016), whatever it is the layer norm of.
#pragma once

#include "cpu/rows.h"
#include "row_math.h"

namespace minbert::MINBERT_ISA {
namespace {

// read(at, count) gives the row, with zeros after `count`; `kept` (padded) receives it.
template <class Read>
Moments moments_of(int64_t columns, float eps, float* kept, const Read& read) {
  const float share = 1.0f / static_cast<float>(columns);
  Floats sums[kSlots] = {}, squares[kSlots] = {};
  along_row(columns, [&](int64_t at, int slot, int64_t count) {
    const Floats value = read(at, count);
    store_raw(kept + at, value);
    sums[slot] += value;
  });
  const float mean = sum_of(sums) * share;
  along_row(columns, [&](int64_t at, int slot, int64_t count) {
    const Floats centred = load<Floats>(kept + at) - mean;
    squares[slot] += count == kFloats ? centred * centred : zero_after(centred * centred, count);
  });
  return {mean, 1.0f / __builtin_sqrtf(sum_of(squares) * share + eps)};
}

// write(at, count, value) takes weight * normalised + bias.
template <class Write>
void normalise(int64_t columns, Moments row, const float* kept, const float* weight, const float* bias,
               const Write& write) {
  along_row(columns, [&](int64_t at, int, int64_t count) {
    const Floats x = normalised(load<Floats>(kept + at), row.mean, row.rstd);
    write(at, count, x * load_first(weight + at, count) + load_first(bias + at, count));
  });
}

// From the row and the gradient of its layer norm, both with zeros after `count`: write(at, count, gradient of the
// row), and what the row adds to d_weight and d_bias (padded). `x` (padded) is scratch.
template <class Read, class ReadGradient, class Write>
void normalise_backward(int64_t columns, Moments row, const float* weight, float* x, float* d_weight, float* d_bias,
                        const Read& read, const ReadGradient& read_gradient, const Write& write) {
  const float share = 1.0f / static_cast<float>(columns);
  Floats sums[kSlots] = {}, products[kSlots] = {};
  along_row(columns, [&](int64_t at, int slot, int64_t count) {
    const Floats value = normalised(read(at, count), row.mean, row.rstd), d_y = read_gradient(at, count);
    store_raw(x + at, value);
    store_raw(d_weight + at, load<Floats>(d_weight + at) + d_y * value);
    store_raw(d_bias + at, load<Floats>(d_bias + at) + d_y);
    const Floats g = d_y * load_first(weight + at, count);
    sums[slot] += g;
    products[slot] += g * value;
  });
  const float mean_of_g = sum_of(sums) * share, mean_of_gx = sum_of(products) * share;
  along_row(columns, [&](int64_t at, int, int64_t count) {
    const Floats g = read_gradient(at, count) * load_first(weight + at, count);
    write(at, count, normalised_backward(g, load<Floats>(x + at), mean_of_g, mean_of_gx, row.rstd));
  });
}

}  // namespace
}  // namespace minbert::MINBERT_ISA
