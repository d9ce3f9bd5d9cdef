// Dropout masks of keep bytes, 0 or 1, from random words.
#pragma once

#include "cpu/philox_simd.h"

namespace minbert::MINBERT_ISA {
namespace {

// 1 in every lane whose low half is below the threshold.
inline Words dropped(Words word, uint32_t threshold) {
  return ((word & 0xFFFFFFFFu) - static_cast<uint64_t>(threshold)) >> 63;
}

// The keep bytes of four registers of words: lane after lane, and within a lane register after register.
inline Vector<uint32_t, kCounters> keep_bytes(Words a, Words b, Words c, Words d, uint32_t threshold) {
  const Words bytes =
      dropped(a, threshold) | dropped(b, threshold) << 8 | dropped(c, threshold) << 16 | dropped(d, threshold) << 24;
  return __builtin_convertvector(bytes ^ 0x01010101, Vector<uint32_t, kCounters>);
}

inline void store_bytes(uint8_t* to, Vector<uint32_t, kCounters> bytes, int64_t count) {
  constexpr int64_t kBytes = sizeof(bytes);
  count < kBytes ? std::memcpy(to, &bytes, count) : std::memcpy(to, &bytes, kBytes);
}

// The mask row of one query in up to four heads of one group of four; the heads' masks are `block` bytes apart. A
// counter gives the words of one key for the heads of the group: register i holds every fourth key from the i-th on.
inline void keep_query(uint8_t* keep, int64_t block, int64_t first_head, int64_t heads, int64_t length, int64_t query,
                       const Dropout& dropout, const Keys& keys) {
  constexpr int64_t kStep = 4 * kCounters;
  for (int64_t key = 0; key < length; key += kStep) {
    Words counters[2][2][4];  // in pairs of registers: two pairs do not fit into 16 registers
    for (int i = 0; i < 4; ++i) {
      Words* const word = counters[i / 2][i % 2];
      word[0] = in_order(4) + static_cast<uint64_t>(key + i);
      word[1] = all(dropout.first_row + query);
      word[2] = all(first_head / 4);
      word[3] = all(dropout.stream_id);
    }
    for (auto& pair : counters) philox_rounds<0>(pair, keys);
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t word = first_head % 4 + head;
      const auto bytes = keep_bytes(counters[0][0][word], counters[0][1][word], counters[1][0][word],
                                    counters[1][1][word], dropout.threshold);
      store_bytes(keep + head * block + key, bytes, length - key);
    }
  }
}

}  // namespace
}  // namespace minbert::MINBERT_ISA
