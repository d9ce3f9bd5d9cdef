// Dropout, residual and layer norm; and dropout alone.
#include "cpu/layer_norm.h"

#include "cpu/dropout.h"

namespace minbert::MINBERT_ISA {
namespace {

// One row of residual + dropout(x). An object, as the lambdas below that capture by value: the compiler would assume
// that every store changes variables captured by reference.
template <bool dropped, class Element>
struct TotalOf {
  const Element *x, *residual;
  const float* multipliers;

  Floats operator()(int64_t at, int64_t count) const {
    const Floats value = load_first(x + at, count), rest = load_first(residual + at, count);
    return dropped ? rest + value * load<Floats>(multipliers + at) : rest + value;
  }
};

template <bool dropped, bool streamed, class Element>
void forward_rows(int64_t begin, int64_t end, int64_t columns, const Element* x, const Element* residual,
                  const float* weight, const float* bias, float eps, const Dropout& dropout, Element* y,
                  MeanRstd* mean_rstd, const Scratch& scratch) {
  const auto prefetch_inputs = [&](int64_t row, int64_t column) {
    prefetch(x + row * columns + column);
    prefetch(residual + row * columns + column);
  };
  over_rows<dropped>(
      begin, end, columns, dropout, scratch.multipliers, prefetch_inputs, [&](int64_t row, const float* multipliers) {
        const TotalOf<dropped, Element> total{x + row * columns, residual + row * columns, multipliers};
        Element* const to = y + row * columns;
        const MeanRstd of_row = mean_and_rstd(columns, eps, scratch.row, total);
        mean_rstd[row] = of_row;
        normalise(columns, of_row, scratch.row, weight, bias,
                  [=](int64_t at, int64_t count, Floats value) { store_first(to + at, value, count, streamed); });
      });
  if (streamed) end_streams();
}

template <bool dropped, bool streamed, class Element>
void backward_rows(int64_t begin, int64_t end, int64_t columns, const Element* d_y, const Element* x,
                   const Element* residual, const float* weight, const MeanRstd* mean_rstd, const Dropout& dropout,
                   Element* d_x, Element* d_residual, const Scratch& scratch) {
  for (float* sums : scratch.sums) std::memset(sums, 0, padded(columns) * sizeof(float));
  const auto prefetch_inputs = [&](int64_t row, int64_t column) {
    prefetch(x + row * columns + column);
    prefetch(residual + row * columns + column);
    prefetch(d_y + row * columns + column);
  };
  over_rows<dropped>(
      begin, end, columns, dropout, scratch.multipliers, prefetch_inputs, [&](int64_t row, const float* multipliers) {
        const TotalOf<dropped, Element> total{x + row * columns, residual + row * columns, multipliers};
        const Element* const from = d_y + row * columns;
        Element *const to = d_residual + row * columns, *const to_x = dropped ? d_x + row * columns : nullptr;
        normalise_backward(
            columns, mean_rstd[row], weight, scratch.row, scratch.sums[0], scratch.sums[1], total,
            [=](int64_t at, int64_t count) { return load_first(from + at, count); },
            [=](int64_t at, int64_t count, Floats gradient) {
              store_first(to + at, gradient, count, streamed);
              if (dropped) store_first(to_x + at, gradient * load<Floats>(multipliers + at), count, streamed);
            });
      });
  if (streamed) end_streams();
}

}  // namespace

void dropout_forward(Activation a, const void* x, void* y, Dropout dropout, float* scratch, int threads) noexcept {
  with_activation(a.dtype, [&](auto element) {
    using Element = decltype(element);
    over_chunks(threads, 0, a.rows, bytes_of(a) * 2, [&](int64_t chunk, int64_t begin, int64_t end) {
      float* space = scratch_of(scratch, chunk, a.columns).multipliers;
      const auto prefetch_inputs = [&](int64_t row, int64_t column) {
        prefetch(static_cast<const Element*>(x) + row * a.columns + column);
      };
      over_rows<true>(begin, end, a.columns, dropout, space, prefetch_inputs,
                      [&](int64_t row, const float* multipliers) {
                        const Element* const from = static_cast<const Element*>(x) + row * a.columns;
                        Element* const to = static_cast<Element*>(y) + row * a.columns;
                        along_row(a.columns, [=](int64_t at, int, int64_t count) {
                          store_first(to + at, load_first(from + at, count) * load<Floats>(multipliers + at), count);
                        });
                      });
    });
  });
}

void layer_norm_forward(Activation a, const void* x, const void* residual, const float* weight, const float* bias,
                        float eps, Dropout dropout, void* y, MeanRstd* mean_rstd, float* scratch,
                        int threads) noexcept {
  with_rows(a, dropout, y, [&](auto element, auto dropped, auto streamed) {
    using Element = decltype(element);
    over_chunks(threads, 0, a.rows, bytes_of(a) * 3, [&](int64_t chunk, int64_t begin, int64_t end) {
      forward_rows<dropped.kValue, streamed.kValue>(
          begin, end, a.columns, static_cast<const Element*>(x), static_cast<const Element*>(residual), weight, bias,
          eps, dropout, static_cast<Element*>(y), mean_rstd, scratch_of(scratch, chunk, a.columns));
    });
  });
}

void layer_norm_backward(Activation a, const void* d_y, const void* x, const void* residual, const float* weight,
                         const MeanRstd* mean_rstd, Dropout dropout, void* d_x, void* d_residual, float* d_weight,
                         float* d_bias, float* scratch, int threads) noexcept {
  with_rows(a, dropout, d_residual, [&](auto element, auto dropped, auto streamed) {
    using Element = decltype(element);
    over_chunks(threads, 0, a.rows, bytes_of(a) * 5, [&](int64_t chunk, int64_t begin, int64_t end) {
      backward_rows<dropped.kValue, streamed.kValue>(
          begin, end, a.columns, static_cast<const Element*>(d_y), static_cast<const Element*>(x),
          static_cast<const Element*>(residual), weight, mean_rstd, dropout, static_cast<Element*>(d_x),
          static_cast<Element*>(d_residual), scratch_of(scratch, chunk, a.columns));
    });
  });
  add_chunks<2>(threads, a.rows, a.columns, scratch, {d_weight, d_bias});
}

}  // namespace minbert::MINBERT_ISA
