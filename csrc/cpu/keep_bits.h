// Dropout masks of attention probabilities as bits: one for each query.
#pragma once

#include "cpu/philox_simd.h"

namespace minbert::MINBERT_ISA {
namespace {

// The bits of neighbouring queries: those of a register, or of two of the smallest.
#if defined(__AVX512F__)
using KeepBits = uint16_t;
#else
using KeepBits = uint8_t;
#endif
constexpr int64_t kKeepQueries = 8 * sizeof(KeepBits);

// The low halves of both registers in turns.
inline Bits low_halves_in_turns(Words even, Words odd) {
#if defined(__AVX512F__)
  return (Bits)_mm512_mask_shuffle_epi32((__m512i)even, 0xAAAA, (__m512i)odd, _MM_PERM_CCAA);
#elif defined(__AVX2__)
  return (Bits)_mm256_blend_epi32((__m256i)even, (__m256i)(odd << 32), 0b10101010);
#else
  return (Bits)((even & 0xFFFFFFFFu) | odd << 32);
#endif
}

// The lanes whose word is not below the threshold.
inline KeepBits kept_lanes(Bits words, uint32_t threshold) {
#if defined(__AVX512F__)
  return _mm512_cmpge_epu32_mask((__m512i)words, _mm512_set1_epi32(threshold));
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)(words >= threshold));
#elif defined(__SSE2__)
  return _mm_movemask_ps((__m128)(words >= threshold));
#else
  KeepBits bits = 0;
  for (int lane = 0; lane < kFloats; ++lane) bits |= (words[lane] >= threshold) << lane;
  return bits;
#endif
}

// 1 in the lanes that are kept, else 0.
inline Floats kept(KeepBits keep) {
  const Floats one = Floats{} + 1.0f;
#if defined(__AVX512F__)
  return (Floats)_mm512_maskz_mov_ps(keep, (__m512)one);
#else
  Bits lane_bits;
  for (int lane = 0; lane < kFloats; ++lane) lane_bits[lane] = 1u << lane;
  return (Floats)((Bits)((lane_bits & keep) != 0) & (Bits)one);
#endif
}

// keep[h * head_stride + key]: the bits of head first_head + h, up to four heads of one group of four, for `key` and
// the queries in rows row, row + 1, ... of the stream; bits from `shift` on, onto those below it. A counter gives the
// words of the four heads. The first three rounds share between keys what depends on the query alone, and between
// queries what depends on the key.
inline void keep_queries(KeepBits* keep, int64_t head_stride, int64_t first_head, int64_t heads, int64_t keys,
                         int64_t row, int64_t shift, const Dropout& dropout, const Keys& philox_keys) {
  const auto key = [&](int round, int word) { return static_cast<uint32_t>(philox_keys.key[round][word][0]); };
  const auto high = [](uint64_t product) { return static_cast<uint32_t>(product >> 32); };
  const auto low = [](uint64_t product) { return static_cast<uint32_t>(product); };
  const uint64_t of_group = uint64_t{kPhiloxMultiplier1} * (first_head / 4);
  Words of_query[2];  // the products of round 2: of the even queries and of the odd ones
  for (int odd = 0; odd < 2; ++odd)
    of_query[odd] = widening_product(
        (in_order(2) + static_cast<uint64_t>(dropout.first_row + row + odd)) ^ all(high(of_group) ^ key(0, 0)),
        kPhiloxMultiplier0);
  for (int64_t at = 0; at < keys; ++at) {
    const uint64_t product0 = uint64_t{kPhiloxMultiplier0} * at;
    const uint64_t product1 = uint64_t{kPhiloxMultiplier1} * (high(product0) ^ dropout.stream_id ^ key(0, 1));
    const uint64_t product2 = uint64_t{kPhiloxMultiplier0} * (high(product1) ^ low(of_group) ^ key(1, 0));
    const Words share0 = all(low(product1) ^ key(2, 0)), share1 = all(low(product0) ^ key(1, 1)),
                share2 = all(high(product2) ^ key(2, 1)), share3 = all(low(product2));
    Words counters[2][4];
    for (int odd = 0; odd < 2; ++odd) {
      const Words product3 = widening_product((of_query[odd] >> 32) ^ share1, kPhiloxMultiplier1);
      counters[odd][0] = (product3 >> 32) ^ share0;
      counters[odd][1] = product3;
      counters[odd][2] = of_query[odd] ^ share2;
      counters[odd][3] = share3;
    }
    philox_rounds<3>(counters, philox_keys);
    for (int word = 0; word < 4; ++word) {
      const int64_t head = word - first_head % 4;
      if (head < 0 || head >= heads) continue;
      const Bits words = low_halves_in_turns(counters[0][word], counters[1][word]);
      KeepBits& to = keep[head * head_stride + at];
      const KeepBits bits = kept_lanes(words, dropout.threshold);
      to = shift ? to | bits << shift : bits;
    }
  }
}

}  // namespace
}  // namespace minbert::MINBERT_ISA
