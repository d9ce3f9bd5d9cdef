// Matrix products of operands in the caches: C [+]= A B, summed in float32 by tiles whose sums fill the registers.
#pragma once

#include "cpu/simd_shuffle.h"

namespace minbert::MINBERT_ISA {
namespace {

// What the operands consist of: float32, or pairs of bfloat16 that are next to each other along the depth of the
// product. The products of bfloat16 flush subnormal numbers.
struct Pair {
  uint32_t bits;
};
template <class Unit>
constexpr int kDepth = 1;
template <>
constexpr int kDepth<Pair> = 2;

// The unit in which elements are multiplied.
template <class Element>
struct UnitOf {
  using type = float;
};

inline Floats multiply_add(Floats sum, float left, Floats right) { return sum + left * right; }
#if defined(__AVX512BF16__)
template <>
struct UnitOf<BFloat16> {
  using type = Pair;
};
inline Floats multiply_add(Floats sum, Pair left, Floats right) {
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(left.bits), (__m512bh)right);
}
#endif

// B is read in panels of two registers. A tile has as many rows as leave registers for a panel and for A.
constexpr int kPanel = 2 * kFloats;
#if defined(__AVX512F__)
constexpr int kTileRows = 12;
#else
constexpr int kTileRows = 6;
#endif

inline int64_t round_up(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

// The left side: row-major, or stored transposed.
template <class Unit>
struct Left {
  const Unit* data;
  int64_t stride;
  bool transposed;
};

// The right side: unit (k, n) is data[n / kPanel * panel_stride + k * stride + n % kPanel]. A row-major matrix has
// panel_stride = kPanel; packed panels have stride = kPanel.
template <class Unit>
struct Right {
  const Unit* data;
  int64_t stride, panel_stride;
};

// Only loops that GCC unrolls this early keep the sums in registers.
#define MINBERT_UNROLL _Pragma("GCC unroll 16")

template <class Unit, bool transposed, int vectors, int rows>
void tile(const Unit* a, int64_t a_stride, const Unit* b, int64_t b_stride, int64_t depth, float* c, int64_t c_stride,
          bool accumulate) {
  Floats sum[rows][vectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Floats right[vectors];
    MINBERT_UNROLL for (int v = 0; v < vectors; ++v) right[v] = load_raw<Floats>(b + k * b_stride + v * kFloats);
    MINBERT_UNROLL for (int i = 0; i < rows; ++i) {
      const Unit left = transposed ? a[k * a_stride + i] : a[i * a_stride + k];
      MINBERT_UNROLL for (int v = 0; v < vectors; ++v) sum[i][v] = multiply_add(sum[i][v], left, right[v]);
    }
  }
  MINBERT_UNROLL for (int i = 0; i < rows; ++i) MINBERT_UNROLL for (int v = 0; v < vectors; ++v) {
    float* const to = c + i * c_stride + v * kFloats;
    store_raw(to, accumulate ? load<Floats>(to) + sum[i][v] : sum[i][v]);
  }
}
#undef MINBERT_UNROLL

template <class Unit>
using Tile = void(const Unit*, int64_t, const Unit*, int64_t, int64_t, float*, int64_t, bool);
template <class Unit, bool transposed, int vectors, class>
struct TilesOf;
template <class Unit, bool transposed, int vectors, int... row>
struct TilesOf<Unit, transposed, vectors, Lanes<row...>> {
  static constexpr Tile<Unit>* with_rows[] = {tile<Unit, transposed, vectors, row + 1>...};
};
template <class Unit, bool transposed, int vectors>
using Tiles = TilesOf<Unit, transposed, vectors, typename CountTo<kTileRows>::type>;

// The longest chain of additions, in units: sums over more are sums of such sums, whose rounding errors are smaller.
constexpr int64_t kChain = 32;

// C [rows, columns] = A [rows, depth] B [depth, columns], or C += A B where `accumulate`; `depth` counts units. Columns
// are rounded up to whole registers in B and in C.
template <class Unit>
void multiply(Left<Unit> a, Right<Unit> b, int64_t rows, int64_t depth, int64_t columns, float* c, int64_t c_stride,
              bool accumulate = false) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  for (int64_t column = 0; column < columns; column += kPanel) {
    const bool one = columns - column <= kFloats;
    Tile<Unit>* const* const with_rows =
        a.transposed ? (one ? Tiles<Unit, true, 1>::with_rows : Tiles<Unit, true, 2>::with_rows)
                     : (one ? Tiles<Unit, false, 1>::with_rows : Tiles<Unit, false, 2>::with_rows);
    const Unit* panel = b.data + column / kPanel * b.panel_stride;
    for (int64_t t = 0; t < tiles; ++t) {  // of almost equal height
      const int64_t row = rows * t / tiles, height = rows * (t + 1) / tiles - row;
      for (int64_t k = 0; k < depth; k += kChain)
        with_rows[height - 1](a.data + (a.transposed ? k * a.stride + row : row * a.stride + k), a.stride,
                              panel + k * b.stride, b.stride, smaller(kChain, depth - k), c + row * c_stride + column,
                              c_stride, accumulate || k > 0);
    }
  }
}

}  // namespace
}  // namespace minbert::MINBERT_ISA
