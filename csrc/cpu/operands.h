// The matrix of one head in a tensor, as the operands of products, and the results of products back into a tensor.
#pragma once

#include "cpu/matmul.h"

namespace minbert::MINBERT_ISA {
namespace {

// The elements of one head of some tokens: `head_dim`, a multiple of 8, contiguous ones for each.
template <class Element>
struct Head {
  Element* data;
  int64_t stride, tokens, head_dim;

  Element* at(int64_t token, int64_t column) const { return data + token * stride + column; }
};

// How many units a row of `head_dim` elements takes, in whole registers. Rows of pairs fill them.
template <class Unit>
int64_t row_units(int64_t head_dim) {
  return round_up(head_dim / kDepth<Unit>, kFloats);
}

// How many of the `left` remaining elements of a row the next register holds: all lanes of registers of 8 or fewer.
inline int64_t next_count(int64_t left) { return kFloats <= 8 ? kFloats : smaller(kFloats, left); }

// One register of units from a row of which `left` elements remain.
template <class Unit, class Element>
inline Floats load_units(const Element* from, int64_t left) {
  if constexpr (kDepth<Unit> == 1)
    return load_first(from, next_count(left));
  else
    return load_raw<Floats>(from);
}

// The head's rows.
template <class Unit, class Element>
void load_rows(Head<const Element> from, Unit* to) {
  const int64_t stride = row_units<Unit>(from.head_dim);
  for (int64_t token = 0; token < from.tokens; ++token)
    for (int64_t unit = 0; unit < stride; unit += kFloats) {
      const int64_t column = unit * kDepth<Unit>;
      store_raw(to + token * stride + unit, load_units<Unit>(from.at(token, column), from.head_dim - column));
    }
}

// The head's rows as the left side of a product: copied to `buffer`, or where they are if `in_place` and if they
// consist of units.
template <class Unit, class Element>
Left<Unit> rows_on_the_left(Head<const Element> from, Unit* buffer, bool in_place) {
  if constexpr (sizeof(Unit) == kDepth<Unit> * sizeof(Element))
    if (in_place && from.stride % kDepth<Unit> == 0)
      return {reinterpret_cast<const Unit*>(from.data), from.stride / kDepth<Unit>, false};
  load_rows(from, buffer);
  return {buffer, row_units<Unit>(from.head_dim), false};
}

// The transpose of the head's rows, in panels of `Right`; zeros fill the last register of tokens.
template <class Unit, class Element>
void load_transposed(Head<const Element> from, Unit* to) {
  const int64_t units = from.head_dim / kDepth<Unit>;
  for (int64_t token = 0; token < from.tokens; token += kFloats)
    for (int64_t unit = 0; unit < units; unit += kFloats) {
      const int64_t column = unit * kDepth<Unit>;
      Floats square[kFloats];
      for (int i = 0; i < kFloats; ++i)
        square[i] =
            token + i < from.tokens ? load_units<Unit>(from.at(token + i, column), from.head_dim - column) : Floats{};
      transpose(square);
      Unit* const at = to + token / kPanel * kPanel * units + unit * kPanel + token % kPanel;
      for (int i = 0; i < kFloats; ++i)
        if (kFloats <= 8 || unit + i < units) store_raw(at + i * kPanel, square[i]);
    }
}

// The head's rows as the right side of a product whose depth is the tokens: rows of float32, where they are if
// `in_place` and if they fill registers, or pairs of bfloat16 of two tokens, with zeros after the last one.
template <class Element>
Right<float> rows_on_the_right(Head<const Element> from, float* buffer, bool in_place) {
  if constexpr (sizeof(Element) == sizeof(float))
    if (in_place && from.head_dim % kFloats == 0) return {from.data, from.stride, kPanel};
  load_rows(from, buffer);
  return {buffer, row_units<float>(from.head_dim), kPanel};
}
template <class Element>
Right<Pair> rows_on_the_right(Head<const Element> from, Pair* buffer, bool) {
  const int64_t stride = from.head_dim;
  for (int64_t token = 0; token < from.tokens; token += 2)
    for (int64_t column = 0; column < from.head_dim; column += kFloats) {
      const Floats even = load<Floats>(from.at(token, column));
      const Floats odd = token + 1 < from.tokens ? load<Floats>(from.at(token + 1, column)) : Floats{};
      store_raw(buffer + token / 2 * stride + column, (Bits)even >> 16 | (Bits)odd);
    }
  return {buffer, stride, kPanel};
}

}  // namespace
}  // namespace minbert::MINBERT_ISA
