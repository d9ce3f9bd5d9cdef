// Vectorised Philox4x32-7, equal to csrc/philox.h to the bit.
#pragma once

#include "cpu/simd.h"
#include "philox.h"

namespace minbert::MINBERT_ISA {
namespace {

// One counter word of several counters, each in the low half of a 64-bit lane. The high halves are undefined: the
// widening product does not read them.
constexpr int kCounters = kVectorBytes / 8;
using Words = Vector<uint64_t, kCounters>;

inline Words all(uint64_t value) { return Words{} + value; }

inline Words widening_product(Words a, uint32_t b) {
#if defined(__AVX512F__)
  return (Words)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
  return (Words)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__SSE2__)
  return (Words)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
  return (a & 0xFFFFFFFFu) * b;
#endif
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

// The rounds from `first` on of `count` registers of counters, interleaved to hide the latency of the products.
template <int first, int count>
inline void philox_rounds(Words (&counters)[count][4], const Keys& keys) {
  for (int round = first; round < kPhiloxRounds; ++round)
    for (Words(&word)[4] : counters) {
      const Words product0 = widening_product(word[0], kPhiloxMultiplier0);
      const Words product1 = widening_product(word[2], kPhiloxMultiplier1);
      word[0] = (product1 >> 32) ^ word[1] ^ keys.key[round][0];
      word[1] = product1;
      word[2] = (product0 >> 32) ^ word[3] ^ keys.key[round][1];
      word[3] = product0;
    }
}

// Consecutive counters in the lanes of a register: in order, or in the order that `interleave`, `even_lanes` and
// `odd_lanes` restore, the first half in the even lanes and the second half in the odd ones.
inline Words in_order(int64_t step = 1) {
  Words lanes;
  for (int lane = 0; lane < kCounters; ++lane) lanes[lane] = lane * step;
  return lanes;
}
inline Words even_lanes_first() {
  Words lanes;
  for (int lane = 0; lane < kCounters; ++lane) lanes[lane] = lane / 2 + lane % 2 * (kCounters / 2);
  return lanes;
}

constexpr int kRowsAtOnce = 4;  // enough to hide the latency of the products

// Numbers of consecutive rows.
struct RowsFrom {
  uint32_t first;

  uint32_t operator()(int64_t i) const { return first + static_cast<uint32_t>(i); }
};

// use(i, column, words): the four words of the counters (column / 4 + lanes, number_of(i), word2, word3), for
// kRowsAtOnce rows and every kCounters-th multiple of 4 below `columns`. Shares between the rows whatever depends on
// the column alone: in the first three rounds, all products but one.
template <class NumberOf, class Use>
inline void philox_rows(const Words& lanes, const NumberOf& number_of, int64_t columns, uint32_t word2, uint32_t word3,
                        const Keys& keys, const Use& use) {
  const uint64_t product = uint64_t{kPhiloxMultiplier1} * word2;  // round 1's, the same for all counters
  Words of_row[kRowsAtOnce][2];                                   // the row's share of words 2 and 3 after round 2
  for (int i = 0; i < kRowsAtOnce; ++i) {
    const Words word0 = all(number_of(i) ^ product >> 32) ^ keys.key[0][0];
    const Words product0 = widening_product(word0, kPhiloxMultiplier0);
    of_row[i][0] = (product0 >> 32) ^ keys.key[1][1];
    of_row[i][1] = product0 ^ keys.key[2][1];
  }
  for (int64_t column = 0; column < columns; column += 4 * kCounters) {
    const Words product0 = widening_product(lanes + static_cast<uint64_t>(column / 4), kPhiloxMultiplier0);
    const Words product1 = widening_product((product0 >> 32) ^ all(word3) ^ keys.key[0][1], kPhiloxMultiplier1);
    const Words product2 = widening_product((product1 >> 32) ^ all(product) ^ keys.key[1][0], kPhiloxMultiplier0);
    const Words share0 = product1 ^ keys.key[2][0], share2 = product2 >> 32;
    Words counters[kRowsAtOnce][4];
    for (int i = 0; i < kRowsAtOnce; ++i) {
      const Words product3 = widening_product(product0 ^ of_row[i][0], kPhiloxMultiplier1);
      counters[i][0] = (product3 >> 32) ^ share0;
      counters[i][1] = product3;
      counters[i][2] = share2 ^ of_row[i][1];
      counters[i][3] = product2;
    }
    philox_rounds<3>(counters, keys);
    for (int i = 0; i < kRowsAtOnce; ++i) use(i, column, counters[i]);
  }
}

}  // namespace
}  // namespace minbert::MINBERT_ISA
