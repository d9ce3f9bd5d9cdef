// Vectors as wide as the instruction set's registers, and their loads from and stores to tensors of any alignment.
#pragma once

#include "cpu/parallel.h"
#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace minbert::MINBERT_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

struct BFloat16 {
  uint16_t bits;
};

template <class T, int bytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(bytes)));
};
template <class T, int lanes>
using Vector = typename VectorOf<T, lanes* static_cast<int>(sizeof(T))>::type;

constexpr int kFloats = kVectorBytes / 4, kDoubles = kVectorBytes / 8;
using Floats = Vector<float, kFloats>;
using Doubles = Vector<double, kDoubles>;
using Ints = Vector<int32_t, kFloats>;
using Bits = Vector<uint32_t, kFloats>;

// Calls f with a value of the C++ type of an activation's dtype.
template <class F>
void with_activation(DType dtype, const F& f) {
  if (dtype == DType::bfloat16) return f(BFloat16{});
  return f(float{});
}

// Loads ------------------------------------------------------------------------------------------------------------

template <class V>
inline V load_raw(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}

// GCC compiles these conversions to two instructions where the instruction set has a single one.
inline Doubles widen(Vector<float, kDoubles> v) {
#if defined(__AVX512F__)
  return (Doubles)_mm512_cvtps_pd((__m256)v);
#elif defined(__AVX2__)
  return (Doubles)_mm256_cvtps_pd((__m128)v);
#else
  return __builtin_convertvector(v, Doubles);
#endif
}
template <int lanes>
inline Vector<float, lanes> load_floats(const float* from) {
  return load_raw<Vector<float, lanes>>(from);
}
template <int lanes>
inline Vector<float, lanes> load_floats(const BFloat16* from) {
  using Result = Vector<float, lanes>;
#if defined(__AVX512F__)
  if constexpr (lanes == 16) return (Result)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_raw<__m256i>(from)), 16);
#endif
#if defined(__AVX2__)
  if constexpr (lanes == 8) return (Result)_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_raw<__m128i>(from)), 16);
  if constexpr (lanes == 4)
    return (Result)_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i*)from)), 16);
#endif
  const auto bits = load_raw<Vector<uint16_t, lanes>>(from);
  return (Result)(__builtin_convertvector(bits, Vector<uint32_t, lanes>) << 16);
}

// A register of floats or doubles from as many elements of a tensor.
template <class V>
inline V load(const double* from) {
  return load_raw<V>(from);
}
template <class V, class Element>
inline V load(const Element* from) {
  if constexpr (sizeof(V{}[0]) == sizeof(float))
    return load_floats<kFloats>(from);
  else
    return widen(load_floats<kDoubles>(from));
}

// The first `count` elements of a register. The other lanes are 0; their elements are not read.
template <class V = Floats, class Element>
V load_first(const Element* from, int64_t count) {
  constexpr int kLanes = sizeof(V) / sizeof(V{}[0]);
  if (count == kLanes) return load<V>(from);
  Element padded[kLanes] = {};
  std::memcpy(padded, from, count * sizeof(Element));
  return load<V>(padded);
}

// Stores -----------------------------------------------------------------------------------------------------------

// The elements of a register: rounded to nearest even; NaN stays NaN.
inline Floats narrow(Floats v, float) { return v; }
inline Doubles narrow(Doubles v, double) { return v; }
inline Bits bfloat16_bits(Floats v) {
  const Bits bits = (Bits)v;
  return ((bits + 0x7FFF + ((bits >> 16) & 1)) | (Bits)(v != v)) >> 16;
}
inline Vector<uint16_t, kFloats> narrow(Bits bits) {  // each below 2^16
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m128i low = _mm256_castsi256_si128((__m256i)bits), high = _mm256_extracti128_si256((__m256i)bits, 1);
  return (Vector<uint16_t, kFloats>)_mm_packus_epi32(low, high);
#else
  return __builtin_convertvector(bits, Vector<uint16_t, kFloats>);
#endif
}
inline Vector<uint16_t, kFloats> narrow(Floats v, BFloat16) { return narrow(bfloat16_bits(v)); }

// A non-temporal store, which bypasses the caches; `to` is aligned to the vector's size.
template <class V>
inline void stream(void* to, V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) return _mm512_stream_si512(static_cast<__m512i*>(to), (__m512i)v);
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(V) == 32) return _mm256_stream_si256(static_cast<__m256i*>(to), (__m256i)v);
#endif
#if defined(__SSE2__)
  if constexpr (sizeof(V) == 16) return _mm_stream_si128(static_cast<__m128i*>(to), (__m128i)v);
#endif
  std::memcpy(to, &v, sizeof(V));
}

template <class V>
inline void store_raw(void* to, V v, bool streamed = false) {
  if (streamed)
    stream(to, v);
  else
    std::memcpy(to, &v, sizeof(V));
}

// Writes the first `count` elements of a register.
template <class Element>
inline void store_first(Element* to, Floats v, int64_t count, bool streamed = false) {
  const auto result = narrow(v, Element{});
  if (count < kFloats)
    std::memcpy(to, &result, count * sizeof(Element));
  else
    store_raw(to, result, streamed);
}

// Whether non-temporal stores pay for an output of `bytes` bytes, which then leaves the caches before its next use, and
// whether the alignment of `to` and of its rows allows them.
inline bool pays_to_stream(const void* to, int64_t bytes, int64_t row_bytes = kVectorBytes) {
  constexpr int64_t kStreamedBytes = int64_t{16} << 20;
  return bytes >= kStreamedBytes && row_bytes % kVectorBytes == 0 &&
         reinterpret_cast<uintptr_t>(to) % kVectorBytes == 0;
}

// Orders non-temporal stores before all later stores of the thread.
inline void end_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Several registers -------------------------------------------------------------------------------------------------

template <int count, class Element>
inline void load_several(const Element* from, Floats (&v)[count]) {
  for (int i = 0; i < count; ++i) v[i] = load<Floats>(from + i * kFloats);
}
template <int count, class Element>
inline void store_several(Element* to, const Floats (&v)[count], bool streamed) {
  for (int i = 0; i < count; ++i) store_raw(to + i * kFloats, narrow(v[i], Element{}), streamed);
}
#if defined(__AVX2__) && !defined(__AVX512F__)
// Two registers of floats fill one AVX2 register of bfloat16: a pair loads in three instructions and packs in two, two
// single registers take four and six.
template <int count>
inline void load_several(const BFloat16* from, Floats (&v)[count]) {
  static_assert(count % 2 == 0, "registers come in pairs");
  for (int i = 0; i < count; i += 2) {
    const __m256i halves = _mm256_permute4x64_epi64(load_raw<__m256i>(from + i * kFloats), 0b11011000);
    v[i] = (Floats)_mm256_unpacklo_epi16(_mm256_setzero_si256(), halves);
    v[i + 1] = (Floats)_mm256_unpackhi_epi16(_mm256_setzero_si256(), halves);
  }
}
template <int count>
inline void store_several(BFloat16* to, const Floats (&v)[count], bool streamed) {
  static_assert(count % 2 == 0, "registers come in pairs");
  for (int i = 0; i < count; i += 2) {
    const __m256i both = _mm256_packus_epi32((__m256i)bfloat16_bits(v[i]), (__m256i)bfloat16_bits(v[i + 1]));
    store_raw(to + i * kFloats, _mm256_permute4x64_epi64(both, 0b11011000), streamed);
  }
}
#endif

template <int count>
struct Registers {
  static constexpr int kCount = count;
};

// Calls body(registers, at, count) along `length` elements: `together` full registers at a time from element `at` on,
// then single registers of `count` elements.
template <int together, class Body>
inline void along_registers(int64_t length, const Body& body) {
  int64_t at = 0;
  for (; at + together * kFloats <= length; at += together * kFloats) body(Registers<together>{}, at, int64_t{kFloats});
  for (; at < length; at += kFloats) body(Registers<1>{}, at, smaller(kFloats, length - at));
}

}  // namespace
}  // namespace minbert::MINBERT_ISA
