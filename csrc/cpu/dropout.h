// What dropout multiplies an activation by: the scale where it keeps an element, 0 where it drops one.
#pragma once

#include "cpu/philox_vectors.h"
#include "cpu/rows.h"

namespace minbert::MINBERT_ISA {
namespace {

using Bits = Vector<uint32_t, kFloats>;

// Each lane's low half from `low`, its high half from the low half of `high`.
inline Words halves(Words low, Words high) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return (Words)_mm256_blend_epi32((__m256i)low, (__m256i)(high << 32), 0b10101010);
#else
  return (low & 0xFFFFFFFFu) | (high << 32);
#endif
}

// The even lanes of both, alternating; and the odd ones.
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

// The counters from `first` on, in the order in which even_lanes and odd_lanes put their words into the row's order.
inline Words interleaved_counters(uint64_t first) {
  Words counters;
  for (int lane = 0; lane < kCounters; ++lane) counters[lane] = first + lane % 2 * (kCounters / 2) + lane / 2;
  return counters;
}

inline void store_multipliers(float* to, const Words* word, const Dropout& dropout) {
  const Words first = halves(word[0], word[1]), second = halves(word[2], word[3]);
  const Bits scale = (Bits)(Floats{} + dropout.scale);
  const Bits words[] = {(Bits)even_lanes(first, second), (Bits)odd_lanes(first, second)};
  for (int i = 0; i < 2; ++i) store_raw(to + i * kFloats, (Floats)((Bits)(words[i] >= dropout.threshold) & scale));
}

// The keys of all rounds, in every lane.
struct Keys {
  Words key[kPhiloxRounds][2];

  explicit Keys(int64_t seed) {
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      key[round][0] = all(key0), key[round][1] = all(key1);
      key0 += kPhiloxKeyStep0;
      key1 += kPhiloxKeyStep1;
    }
  }
};

// The multipliers of kDrawnRows rows from first_row on; `to` is [kDrawnRows, padded(columns)]. Element (row, column)
// reads word column % 4 of counter (column / 4, row, 0, site), and so the first three rounds do for all rows together
// what depends on the column alone: all products but one. The arithmetic leaves memory idle: meanwhile ahead(row, column)
// may ask for what will be read there.
template <class Ahead>
inline void draw_multipliers(float* to, int64_t columns, int64_t first_row, const Dropout& dropout, const Keys& keys,
                             const Ahead& ahead) {
  constexpr int kAtOnce = 4;  // rows: one alone would wait for its products
  constexpr int64_t kStep = 4 * kCounters;
  static_assert(kPadding % kStep == 0 && kDrawnRows % kAtOnce == 0, "rows are drawn in whole registers");
  Words of_row[kDrawnRows][2];  // words 2 and 3 of the row's share in round 1
  for (int i = 0; i < kDrawnRows; ++i) {
    const uint32_t word0 = static_cast<uint32_t>(first_row + i) ^ static_cast<uint32_t>(keys.key[0][0][0]);
    const Words product = widening_product(all(word0), kPhiloxMultiplier0);
    of_row[i][0] = (product >> 32) ^ keys.key[1][1];
    of_row[i][1] = product ^ keys.key[2][1];
  }
  const int64_t width = padded(columns);
  for (int64_t column = 0; column < columns; column += kStep) {
    const Words product0 = widening_product(interleaved_counters(column / 4), kPhiloxMultiplier0);
    const Words product1 = widening_product((product0 >> 32) ^ all(dropout.site) ^ keys.key[0][1], kPhiloxMultiplier1);
    const Words product2 = widening_product((product1 >> 32) ^ keys.key[1][0], kPhiloxMultiplier0);
    const Words share0 = product1 ^ keys.key[2][0], share2 = product2 >> 32;
    for (int i = 0; i < kDrawnRows; ++i) ahead(first_row + i, column);
    for (int first = 0; first < kDrawnRows; first += kAtOnce) {
      Words word[kAtOnce][4];
      for (int i = 0; i < kAtOnce; ++i) {
        const Words product = widening_product(product0 ^ of_row[first + i][0], kPhiloxMultiplier1);
        word[i][0] = (product >> 32) ^ share0;
        word[i][1] = product;
        word[i][2] = share2 ^ of_row[first + i][1];
        word[i][3] = product2;
      }
      for (int round = 3; round < kPhiloxRounds; ++round)
        for (int i = 0; i < kAtOnce; ++i) {
          const Words low = widening_product(word[i][0], kPhiloxMultiplier0);
          const Words high = widening_product(word[i][2], kPhiloxMultiplier1);
          word[i][0] = (high >> 32) ^ word[i][1] ^ keys.key[round][0];
          word[i][1] = high;
          word[i][2] = (low >> 32) ^ word[i][3] ^ keys.key[round][1];
          word[i][3] = low;
        }
      for (int i = 0; i < kAtOnce; ++i) store_multipliers(to + (first + i) * width + column, word[i], dropout);
    }
  }
}

// Calls body(row, multipliers) for the rows from begin up to end; the multipliers are null without dropout.
template <bool dropped, class Ahead, class Body>
void over_rows(int64_t begin, int64_t end, int64_t columns, const Dropout& dropout, float* multipliers,
               const Ahead& ahead, const Body& body) {
  const Keys keys(dropout.seed);
  for (int64_t first = begin; first < end; first += kDrawnRows) {
    if (dropped) draw_multipliers(multipliers, columns, first, dropout, keys, ahead);
    for (int64_t row = first; row < smaller(end, first + kDrawnRows); ++row)
      body(row, dropped ? multipliers + (row - first) * padded(columns) : nullptr);
  }
}

}  // namespace
}  // namespace minbert::MINBERT_ISA
