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

// Writes the first `count` elements of a register, which are all of them where registers hold 8 or fewer.
template <class Element>
inline void store_result(Element* to, Floats v, int64_t count) {
  const auto result = converted(v, Element{});
#if defined(__AVX512F__)
  if (count >= kFloats) return store_raw(to, result);
  const __mmask16 lanes = (1u << count) - 1;
  if constexpr (sizeof(Element) == 4)
    _mm512_mask_storeu_ps(to, lanes, (__m512)result);
  else
    _mm256_mask_storeu_epi16(to, lanes, (__m256i)result);
#else
  (void)count;
  store_raw(to, result);
#endif
}

// Where the sums of a product go: into `sums`, or where there is a result into that, each row times its factor.
template <class Element>
struct Output {
  float* sums;  // [rows, stride]; also holds the parts of sums
  int64_t stride;
  Element* result = nullptr;  // [rows, result_stride]
  int64_t result_stride = 0;
  const float* factors = nullptr;  // of row i: factors[i * factor_stride]
  int64_t factor_stride = 0;

  Output at(int64_t row, int64_t column) const {
    return {sums + row * stride + column,
            stride,
            result ? result + row * result_stride + column : nullptr,
            result_stride,
            factors + row * factor_stride,
            factor_stride};
  }
};

// `columns`: of the result, at most those of the tile. accumulate: onto the sums so far; finish: the result is due.
template <class Unit, class Element, bool transposed, int vectors, int rows>
void tile(const Unit* a, int64_t a_stride, const Unit* b, int64_t b_stride, int64_t depth, const Output<Element>& to,
          int64_t columns, bool accumulate, bool finish) {
  Floats sum[rows][vectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Floats right[vectors];
    MINBERT_UNROLL for (int v = 0; v < vectors; ++v) right[v] = load_raw<Floats>(b + k * b_stride + v * kFloats);
    MINBERT_UNROLL for (int i = 0; i < rows; ++i) {
      const Unit left = transposed ? a[k * a_stride + i] : a[i * a_stride + k];
      MINBERT_UNROLL for (int v = 0; v < vectors; ++v) sum[i][v] = multiply_add(sum[i][v], left, right[v]);
    }
  }
  float* const sums = to.sums;
  if (accumulate)
    MINBERT_UNROLL for (int i = 0; i < rows; ++i) MINBERT_UNROLL for (int v = 0; v < vectors; ++v) sum[i][v] +=
        load<Floats>(sums + i * to.stride + v * kFloats);
  if (finish)
    MINBERT_UNROLL for (int i = 0; i < rows; ++i) MINBERT_UNROLL for (int v = 0; v < vectors; ++v)
        store_result(to.result + i * to.result_stride + v * kFloats, sum[i][v] * to.factors[i * to.factor_stride],
                     columns - v * kFloats);
  else
    MINBERT_UNROLL for (int i = 0; i < rows; ++i) MINBERT_UNROLL for (int v = 0; v < vectors; ++v)
        store_raw(sums + i * to.stride + v * kFloats, sum[i][v]);
}
#undef MINBERT_UNROLL

template <class Unit, class Element>
using Tile = void(const Unit*, int64_t, const Unit*, int64_t, int64_t, const Output<Element>&, int64_t, bool, bool);
template <class Unit, class Element, bool transposed, int vectors, class>
struct TilesOf;
template <class Unit, class Element, bool transposed, int vectors, int... row>
struct TilesOf<Unit, Element, transposed, vectors, Lanes<row...>> {
  static constexpr Tile<Unit, Element>* with_rows[] = {tile<Unit, Element, transposed, vectors, row + 1>...};
};
template <class Unit, class Element, bool transposed, int vectors>
using Tiles = TilesOf<Unit, Element, transposed, vectors, typename CountTo<kTileRows>::type>;

// The longest chain of additions, in units: sums over more are sums of such sums, whose rounding errors are smaller.
constexpr int64_t kChain = 32;

inline int64_t tiles(int64_t rows, int64_t columns) {
  return (rows + kTileRows - 1) / kTileRows * ((columns + kPanel - 1) / kPanel);
}

// A [rows, depth] times B [depth, columns], added to the sums in `to` where `accumulate`; `depth` counts units. Columns
// are rounded up to whole registers in B and in the sums. Calls between() before each tile.
template <class Unit, class Element, class Between>
void multiply(Left<Unit> a, Right<Unit> b, int64_t rows, int64_t depth, int64_t columns, const Output<Element>& to,
              bool accumulate, const Between& between) {
  const int64_t below = tiles(rows, 1);
  for (int64_t column = 0; column < columns; column += kPanel) {
    const bool one = columns - column <= kFloats;
    Tile<Unit, Element>* const* const with_rows =
        a.transposed ? (one ? Tiles<Unit, Element, true, 1>::with_rows : Tiles<Unit, Element, true, 2>::with_rows)
                     : (one ? Tiles<Unit, Element, false, 1>::with_rows : Tiles<Unit, Element, false, 2>::with_rows);
    const Unit* panel = b.data + column / kPanel * b.panel_stride;
    for (int64_t t = 0; t < below; ++t) {  // of almost equal height
      between();
      const int64_t row = rows * t / below, height = rows * (t + 1) / below - row;
      const Output<Element> of_tile = to.at(row, column);
      for (int64_t k = 0; k < depth; k += kChain)
        with_rows[height - 1](a.data + (a.transposed ? k * a.stride + row : row * a.stride + k), a.stride,
                              panel + k * b.stride, b.stride, smaller(kChain, depth - k), of_tile, columns - column,
                              accumulate || k > 0, of_tile.result && k + kChain >= depth);
    }
  }
}

}  // namespace
}  // namespace minbert::MINBERT_ISA
