// Philox for matrices: the words of counters (column / 4, row, word2, word3) for several rows at a time.
#pragma once

#include "cpu/philox_vectors.h"

namespace minbert::MINBERT_ISA {
namespace {

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

// The order of a register's counters in which the two results of `interleave` or `unpack` follow each other: even lanes
// come first, then odd ones.
inline Words even_lanes_first(uint64_t first) {
  Words lanes;
  for (int lane = 0; lane < kCounters; ++lane) lanes[lane] = lane / 2 + lane % 2 * (kCounters / 2);
  return lanes + first;
}

constexpr int kRowsAtOnce = 4;  // fewer would wait for their products

// use(i, column, words): the four words of the kCounters counters that belong to row first_row + i and the columns from
// `column` on, even lanes first. What depends on the column alone is done once for all rows: of three rounds, all
// products but one.
template <class Use>
inline void philox_rows(int64_t first_row, int64_t columns, uint32_t word2, uint32_t word3, const Keys& keys,
                        const Use& use) {
  const uint64_t product = uint64_t{kPhiloxMultiplier1} * word2;  // round 1's, the same for all counters
  Words of_row[kRowsAtOnce][2];                                   // words 2 and 3: the row's share after round 2
  for (int i = 0; i < kRowsAtOnce; ++i) {
    const Words word0 = all(static_cast<uint32_t>(first_row + i) ^ product >> 32) ^ keys.key[0][0];
    const Words product0 = widening_product(word0, kPhiloxMultiplier0);
    of_row[i][0] = (product0 >> 32) ^ keys.key[1][1];
    of_row[i][1] = product0 ^ keys.key[2][1];
  }
  for (int64_t column = 0; column < columns; column += 4 * kCounters) {
    const Words product0 = widening_product(even_lanes_first(column / 4), kPhiloxMultiplier0);
    const Words product1 = widening_product((product0 >> 32) ^ all(word3) ^ keys.key[0][1], kPhiloxMultiplier1);
    const Words product2 = widening_product((product1 >> 32) ^ all(product) ^ keys.key[1][0], kPhiloxMultiplier0);
    const Words share0 = product1 ^ keys.key[2][0], share2 = product2 >> 32;
    Words word[kRowsAtOnce][4];
    for (int i = 0; i < kRowsAtOnce; ++i) {
      const Words product3 = widening_product(product0 ^ of_row[i][0], kPhiloxMultiplier1);
      word[i][0] = (product3 >> 32) ^ share0;
      word[i][1] = product3;
      word[i][2] = share2 ^ of_row[i][1];
      word[i][3] = product2;
    }
    for (int round = 3; round < kPhiloxRounds; ++round)
      for (int i = 0; i < kRowsAtOnce; ++i) {
        const Words low = widening_product(word[i][0], kPhiloxMultiplier0);
        const Words high = widening_product(word[i][2], kPhiloxMultiplier1);
        word[i][0] = (high >> 32) ^ word[i][1] ^ keys.key[round][0];
        word[i][1] = high;
        word[i][2] = (low >> 32) ^ word[i][3] ^ keys.key[round][1];
        word[i][3] = low;
      }
    for (int i = 0; i < kRowsAtOnce; ++i) use(i, column, word[i]);
  }
}

}  // namespace
}  // namespace minbert::MINBERT_ISA
