// Vectorised Philox4x32-10, equal to csrc/philox.h to the bit, and the keep bytes that dropout makes of it.
#pragma once

#include "cpu/vector.h"
#include "philox.h"

namespace minbert::MINBERT_ISA {
namespace {

// One counter word of several counters, each in the low half of a 64-bit lane. The high halves hold rubbish: the
// widening product does not read them.
using Words = Vector<uint64_t, kVectorBytes / 8>;
constexpr int kCounters = kVectorBytes / 8;

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

constexpr int kDepth = 4;
struct Counters {
  Words word[4][kDepth];
};

// Two registers of counters at a time: one alone would wait for its products, and more do not fit into 16 registers.
inline void philox_vectors(Counters& c, int64_t seed) {
  constexpr int kAtOnce = 2;
  for (int first = 0; first < kDepth; first += kAtOnce) {
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      for (int i = first; i < first + kAtOnce; ++i) {
        const Words product0 = widening_product(c.word[0][i], kPhiloxMultiplier0);
        const Words product1 = widening_product(c.word[2][i], kPhiloxMultiplier1);
        c.word[0][i] = (product1 >> 32) ^ c.word[1][i] ^ static_cast<uint64_t>(key0);
        c.word[1][i] = product1;
        c.word[2][i] = (product0 >> 32) ^ c.word[3][i] ^ static_cast<uint64_t>(key1);
        c.word[3][i] = product0;
      }
      key0 += kPhiloxKeyStep0;
      key1 += kPhiloxKeyStep1;
    }
  }
}

// 1 in every lane whose low half is below the threshold.
inline Words dropped(Words word, uint32_t threshold) {
  return ((word & 0xFFFFFFFFu) - static_cast<uint64_t>(threshold)) >> 63;
}

// The bytes of a mask, lane after lane and within a lane word after word.
inline Vector<uint32_t, kCounters> keep_bytes(Words a, Words b, Words c, Words d, uint32_t threshold) {
  const Words bytes =
      dropped(a, threshold) | dropped(b, threshold) << 8 | dropped(c, threshold) << 16 | dropped(d, threshold) << 24;
  return __builtin_convertvector(bytes ^ 0x01010101, Vector<uint32_t, kCounters>);
}

inline Words counting(int64_t first, int64_t step) {
  Words lanes;
  for (int lane = 0; lane < kCounters; ++lane) lanes[lane] = first + lane * step;
  return lanes;
}

inline Words all(uint64_t value) { return Words{} + value; }

// One query's row in the blocks of some heads of one group of four, `block` bytes apart: the four words of a counter
// are the same element of the group's heads, so the counters of register i are every fourth key from the i-th on.
inline void keep_query(uint8_t* keep, int64_t block, int64_t first_head, int64_t heads, int64_t length, int64_t query,
                       Dropout dropout) {
  static_assert(kDepth == 4, "keep_bytes lays four registers side by side");
  constexpr int64_t kStep = kDepth * kCounters;
  for (int64_t key = 0; key < length; key += kStep) {
    Counters c;
    for (int i = 0; i < kDepth; ++i) {
      c.word[0][i] = counting(key + i, kDepth);
      c.word[1][i] = all(dropout.first_row + query);
      c.word[2][i] = all(first_head / 4);
      c.word[3][i] = all(dropout.stream_id);
    }
    philox_vectors(c, dropout.seed);
    const int64_t count = smaller(kStep, length - key);
    for (int64_t head = 0; head < heads; ++head) {
      const Words* word = c.word[first_head % 4 + head];
      const auto bytes = keep_bytes(word[0], word[1], word[2], word[3], dropout.threshold);
      if (count == kStep)
        std::memcpy(keep + head * block + key, &bytes, kStep);
      else
        std::memcpy(keep + head * block + key, &bytes, count);
    }
  }
}

}  // namespace
}  // namespace minbert::MINBERT_ISA
