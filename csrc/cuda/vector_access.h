// Loads and stores of a tensor's elements as float32 numbers, 16 bytes at a time where the tensor's layout allows it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

namespace minbert {
namespace {

using BFloat16 = __nv_bfloat16;
using Float16 = __half;

template <int width>
struct Floats {
  float at[width];
};

// The elements of a 32-bit word. Registers hold words: they have no narrower type.
inline __device__ Floats<1> widened(uint32_t word, float) { return {{__uint_as_float(word)}}; }
inline __device__ Floats<2> widened(uint32_t word, BFloat16) {
  return {{__uint_as_float(word << 16), __uint_as_float(word & 0xFFFF0000)}};
}
inline __device__ Floats<2> widened(uint32_t word, Float16) {
  __half2 pair;
  std::memcpy(&pair, &word, sizeof(pair));
  const float2 v = __half22float2(pair);
  return {{v.x, v.y}};
}

inline __device__ float rounded(const float* v, float) { return v[0]; }
inline __device__ __nv_bfloat162 rounded(const float* v, BFloat16) { return __floats2bfloat162_rn(v[0], v[1]); }
inline __device__ __half2 rounded(const float* v, Float16) { return __floats2half2_rn(v[0], v[1]); }

// 16 bytes of elements, which a thread loads or stores with one instruction.
template <class E>
struct Packs {
  using Element = E;
  using Raw = uint4;
  static constexpr int kWidth = sizeof(Raw) / sizeof(Element), kOfWord = sizeof(uint32_t) / sizeof(Element);

  static __device__ Raw read(const Element* from) { return __ldg(reinterpret_cast<const Raw*>(from)); }

  static __device__ Floats<kWidth> widened(Raw raw) {
    const uint32_t words[] = {raw.x, raw.y, raw.z, raw.w};
    Floats<kWidth> v;
    for (int i = 0; i < kWidth; i += kOfWord) {
      const auto of_word = minbert::widened(words[i / kOfWord], Element());
      for (int j = 0; j < kOfWord; ++j) v.at[i + j] = of_word.at[j];
    }
    return v;
  }

  static __device__ void write(Element* to, const Floats<kWidth>& v) {
    decltype(rounded(v.at, Element())) words[kWidth / kOfWord];
    for (int i = 0; i < kWidth; i += kOfWord) words[i / kOfWord] = rounded(v.at + i, Element());
    Raw raw;
    std::memcpy(&raw, words, sizeof(raw));
    *reinterpret_cast<Raw*>(to) = raw;
  }
};

// One element, for rows that are not aligned to 16 bytes.
template <class E>
struct Singles {
  using Element = E;
  using Raw = Element;
  static constexpr int kWidth = 1;

  static __device__ Raw read(const Element* from) { return __ldg(from); }
  static __device__ Floats<1> widened(Raw raw) { return {{static_cast<float>(raw)}}; }
  static __device__ void write(Element* to, const Floats<1>& v) { *to = static_cast<Element>(v.at[0]); }
};

// Whether the rows of these tensors, `columns` elements each, are aligned for Packs.
template <class Element, class... Pointer>
bool in_packs(int64_t columns, const Pointer*... tensor) {
  constexpr uint64_t kBytes = sizeof(typename Packs<Element>::Raw);
  return columns * sizeof(Element) % kBytes == 0 && ((reinterpret_cast<uintptr_t>(tensor) % kBytes == 0) && ...);
}

}  // namespace
}  // namespace minbert
