// Dropout masks: vectorised Philox4x32-10, equal to csrc/philox.h to the bit.
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

inline void philox_vectors(Words c[4], int64_t seed) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const Words product0 = widening_product(c[0], kPhiloxMultiplier0);
    const Words product1 = widening_product(c[2], kPhiloxMultiplier1);
    c[0] = (product1 >> 32) ^ c[1] ^ static_cast<uint64_t>(key0);
    c[1] = product1;
    c[2] = (product0 >> 32) ^ c[3] ^ static_cast<uint64_t>(key1);
    c[3] = product0;
    key0 += kPhiloxKeyStep0;
    key1 += kPhiloxKeyStep1;
  }
}

// 1 in every lane whose low half is at least the threshold.
inline Words kept(Words word, uint32_t threshold) {
  return (((word & 0xFFFFFFFFu) - static_cast<uint64_t>(threshold)) >> 63) ^ 1;
}

inline Words counting_from(int64_t first) {
  Words lanes;
  for (int lane = 0; lane < kCounters; ++lane) lanes[lane] = first + lane;
  return lanes;
}

// One row of a mask: four bytes of each 64-bit lane are the four elements of its counter.
void keep_row(uint8_t* keep, int64_t columns, int64_t row, Dropout dropout) {
  constexpr int kBytes = 4 * kCounters;
  for (int64_t column = 0; column < columns; column += kBytes) {
    Words c[4] = {counting_from(column / 4), Words{} + static_cast<uint64_t>(row), Words{},
                  Words{} + static_cast<uint64_t>(dropout.site)};
    philox_vectors(c, dropout.seed);
    Words bytes{};
    for (int word = 0; word < 4; ++word) bytes |= kept(c[word], dropout.threshold) << static_cast<uint64_t>(8 * word);
    const auto packed = __builtin_convertvector(bytes, Vector<uint32_t, kCounters>);
    std::memcpy(keep + column, &packed, smaller(kBytes, columns - column));
  }
}

// The row of one query in the [length, length] blocks of up to four heads, `block` bytes apart.
void keep_query(uint8_t* keep, int64_t block, int64_t heads, int64_t length, int64_t query, int64_t group,
                Dropout dropout) {
  for (int64_t key = 0; key < length; key += kCounters) {
    Words c[4] = {counting_from(key), Words{} + static_cast<uint64_t>(query), Words{} + static_cast<uint64_t>(group),
                  Words{} + static_cast<uint64_t>(dropout.site)};
    philox_vectors(c, dropout.seed);
    const int64_t count = smaller(kCounters, length - key);
    for (int64_t head = 0; head < heads; ++head) {
      const auto bytes = __builtin_convertvector(kept(c[head], dropout.threshold), Vector<uint8_t, kCounters>);
      std::memcpy(keep + head * block + key, &bytes, count);
    }
  }
}

}  // namespace

void dropout_mask(uint8_t* keep, int64_t rows, int64_t columns, Dropout dropout, int threads) noexcept {
  constexpr int64_t kRows = 16;
  parallel(threads, (rows + kRows - 1) / kRows, [&](int64_t index) {
    const int64_t end = smaller(rows, (index + 1) * kRows);
    for (int64_t row = index * kRows; row < end; ++row) keep_row(keep + row * columns, columns, row, dropout);
  });
}

void attention_dropout_mask(uint8_t* keep, const int32_t* cu_seqlens, int64_t sequences, int64_t heads, Dropout dropout,
                            int threads) noexcept {
  parallel(threads, sequences, [&](int64_t sequence) {
    uint8_t* start = keep;
    for (int64_t before = 0; before < sequence; ++before) {
      const int64_t length = cu_seqlens[before + 1] - cu_seqlens[before];
      start += heads * length * length;
    }
    const int64_t first = cu_seqlens[sequence], length = cu_seqlens[sequence + 1] - first, block = length * length;
    for (int64_t head = 0; head < heads; head += 4)
      for (int64_t query = 0; query < length; ++query)
        keep_query(start + head * block + query * length, block, smaller(4, heads - head), length, first + query,
                   head / 4, dropout);
  });
}

}  // namespace minbert::MINBERT_ISA
