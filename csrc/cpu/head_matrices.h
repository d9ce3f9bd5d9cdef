// Conversion of the heads of a tensor to float32 matrices, one per head, and back.
#pragma once

#include "cpu/matmul.h"

namespace minbert::MINBERT_ISA {
namespace {

// The elements of some heads of some tokens: `head_dim`, a multiple of 8, contiguous ones for each.
template <class Element>
struct Heads {
  Element* data;
  int64_t token_stride, head_stride, tokens, heads, head_dim;

  Element* at(int64_t token, int64_t head, int64_t column) const {
    return data + token * token_stride + head * head_stride + column;
  }
};

// How many of the `left` remaining elements of a row the next register holds: all lanes of registers of 8 or fewer.
inline int64_t next_count(int64_t left) { return kFloats <= 8 ? kFloats : smaller(kFloats, left); }

// The rows of to[h], `stride` floats apart, become head h times `factor`, with head_dim rounded up to whole registers.
// Reads token after token, in the order of memory: head after head, the contiguous ranges would be too short for the
// hardware's prefetcher.
template <class Element>
void load_heads(Heads<const Element> from, float factor, float* const* to, int64_t stride) {
  for (int64_t token = 0; token < from.tokens; ++token)
    for (int64_t head = 0; head < from.heads; ++head)
      for (int64_t column = 0; column < from.head_dim; column += kFloats) {
        const Floats v = load_first(from.at(token, head, column), next_count(from.head_dim - column));
        store_raw(to[head] + token * stride + column, v * factor);
      }
}

// The reverse: row i of from[h] times factor(h, i) becomes token i of head h.
template <class Element, class Factor>
void store_heads(const float* const* from, int64_t stride, const Factor& factor, Heads<Element> to) {
  for (int64_t token = 0; token < to.tokens; ++token)
    for (int64_t head = 0; head < to.heads; ++head) {
      const float of_row = factor(head, token);
      for (int64_t column = 0; column < to.head_dim; column += kFloats)
        store_first(to.at(token, head, column), load<Floats>(from[head] + token * stride + column) * of_row,
                    next_count(to.head_dim - column));
    }
}

// Transposes a matrix [rows, columns], with rows `stride` floats apart, into the panels of `Right`, which are
// columns * kPanel floats apart; zeros fill the last register.
void transpose_into_panels(const float* from, int64_t stride, int64_t rows, int64_t columns, float* to) {
  for (int64_t row = 0; row < rows; row += kFloats)
    for (int64_t column = 0; column < columns; column += kFloats) {
      Floats square[kFloats];
      for (int i = 0; i < kFloats; ++i)
        square[i] = row + i < rows ? load<Floats>(from + (row + i) * stride + column) : Floats{};
      transpose(square);
      float* at = to + row / kPanel * kPanel * columns + column * kPanel + row % kPanel;
      for (int i = 0; i < kFloats; ++i)
        if (kFloats <= 8 || column + i < columns) store_raw(at + i * kPanel, square[i]);
    }
}

}  // namespace
}  // namespace minbert::MINBERT_ISA
