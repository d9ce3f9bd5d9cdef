// Dropout masks.
#include "cpu/philox_vectors.h"

namespace minbert::MINBERT_ISA {
namespace {

// One row of a mask: the four words of a counter are four elements.
void keep_row(uint8_t* keep, int64_t columns, int64_t row, Dropout dropout) {
  constexpr int64_t kRegister = 4 * kCounters, kStep = kDepth * kRegister;
  uint8_t padded[kStep];
  for (int64_t column = 0; column < columns; column += kStep) {
    Counters c;
    for (int i = 0; i < kDepth; ++i) {
      c.word[0][i] = counting((column + i * kRegister) / 4, 1);
      c.word[1][i] = all(dropout.first_row + row);
      c.word[2][i] = all(0);
      c.word[3][i] = all(dropout.stream_id);
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
        keep_query(start + head * block + query * length, block, head, smaller(4, heads - head), length, first + query,
                   dropout);
  });
}

}  // namespace minbert::MINBERT_ISA
