// BERT's embedding block: the sum of three table rows, layer norm, dropout.
#include "cpu/dropout.h"
#include "cpu/layer_norm.h"

namespace minbert::MINBERT_ISA {
namespace {

// One token's rows of the three tables, and their sum.
template <class Element>
struct TokenRows {
  const Element* from[3];

  TokenRows(const Embeddings& e, int64_t token, int64_t columns) {
    for (int i = 0; i < 3; ++i) from[i] = static_cast<const Element*>(e.tables[i]) + e.ids[i][token] * columns;
  }

  Floats operator()(int64_t at, int64_t count) const {
    return load_first(from[0] + at, count) + load_first(from[1] + at, count) + load_first(from[2] + at, count);
  }
};

template <bool dropped, bool streamed, class Table, class Element>
void forward_rows(int64_t begin, int64_t end, int64_t columns, const Embeddings& e, const float* weight,
                  const float* bias, float eps, const Dropout& dropout, Element* y, MeanRstd* mean_rstd,
                  const Scratch& scratch) {
  const auto prefetch_inputs = [&](int64_t row, int64_t column) {
    if (row < end) prefetch(TokenRows<Table>(e, row, columns).from[0] + column);
  };
  over_rows<dropped>(
      begin, end, columns, dropout, scratch.multipliers, prefetch_inputs, [&](int64_t row, const float* multipliers) {
        const MeanRstd of_row = mean_and_rstd(columns, eps, scratch.row, TokenRows<Table>(e, row, columns));
        Element* const to = y + row * columns;
        mean_rstd[row] = of_row;
        normalise(columns, of_row, scratch.row, weight, bias, [=](int64_t at, int64_t count, Floats value) {
          store_first(to + at, dropped ? value * load<Floats>(multipliers + at) : value, count, streamed);
        });
      });
  if (streamed) end_streams();
}

template <bool dropped, class Table, class Element>
void backward_rows(int64_t begin, int64_t end, int64_t columns, const Embeddings& e, const Element* d_y,
                   const float* weight, const MeanRstd* mean_rstd, const Dropout& dropout, float* d_total,
                   int64_t first_row, const Scratch& scratch) {
  for (float* sums : scratch.sums) std::memset(sums, 0, padded(columns) * sizeof(float));
  const auto prefetch_inputs = [&](int64_t row, int64_t column) {
    if (row < end) prefetch(TokenRows<Table>(e, row, columns).from[0] + column);
    prefetch(d_y + row * columns + column);
  };
  over_rows<dropped>(begin, end, columns, dropout, scratch.multipliers, prefetch_inputs,
                     [&](int64_t row, const float* multipliers) {
                       const Element* const from = d_y + row * columns;
                       float* const to = d_total + (row - first_row) * columns;
                       normalise_backward(
                           columns, mean_rstd[row], weight, scratch.row, scratch.sums[0], scratch.sums[1],
                           TokenRows<Table>(e, row, columns),
                           [=](int64_t at, int64_t count) {
                             const Floats gradient = load_first(from + at, count);
                             return dropped ? gradient * load<Floats>(multipliers + at) : gradient;
                           },
                           [=](int64_t at, int64_t count, Floats gradient) { store_first(to + at, gradient, count); });
                     });
}

void add_to(float* to, const float* from, int64_t count) {
  along_row(count, [&](int64_t at, int, int64_t left) {
    store_first(to + at, load_first(to + at, left) + load_first(from + at, left), left);
  });
}

// Adds the gradients of tokens [begin, end) to their rows of the three tables' gradients. Each work item owns rows of
// the words' or the positions', or columns of the token types', which are few rows, and visits the tokens in order. So
// no two items write the same element, and the order of every sum is independent of the thread count.
void scatter(int64_t begin, int64_t end, int64_t columns, const int64_t* const (&rows)[3], const float* d_total,
             float* const* d_tables, int threads) {
  constexpr int64_t kItems = 16;  // of each table
  const int64_t width = padded((columns + kItems - 1) / kItems);
  const int64_t work = 6 * (end - begin) * columns * static_cast<int64_t>(sizeof(float));
  parallel(threads, 3 * kItems, work, [&](int64_t index) {
    const int64_t table = index / kItems, item = index % kItems;
    const bool by_column = table == 1;
    const int64_t first = by_column ? item * width : 0, last = by_column ? smaller(columns, first + width) : columns;
    for (int64_t token = begin; token < end; ++token) {
      const int64_t row = rows[table][token];
      if (by_column ? first < last : row % kItems == item)
        add_to(d_tables[table] + row * columns + first, d_total + (token - begin) * columns + first, last - first);
    }
  });
}

}  // namespace

void embedding_forward(Activation a, const Embeddings& e, const float* weight, const float* bias, float eps,
                       Dropout dropout, void* y, MeanRstd* mean_rstd, float* scratch, int threads) noexcept {
  with_rows(a, dropout, y, [&](auto element, auto dropped, auto streamed) {
    with_activation(e.dtype, [&](auto table) {
      over_chunks(threads, 0, a.rows, bytes_of(a) * 3, [&](int64_t chunk, int64_t begin, int64_t end) {
        forward_rows<dropped.kValue, streamed.kValue, decltype(table)>(
            begin, end, a.columns, e, weight, bias, eps, dropout, static_cast<decltype(element)*>(y), mean_rstd,
            scratch_of(scratch, chunk, a.columns));
      });
    });
  });
}

void embedding_backward(Activation a, const Embeddings& e, const int64_t* word_rows, const void* d_y,
                        const float* weight, const MeanRstd* mean_rstd, Dropout dropout, float* d_total,
                        float* const* d_tables, float* d_weight, float* d_bias, float* scratch, int threads) noexcept {
  const int64_t* const table_rows[] = {word_rows, e.ids[1], e.ids[2]};
  for (int64_t first = 0; first < a.rows; first += kEmbeddingRows) {
    const int64_t last = smaller(a.rows, first + kEmbeddingRows);
    with_rows(a, dropout, nullptr, [&](auto element, auto dropped, auto) {
      with_activation(e.dtype, [&](auto table) {
        over_chunks(threads, first, last, bytes_of(a) / a.rows * (last - first) * 5,
                    [&](int64_t chunk, int64_t begin, int64_t end) {
                      backward_rows<dropped.kValue, decltype(table)>(
                          begin, end, a.columns, e, static_cast<const decltype(element)*>(d_y), weight, mean_rstd,
                          dropout, d_total, first, scratch_of(scratch, chunk, a.columns));
                    });
      });
    });
    scatter(first, last, a.columns, table_rows, d_total, d_tables, threads);
  }
  add_chunks<2>(threads, a.rows, a.columns, scratch, {d_weight, d_bias});
}

}  // namespace minbert::MINBERT_ISA
