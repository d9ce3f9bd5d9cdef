// The dropout masks of activations and of attention probabilities.
#include "cpu/dropout_mask.h"

namespace minbert::MINBERT_ISA {
namespace {

constexpr int64_t kWorkPerByte = 8;  // a byte of a mask takes as long as this many bytes of memory traffic

}  // namespace

void dropout_mask(uint8_t* keep, int64_t rows, int64_t columns, Dropout dropout, int threads) noexcept {
  constexpr int64_t kRows = 16;
  const Keys keys(dropout.seed);
  parallel(threads, (rows + kRows - 1) / kRows, kWorkPerByte * rows * columns, [&](int64_t index) {
    const int64_t end = smaller(rows, (index + 1) * kRows);
    for (int64_t first = index * kRows; first < end; first += kRowsAtOnce)
      philox_rows(in_order(), RowsFrom{row_number(dropout, first)}, columns, 0, dropout.stream_id, keys,
                  [&](int64_t row, int64_t column, const Words* word) {
                    if (first + row >= end) return;
                    const auto bytes = keep_bytes(word[0], word[1], word[2], word[3], dropout.threshold);
                    store_bytes(keep + (first + row) * columns + column, bytes, columns - column);
                  });
  });
}

void attention_dropout_mask(uint8_t* keep, const int32_t* cu_seqlens, int64_t sequences, int64_t heads, Dropout dropout,
                            int threads) noexcept {
  const Keys keys(dropout.seed);
  const int64_t tokens = cu_seqlens[sequences], work = kWorkPerByte * heads * tokens * tokens / sequences;
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
                   dropout, keys);
  });
}

}  // namespace minbert::MINBERT_ISA
