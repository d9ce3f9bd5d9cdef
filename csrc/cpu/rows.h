// What the row-wise kernels share: walking along a row, and chunks of rows with their scratch memory.
#pragma once

#include "cpu/vector.h"

namespace minbert::MINBERT_ISA {
namespace {

// Calls f with a value of the C++ type behind the dtype of an activation.
template <class F>
void with_activation(DType dtype, const F& f) {
  if (dtype == DType::bfloat16) return f(BFloat16{});
  return f(float{});
}

// The first `count` elements of a register; the others are 0 and are not read, or not written.
template <class Element>
Floats load_first(const Element* from, int64_t count) {
  if (count == kFloats) return load<Floats>(from);
  Element copy[kFloats] = {};
  std::memcpy(copy, from, count * sizeof(Element));
  return load<Floats>(copy);
}

template <bool streamed = false, class Element>
void store_first(Element* to, Floats v, int64_t count) {
  const auto result = narrow(v, Element{});
  if (count < kFloats)
    std::memcpy(to, &result, count * sizeof(Element));
  else if (streamed)
    stream(to, result);
  else
    std::memcpy(to, &result, sizeof(result));
}

inline void prefetch(const void* from) { __builtin_prefetch(from, 0, 2); }  // into the second cache: the first is full

inline void store_raw(float* to, Floats v) { std::memcpy(to, &v, sizeof(v)); }

inline Floats zero_after(Floats v, int64_t count) {
  for (int64_t lane = count; lane < kFloats; ++lane) v[lane] = 0;
  return v;
}

// Calls body(at, slot, count) for the registers of a row: count elements from `at` on, kFloats but in the last one. Of
// kSlots sums, `slot` is one that the registers just before do not touch, and so need not wait for.
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
  float* multipliers;  // what dropout multiplies by, for all rows but the three below
  float* row;
  float* sums[2];  // over the chunk's rows
};

inline Scratch scratch_of(float* scratch, int64_t chunk, int64_t columns) {
  const int64_t width = padded(columns);
  float* start = scratch + chunk * kScratchRows * width;
  float* row = start + (kScratchRows - 3) * width;
  return {start, row, {row + width, row + 2 * width}};
}

// Calls body(chunk, begin, end) in parallel for the chunks of rows [first, last); `first` is the first row of one.
// `work`: the bytes that all of it touches.
template <class Body>
void over_chunks(int threads, int64_t first, int64_t last, int64_t work, const Body& body) {
  parallel(threads, row_chunks(last - first), work, [&](int64_t index) {
    const int64_t begin = first + index * kChunkRows;
    body(begin / kChunkRows, begin, smaller(last, begin + kChunkRows));
  });
}

// out[which] = the chunks' sums[which], added up in their order.
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

// Whether an activation is worth storing past the caches, and lies so that it can be.
inline bool pays_to_stream(const Activation& a, const void* to) {
  return bytes_of(a) >= kStreamedBytes && bytes_of(a) / a.rows % kVectorBytes == 0 &&
         reinterpret_cast<uintptr_t>(to) % kVectorBytes == 0;
}

template <bool value>
struct Constant {
  static constexpr bool kValue = value;
};

// Calls f with a Constant of the condition.
template <class F>
void with_constant(bool condition, const F& f) {
  condition ? f(Constant<true>{}) : f(Constant<false>{});
}

// Calls f(element, streamed) for an activation that is written to `to`: the C++ type behind its dtype, and whether to
// store past the caches.
template <class F>
void with_rows(const Activation& a, const void* to, const F& f) {
  with_activation(a.dtype, [&](auto element) {
    with_constant(pays_to_stream(a, to), [&](auto streamed) { f(element, streamed); });
  });
}

// Calls f(element, dropped, streamed), where `dropped` is whether dropout acts.
template <class F>
void with_rows(const Activation& a, const Dropout& dropout, const void* to, const F& f) {
  with_rows(a, to, [&](auto element, auto streamed) {
    with_constant(dropout.threshold > 0, [&](auto dropped) { f(element, dropped, streamed); });
  });
}

}  // namespace
}  // namespace minbert::MINBERT_ISA
