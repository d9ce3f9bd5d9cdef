// Heads of a tensor into packed float32 matrices, one per head, and back.
#pragma once

#include "cpu/product.h"

namespace minbert::MINBERT_ISA {
namespace {

// Some tokens' elements of some heads: `head_dim`, a multiple of 8, next to each other for each.
template <class Element>
struct Heads {
  Element* data;
  int64_t token_stride, head_stride, tokens, heads, head_dim;

  Element* at(int64_t token, int64_t head, int64_t column) const {
    return data + token * token_stride + head * head_stride + column;
  }
};

// A register's worth of a row of which `left` elements remain; zeros stand for what is missing.
template <class Element>
inline Floats load_row(const Element* from, int64_t left) {
  if (kFloats <= 8 || left >= kFloats) return load<Floats>(from);
  Element padded[kFloats] = {};
  std::memcpy(padded, from, left * sizeof(Element));
  return load<Floats>(padded);
}

template <class Element>
inline void store_row(Element* to, int64_t left, Floats v) {
  const auto stored = narrow(v, Element{});
  if (kFloats <= 8 || left >= kFloats)
    std::memcpy(to, &stored, sizeof(stored));
  else
    std::memcpy(to, &stored, left * sizeof(Element));
}

// Head h times `factor` to the rows of to[h], of `stride` floats, head_dim rounded up to whole registers. Memory is
// read in its order, token after token: head after head, it would come in pieces too short for the hardware to fetch
// ahead.
template <class Element>
void pack(Heads<const Element> from, float factor, float* const* to, int64_t stride) {
  for (int64_t token = 0; token < from.tokens; ++token)
    for (int64_t head = 0; head < from.heads; ++head)
      for (int64_t column = 0; column < from.head_dim; column += kFloats) {
        const Floats v = load_row(from.at(token, head, column), from.head_dim - column) * factor;
        std::memcpy(to[head] + token * stride + column, &v, sizeof(v));
      }
}

// The other way: row i of from[h] times factor(h, i).
template <class Element, class Factor>
void unpack(const float* const* from, int64_t stride, const Factor& factor, Heads<Element> to) {
  for (int64_t token = 0; token < to.tokens; ++token)
    for (int64_t head = 0; head < to.heads; ++head) {
      const float of_row = factor(head, token);
      for (int64_t column = 0; column < to.head_dim; column += kFloats)
        store_row(to.at(token, head, column), to.head_dim - column,
                  load<Floats>(from[head] + token * stride + column) * of_row);
    }
}

// A packed matrix [rows, columns], of rows of `stride` floats, transposed into the panels of `Right`, which are
// columns * kPanel floats apart; zeros fill up the last register.
void transpose_into_panels(const float* from, int64_t stride, int64_t rows, int64_t columns, float* to) {
  for (int64_t row = 0; row < rows; row += kFloats)
    for (int64_t column = 0; column < columns; column += kFloats) {
      Floats square[kFloats];
      for (int i = 0; i < kFloats; ++i)
        square[i] = row + i < rows ? load<Floats>(from + (row + i) * stride + column) : Floats{};
      transpose(square);
      float* at = to + row / kPanel * kPanel * columns + column * kPanel + row % kPanel;
      for (int i = 0; i < kFloats; ++i)
        if (kFloats <= 8 || column + i < columns) std::memcpy(at + i * kPanel, &square[i], sizeof(Floats));
    }
}

}  // namespace
}  // namespace minbert::MINBERT_ISA
