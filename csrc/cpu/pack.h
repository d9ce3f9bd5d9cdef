// Rows of tensors into packed float32 matrices, and back.
#pragma once

#include "cpu/product.h"

namespace minbert::MINBERT_ISA {
namespace {

// Rows of `columns` elements, a multiple of 8, each `stride` elements after the one before.
template <class Element>
struct Rows {
  Element* data;
  int64_t stride, count, columns;
};

// The elements of a row from `column` on, followed by zeros where the row ends within the register.
template <class Element>
inline Floats load_columns(Rows<const Element> from, int64_t row, int64_t column) {
  const Element* at = from.data + row * from.stride + column;
  if (kFloats <= 8 || from.columns - column >= kFloats) return load<Floats>(at);
  Element padded[kFloats] = {};
  std::memcpy(padded, at, (from.columns - column) * sizeof(Element));
  return load<Floats>(padded);
}

template <class Element>
inline void store_columns(Rows<Element> to, int64_t row, int64_t column, Floats v) {
  const auto stored = narrow(v, Element{});
  Element* at = to.data + row * to.stride + column;
  if (kFloats <= 8 || to.columns - column >= kFloats)
    std::memcpy(at, &stored, sizeof(stored));
  else
    std::memcpy(at, &stored, (to.columns - column) * sizeof(Element));
}

// The rows times `factor`, each `stride` floats after the one before; columns are rounded up to whole registers.
template <class Element>
void pack(Rows<const Element> from, float factor, float* to, int64_t stride) {
  for (int64_t row = 0; row < from.count; ++row)
    for (int64_t column = 0; column < from.columns; column += kFloats) {
      const Floats v = load_columns(from, row, column) * factor;
      std::memcpy(to + row * stride + column, &v, sizeof(v));
    }
}

// The transposed matrix in the panels of `Right`, of panel_stride columns * kPanel: zeros fill the last register.
template <class Element>
void pack_transposed(Rows<const Element> from, float* to) {
  for (int64_t row = 0; row < from.count; row += kFloats)
    for (int64_t column = 0; column < from.columns; column += kFloats) {
      Floats square[kFloats];
      for (int i = 0; i < kFloats; ++i)
        square[i] = row + i < from.count ? load_columns(from, row + i, column) : Floats{};
      transpose(square);
      float* at = to + row / kPanel * kPanel * from.columns + column * kPanel + row % kPanel;
      for (int i = 0; i < kFloats; ++i)
        if (kFloats <= 8 || column + i < from.columns) std::memcpy(at + i * kPanel, &square[i], sizeof(Floats));
    }
}

// Row i of the matrix times factor(i).
template <class Element, class Factor>
void unpack(const float* from, int64_t stride, const Factor& factor, Rows<Element> to) {
  for (int64_t row = 0; row < to.count; ++row) {
    const float of_row = factor(row);
    for (int64_t column = 0; column < to.columns; column += kFloats)
      store_columns(to, row, column, load<Floats>(from + row * stride + column) * of_row);
  }
}

}  // namespace
}  // namespace minbert::MINBERT_ISA
