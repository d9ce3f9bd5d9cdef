// Vectors as wide as the instruction set's registers, and their loads from and stores to tensors of any alignment.
#pragma once

#include "cpu/isa.h"
#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace minbert::MINBERT_ISA {
namespace {

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

template <class V>
inline V load_raw(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}

// GCC splits these conversions in two where the instruction set has one that does it all.
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
inline Vector<float, lanes> widen_bfloat16(const BFloat16* from) {
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

template <int lanes>
inline Vector<float, lanes> load_floats(const float* from) {
  return load_raw<Vector<float, lanes>>(from);
}
template <int lanes>
inline Vector<float, lanes> load_floats(const BFloat16* from) {
  return widen_bfloat16<lanes>(from);
}

// b where a < b is not true: NaN where b is.
inline Floats smaller_or_second(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Floats)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
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

// What is stored for a register: rounded to nearest even, NaN stays NaN.
inline Floats narrow(Floats v, float) { return v; }
inline Doubles narrow(Doubles v, double) { return v; }
inline Vector<uint32_t, kFloats> bfloat16_bits(Floats v) {
  using Bits = Vector<uint32_t, kFloats>;
  const Bits bits = (Bits)v;
  return ((bits + 0x7FFF + ((bits >> 16) & 1)) | (Bits)(v != v)) >> 16;
}
inline Vector<uint16_t, kFloats> narrow(Floats v, BFloat16) {
  const auto bits = bfloat16_bits(v);
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m128i low = _mm256_castsi256_si128((__m256i)bits), high = _mm256_extracti128_si256((__m256i)bits, 1);
  return (Vector<uint16_t, kFloats>)_mm_packus_epi32(low, high);
#else
  return __builtin_convertvector(bits, Vector<uint16_t, kFloats>);
#endif
}

inline Floats square_root(Floats v) {
#if defined(__AVX512F__)
  return (Floats)_mm512_sqrt_ps((__m512)v);
#elif defined(__AVX2__)
  return (Floats)_mm256_sqrt_ps((__m256)v);
#elif defined(__SSE2__)
  return (Floats)_mm_sqrt_ps((__m128)v);
#else
  for (int lane = 0; lane < kFloats; ++lane) v[lane] = __builtin_sqrtf(v[lane]);
  return v;
#endif
}
inline Doubles square_root(Doubles v) {
#if defined(__AVX512F__)
  return (Doubles)_mm512_sqrt_pd((__m512d)v);
#elif defined(__AVX2__)
  return (Doubles)_mm256_sqrt_pd((__m256d)v);
#elif defined(__SSE2__)
  return (Doubles)_mm_sqrt_pd((__m128d)v);
#else
  for (int lane = 0; lane < kDoubles; ++lane) v[lane] = __builtin_sqrt(v[lane]);
  return v;
#endif
}

// A store past the caches, for results too large to stay in them; `to` is aligned to the vector's size.
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

// Several registers at once. Two of bfloat16 fill one register of AVX2 as they lie in memory: loading them takes three
// instructions and packing them two, where one by one they take four and six.
template <int count, class Element>
inline void load_several(const Element* from, Floats (&v)[count]) {
  for (int i = 0; i < count; ++i) v[i] = load<Floats>(from + i * kFloats);
}
template <bool streamed, int count, class Element>
inline void store_several(Element* to, const Floats (&v)[count]) {
  for (int i = 0; i < count; ++i) {
    const auto result = narrow(v[i], Element{});
    if (streamed)
      stream(to + i * kFloats, result);
    else
      std::memcpy(to + i * kFloats, &result, sizeof(result));
  }
}
#if defined(__AVX2__) && !defined(__AVX512F__)
template <int count>
inline void load_several(const BFloat16* from, Floats (&v)[count]) {
  static_assert(count % 2 == 0, "registers come in pairs");
  for (int i = 0; i < count; i += 2) {
    const __m256i halves = _mm256_permute4x64_epi64(load_raw<__m256i>(from + i * kFloats), 0b11011000);
    v[i] = (Floats)_mm256_unpacklo_epi16(_mm256_setzero_si256(), halves);
    v[i + 1] = (Floats)_mm256_unpackhi_epi16(_mm256_setzero_si256(), halves);
  }
}
template <bool streamed, int count>
inline void store_several(BFloat16* to, const Floats (&v)[count]) {
  static_assert(count % 2 == 0, "registers come in pairs");
  for (int i = 0; i < count; i += 2) {
    const __m256i both = _mm256_packus_epi32((__m256i)bfloat16_bits(v[i]), (__m256i)bfloat16_bits(v[i + 1]));
    const __m256i result = _mm256_permute4x64_epi64(both, 0b11011000);
    if (streamed)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i * kFloats), result);
    else
      std::memcpy(to + i * kFloats, &result, sizeof(result));
  }
}
#endif

constexpr int64_t kStreamedBytes = int64_t{16}
                                   << 20;  // an output beyond this leaves the caches before anybody reads it

// Makes streamed stores visible before whatever the thread stores next.
inline void end_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace minbert::MINBERT_ISA
