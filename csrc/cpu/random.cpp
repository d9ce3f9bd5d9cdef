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
  const Words bytes = dropped(a, threshold) | dropped(b, threshold) << 8 | dropped(c, threshold) << 16 |
                      dropped(d, threshold) << 24;
  return __builtin_convertvector(bytes ^ 0x01010101, Vector<uint32_t, kCounters>);
}

inline Words counting(int64_t first, int64_t step) {
  Words lanes;
  for (int lane = 0; lane < kCounters; ++lane) lanes[lane] = first + lane * step;
  return lanes;
}

inline Words all(uint64_t value) { return Words{} + value; }

// One row of a mask: the four words of a counter are four elements.
void keep_row(uint8_t* keep, int64_t columns, int64_t row, Dropout dropout) {
  constexpr int64_t kRegister = 4 * kCounters, kStep = kDepth * kRegister;
  uint8_t padded[kStep];
  for (int64_t column = 0; column < columns; column += kStep) {
    Counters c;
    for (int i = 0; i < kDepth; ++i) {
      c.word[0][i] = counting((column + i * kRegister) / 4, 1);
      c.word[1][i] = all(row);
      c.word[2][i] = all(0);
      c.word[3][i] = all(dropout.site);
    }
    philox_vectors(c, dropout.seed);
    const int64_t count = smaller(kStep, columns - column);
    uint8_t* to = count < kStep ? padded : keep + column;
    for (int i = 0; i < kDepth; ++i) {
      const auto bytes = keep_bytes(c.word[0][i], c.word[1][i], c.word[2][i], c.word[3][i], dropout.threshold);
      std::memcpy(to + i * kRegister, &bytes, sizeof(bytes));
    }
    if (count < kStep) std::memcpy(keep + column, padded, count);
  }
}

// The row of one query in the [length, length] blocks of up to four heads, `block` bytes apart: the four words of a
// counter are the same element of four heads, so the counters of register i are every fourth key from the i-th on.
void keep_query(uint8_t* keep, int64_t block, int64_t heads, int64_t length, int64_t query, int64_t group,
                Dropout dropout) {
  static_assert(kDepth == 4, "keep_bytes lays four registers side by side");
  constexpr int64_t kStep = kDepth * kCounters;
  for (int64_t key = 0; key < length; key += kStep) {
    Counters c;
    for (int i = 0; i < kDepth; ++i) {
      c.word[0][i] = counting(key + i, kDepth);
      c.word[1][i] = all(query);
      c.word[2][i] = all(group);
      c.word[3][i] = all(dropout.site);
    }
    philox_vectors(c, dropout.seed);
    const int64_t count = smaller(kStep, length - key);
    for (int64_t head = 0; head < heads; ++head) {
      const Words* word = c.word[head];
      const auto bytes = keep_bytes(word[0], word[1], word[2], word[3], dropout.threshold);
      if (count == kStep)
        std::memcpy(keep + head * block + key, &bytes, kStep);
      else
        std::memcpy(keep + head * block + key, &bytes, count);
    }
  }
}

constexpr int64_t kWorkOfOneByte = 8;  // a byte of a mask takes the time of so many bytes of memory traffic

}  // namespace

void dropout_mask(uint8_t* keep, int64_t rows, int64_t columns, Dropout dropout, int threads) noexcept {
  constexpr int64_t kRows = 16;
  parallel(threads, (rows + kRows - 1) / kRows, kWorkOfOneByte * rows * columns, [&](int64_t index) {
    const int64_t end = smaller(rows, (index + 1) * kRows);
    for (int64_t row = index * kRows; row < end; ++row) keep_row(keep + row * columns, columns, row, dropout);
  });
}

void attention_dropout_mask(uint8_t* keep, const int32_t* cu_seqlens, int64_t sequences, int64_t heads, Dropout dropout,
                            int threads) noexcept {
  const int64_t tokens = cu_seqlens[sequences], work = kWorkOfOneByte * heads * tokens * tokens / sequences;
  parallel(threads, sequences, work, [&](int64_t sequence) {
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
