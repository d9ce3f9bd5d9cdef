// Loops of the row-wise kernels: along a row, and over chunks of rows with their scratch memory.
#pragma once

#include "cpu/simd.h"

namespace minbert::MINBERT_ISA {
namespace {

inline void prefetch(const void* from) { __builtin_prefetch(from, 0, 2); }  // into the L2 cache: L1 is full

inline Floats zero_after(Floats v, int64_t count) {
  for (int64_t lane = count; lane < kFloats; ++lane) v[lane] = 0;
  return v;
}

// Calls body(at, slot, count) for the registers of a row: `count` elements from `at` on, fewer than kFloats only in the
// last one. Neighbouring registers have different `slot`s, so that kSlots sums hide the latency of the additions.
constexpr int kSlots = 4;
template <class Body>
inline void along_row(int64_t columns, const Body& body) {
  int64_t at = 0;
  for (; at + kSlots * kFloats <= columns; at += kSlots * kFloats)
    for (int slot = 0; slot < kSlots; ++slot) body(at + slot * kFloats, slot, kFloats);
  for (; at + kFloats <= columns; at += kFloats) body(at, 0, kFloats);
  if (at < columns) body(at, 0, columns - at);
}

inline float sum_of(const Floats (&slots)[kSlots]) {
  const Floats v = (slots[0] + slots[1]) + (slots[2] + slots[3]);
  float sum = 0;
  for (int lane = 0; lane < kFloats; ++lane) sum += v[lane];
  return sum;
}

// Chunks ------------------------------------------------------------------------------------------------------------

// The scratch memory of one chunk, rows of padded(columns) floats.
struct Scratch {
  float* multipliers;  // dropout's, kScratchRows - 3 rows
  float* row;
  float* sums[2];  // over the chunk's rows
};

inline Scratch scratch_of(float* scratch, int64_t chunk, int64_t columns) {
  const int64_t width = padded(columns);
  float* start = scratch + chunk * kScratchRows * width;
  float* row = start + (kScratchRows - 3) * width;
  return {start, row, {row + width, row + 2 * width}};
}

// Calls body(chunk, begin, end) in parallel for the chunks of rows [first, last); a chunk begins at `first`. `work`:
// see parallel.
template <class Body>
void over_chunks(int threads, int64_t first, int64_t last, int64_t work, const Body& body) {
  parallel(threads, row_chunks(last - first), work, [&](int64_t index) {
    const int64_t begin = first + index * kChunkRows;
    body(begin / kChunkRows, begin, smaller(last, begin + kChunkRows));
  });
}

// out[which] = the sum of the chunks' sums[which], in the order of the chunks.
template <int count>
void add_chunks(int threads, int64_t rows, int64_t columns, float* scratch, float* const (&out)[count]) {
  const int64_t blocks = padded(columns) / kPadding, chunks = row_chunks(rows);
  parallel(threads, blocks, chunks * count * columns * static_cast<int64_t>(sizeof(float)), [&](int64_t block) {
    const int64_t begin = block * kPadding, length = smaller(kPadding, columns - begin);
    for (int which = 0; which < count; ++which) {
      Floats sums[kPadding / kFloats] = {};
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const float* from = scratch_of(scratch, chunk, columns).sums[which] + begin;
        for (int64_t i = 0; i < kPadding / kFloats; ++i) sums[i] += load<Floats>(from + i * kFloats);
      }
      std::memcpy(out[which] + begin, sums, length * sizeof(float));
    }
  });
}

inline int64_t bytes_of(const Activation& a) { return a.rows * a.columns * (a.dtype == DType::bfloat16 ? 2 : 4); }

template <bool value>
struct Constant {
  static constexpr bool kValue = value;
};

// Calls f with a Constant of the condition.
template <class F>
void with_constant(bool condition, const F& f) {
  condition ? f(Constant<true>{}) : f(Constant<false>{});
}

// Calls f(element, streamed) for an activation that is written to `to`: a value of its dtype's C++ type, and whether
// non-temporal stores pay.
template <class F>
void with_rows(const Activation& a, const void* to, const F& f) {
  with_activation(a.dtype, [&](auto element) {
    with_constant(pays_to_stream(to, bytes_of(a), bytes_of(a) / a.rows), [&](auto streamed) { f(element, streamed); });
  });
}

// Calls f(element, dropped, streamed), where `dropped` tells whether dropout drops anything.
template <class F>
void with_rows(const Activation& a, const Dropout& dropout, const void* to, const F& f) {
  with_rows(a, to, [&](auto element, auto streamed) {
    with_constant(dropout.threshold > 0, [&](auto dropped) { f(element, dropped, streamed); });
  });
}

}  // namespace
}  // namespace minbert::MINBERT_ISA
