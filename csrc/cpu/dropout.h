// Dropout's multipliers: the scale for a kept element, 0 for a dropped one.
#pragma once

#include "cpu/philox_simd.h"
#include "cpu/rowwise.h"

namespace minbert::MINBERT_ISA {
namespace {

// In each lane: the low half of `low`, then the low half of `high`.
inline Words halves(Words low, Words high) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return (Words)_mm256_blend_epi32((__m256i)low, (__m256i)(high << 32), 0b10101010);
#else
  return (low & 0xFFFFFFFFu) | (high << 32);
#endif
}

// The even lanes of both registers in turns; and the odd ones.
inline Words even_lanes(Words a, Words b) {
#if defined(__AVX512F__)
  return (Words)_mm512_unpacklo_epi64((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Words)_mm256_unpacklo_epi64((__m256i)a, (__m256i)b);
#else
  return Words{a[0], b[0]};
#endif
}
inline Words odd_lanes(Words a, Words b) {
#if defined(__AVX512F__)
  return (Words)_mm512_unpackhi_epi64((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Words)_mm256_unpackhi_epi64((__m256i)a, (__m256i)b);
#else
  return Words{a[1], b[1]};
#endif
}

// The multipliers of 4 * kCounters elements, from the words of their counters, even lanes first.
inline void store_multipliers(float* to, const Words* word, const Dropout& dropout) {
  const Words first = halves(word[0], word[1]), second = halves(word[2], word[3]);
  const Bits scale = (Bits)(Floats{} + dropout.scale);
  const Bits words[] = {(Bits)even_lanes(first, second), (Bits)odd_lanes(first, second)};
  for (int i = 0; i < 2; ++i) store_raw(to + i * kFloats, (Floats)((Bits)(words[i] >= dropout.threshold) & scale));
}

// Calls body(row, multipliers) for the rows [begin, end); without dropout the multipliers are null. `space` is
// [kRowsAtOnce, padded(columns)]. Computing the multipliers leaves memory idle: prefetch_inputs(row, column) loads
// body's inputs into the cache meanwhile.
template <bool dropped, class Prefetch, class Body>
void over_rows(int64_t begin, int64_t end, int64_t columns, const Dropout& dropout, float* space,
               const Prefetch& prefetch_inputs, const Body& body) {
  static_assert(kRowsAtOnce <= kScratchRows - 3, "the multipliers must fit into a chunk's scratch memory");
  static_assert(kPadding % (4 * kCounters) == 0, "multipliers are computed in whole registers");
  const Keys keys(dropout.seed);
  const int64_t width = padded(columns);
  for (int64_t first = begin; first < end; first += kRowsAtOnce) {
    const auto number_of = [&](int64_t i) { return row_number(dropout, smaller(first + i, end - 1)); };
    if (dropped)
      philox_rows(even_lanes_first(), number_of, columns, 0, dropout.stream_id, keys,
                  [&](int64_t row, int64_t column, const Words* word) {
                    prefetch_inputs(first + row, column);
                    store_multipliers(space + row * width + column, word, dropout);
                  });
    for (int64_t row = first; row < smaller(end, first + kRowsAtOnce); ++row)
      body(row, dropped ? space + (row - first) * width : nullptr);
  }
}

}  // namespace
}  // namespace minbert::MINBERT_ISA
