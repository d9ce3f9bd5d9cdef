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

// The head's rows as the right side of a product whose depth is the tokens: rows of float32, or pairs of bfloat16 of
// two tokens, with zeros after the last one.
template <class Unit, class Element>
void load_right(Head<const Element> from, Unit* to) {
  if constexpr (kDepth<Unit> == 1) return load_rows(from, to);
  const int64_t stride = from.head_dim;
  for (int64_t token = 0; token < from.tokens; token += 2)
    for (int64_t column = 0; column < from.head_dim; column += kFloats) {
      const Floats even = load<Floats>(from.at(token, column));
      const Floats odd = token + 1 < from.tokens ? load<Floats>(from.at(token + 1, column)) : Floats{};
      store_raw(to + token / 2 * stride + column, (Bits)even >> 16 | (Bits)odd);
    }
}

// The elements of a register as a result: bfloat16 by the processor's conversion, where it has one.
inline Floats converted(Floats v, float) { return v; }
inline Vector<uint16_t, kFloats> converted(Floats v, BFloat16 element) {
#if defined(__AVX512BF16__)
  (void)element;
  return (Vector<uint16_t, kFloats>)_mm512_cvtneps_pbh((__m512)v);
#else
  return narrow(v, element);
#endif
}

// The reverse: row i of `from`, `stride` floats apart, times factor(i) becomes the row of token i.
template <class Element, class Factor>
void store_rows(const float* from, int64_t stride, const Factor& factor, Head<Element> to) {
  for (int64_t token = 0; token < to.tokens; ++token) {
    const float of_row = factor(token);
    for (int64_t column = 0; column < to.head_dim; column += kFloats) {
      const auto v = converted(load<Floats>(from + token * stride + column) * of_row, Element{});
      const int64_t count = next_count(to.head_dim - column);
      if (count == kFloats)
        store_raw(to.at(token, column), v);
      else
        std::memcpy(to.at(token, column), &v, count * sizeof(Element));
    }
  }
}

}  // namespace
}  // namespace minbert::MINBERT_ISA
