// Matrix products of operands in the caches: C [+]= A B in float32, by tiles whose sums fill the registers.
#pragma once

#include "cpu/simd_shuffle.h"

namespace minbert::MINBERT_ISA {
namespace {

// B is read in panels of two registers. A tile has as many rows as leave registers for a panel and for A.
constexpr int kPanel = 2 * kFloats;
#if defined(__AVX512F__)
constexpr int kTileRows = 12;
#else
constexpr int kTileRows = 6;
#endif

inline int64_t round_up(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

// The left side: row-major, or stored transposed.
struct Left {
  const float* data;
  int64_t stride;
  bool transposed;
};

// The right side: element (k, n) is data[n / kPanel * panel_stride + k * stride + n % kPanel]. A row-major matrix has
// panel_stride = kPanel; packed panels have stride = kPanel.
struct Right {
  const float* data;
  int64_t stride, panel_stride;
};

// Only loops that GCC unrolls this early keep the sums in registers.
#define MINBERT_UNROLL _Pragma("GCC unroll 16")

template <bool transposed, int vectors, int rows>
void tile(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth, float* c, int64_t c_stride,
          bool accumulate) {
  Floats sum[rows][vectors];
  MINBERT_UNROLL for (int i = 0; i < rows; ++i) MINBERT_UNROLL for (int v = 0; v < vectors; ++v) sum[i][v] =
      accumulate ? load<Floats>(c + i * c_stride + v * kFloats) : Floats{};
  for (int64_t k = 0; k < depth; ++k) {
    Floats right[vectors];
    MINBERT_UNROLL for (int v = 0; v < vectors; ++v) right[v] = load<Floats>(b + k * b_stride + v * kFloats);
    MINBERT_UNROLL for (int i = 0; i < rows; ++i) {
      const float left = transposed ? a[k * a_stride + i] : a[i * a_stride + k];
      MINBERT_UNROLL for (int v = 0; v < vectors; ++v) sum[i][v] += left * right[v];
    }
  }
  MINBERT_UNROLL for (int i = 0; i < rows; ++i) MINBERT_UNROLL for (int v = 0; v < vectors; ++v)
      store_raw(c + i * c_stride + v * kFloats, sum[i][v]);
}

#undef MINBERT_UNROLL

using Tile = void(const float*, int64_t, const float*, int64_t, int64_t, float*, int64_t, bool);
template <bool transposed, int vectors, class>
struct TilesOf;
template <bool transposed, int vectors, int... row>
struct TilesOf<transposed, vectors, Lanes<row...>> {
  static constexpr Tile* with_rows[] = {tile<transposed, vectors, row + 1>...};
};
template <bool transposed, int vectors>
using Tiles = TilesOf<transposed, vectors, typename CountTo<kTileRows>::type>;

// C [rows, columns] = A [rows, depth] B [depth, columns], or C += A B where `accumulate`. Columns are rounded up to
// whole registers in B and in C.
void multiply(Left a, Right b, int64_t rows, int64_t depth, int64_t columns, float* c, int64_t c_stride,
              bool accumulate = false) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  for (int64_t column = 0; column < columns; column += kPanel) {
    const bool one = columns - column <= kFloats;
    Tile* const* const with_rows = a.transposed ? (one ? Tiles<true, 1>::with_rows : Tiles<true, 2>::with_rows)
                                                : (one ? Tiles<false, 1>::with_rows : Tiles<false, 2>::with_rows);
    const float* panel = b.data + column / kPanel * b.panel_stride;
    for (int64_t t = 0; t < tiles; ++t) {  // of almost equal height
      const int64_t row = rows * t / tiles, height = rows * (t + 1) / tiles - row;
      with_rows[height - 1](a.data + row * (a.transposed ? 1 : a.stride), a.stride, panel, b.stride, depth,
                            c + row * c_stride + column, c_stride, accumulate);
    }
  }
}

}  // namespace
}  // namespace minbert::MINBERT_ISA
