// Softmax over the columns of transposed scores, with dropout, forward and backward. Rows are keys and lanes are
// queries, so that the reductions over the keys stay within the lanes.
#pragma once

#include "cpu/keep_bits.h"
#include "cpu/matmul.h"
#include "cpu/simd_math.h"

namespace minbert::MINBERT_ISA {
namespace {

// The scores of a block of queries, and in the backward the gradients of the probabilities.
struct Block {
  float *scores, *grads;  // [keys, stride]
  int64_t stride, keys;   // stride: the queries, rounded up to whole registers
  float scale;            // of the scores
  const KeepBits* keep;   // [queries / kKeepQueries, keys]

  template <bool dropout>
  Floats with_dropout(Floats v, int64_t key, int64_t lane) const {
    if (!dropout) return v;
    const KeepBits bits = keep[lane / kKeepQueries * keys + key];
    return v * kept(kFloats < kKeepQueries ? bits >> lane % kKeepQueries : bits);
  }
};

// Writes registers of neighbouring queries as units along the queries, and registers of the same queries and
// consecutive keys as units along the keys.
template <int count>
inline void store_along_queries(float* to, const Floats (&v)[count]) {
  store_several(to, v, false);
}
inline void store_along_keys(float* to, const Floats (&v)[1]) { store_raw(to, v[0]); }
#if defined(__AVX512BF16__)
template <int... lane>
inline Bits lane_numbers(Lanes<lane...>) {
  return Bits{lane...};
}
inline void store_along_queries(Pair* to, const Floats (&v)[1]) { store_raw(to, _mm512_cvtneps_pbh((__m512)v[0])); }
inline void store_along_queries(Pair* to, const Floats (&v)[2]) {
  store_raw(to, _mm512_cvtne2ps_pbh((__m512)v[1], (__m512)v[0]));
}
inline void store_along_keys(Pair* to, const Floats (&v)[2]) {
  const Bits turns = lane_numbers(EveryLane{}) * 0x10001 + 0x100000;  // lane i of the first, lane i of the second, ...
  store_raw(to, _mm512_permutexvar_epi16((__m512i)turns, (__m512i)_mm512_cvtne2ps_pbh((__m512)v[1], (__m512)v[0])));
}
#endif

// Calls body(begin, end) for ranges of keys that are summed apart, so that a large term rounds few of the others.
template <class Body>
inline void over_ranges(int64_t keys, const Body& body) {
  constexpr int64_t kRange = 16;
  for (int64_t begin = 0; begin < keys; begin += kRange) body(begin, smaller(keys, begin + kRange));
}

// The score of each query whose product with the scale is the largest.
template <int count>
inline void largest(const Block& b, int64_t lane, Floats (&most)[count]) {
  const auto over_keys = [&](float start, auto choose) {
    for (Floats& v : most) v = all_lanes(start);
    for (int64_t key = 0; key < b.keys; ++key)
      for (int i = 0; i < count; ++i)
        most[i] = choose(most[i], load<Floats>(b.scores + key * b.stride + lane + i * kFloats));
  };
  b.scale < 0 ? over_keys(
                    __builtin_inff(), [](Floats a, Floats score) { return smaller_or_second(a, score); })
              : over_keys(-__builtin_inff(), [](Floats a, Floats score) { return larger_or_second(a, score); });
}

// e^(scale * (score - most)): its error is below 1.2 units in the last place where it becomes an operand of float32,
// and 3e-6 of it, a thousandth of bfloat16's rounding, where it is rounded to bfloat16.
template <class Unit>
inline Floats exponential(Floats score, Floats most, float scale) {
#if defined(__AVX512F__)
  const Floats x = (score - most) * (scale * 0x1.715476p0f);  // 2^x = 2^floor(x) * 2^r
  const Floats r = (Floats)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  Floats p;
  if constexpr (kDepth<Unit> == 1) {
    p = all_lanes(0x1.c54174p-13f);
    p = p * r + 0x1.46d64ep-10f;
    p = p * r + 0x1.3d0b92p-7f;
    p = p * r + 0x1.c68912p-5f;
    p = p * r + 0x1.ebfd58p-3f;
    p = p * r + 0x1.62e42cp-1f;
  } else {
    p = all_lanes(0x1.b7f732p-7f);
    p = p * r + 0x1.abf868p-5f;
    p = p * r + 0x1.ee2450p-3f;
    p = p * r + 0x1.62d6c6p-1f;
  }
  return (Floats)_mm512_scalef_ps((__m512)(p * r + 1.0f), (__m512)x);
#else
  return exp((score - most) * scale);
#endif
}

// For the queries from `lane` on, e^(score - largest), 0 where dropped, overwrites the scores as units along the keys.
// factors: keep_scale / the sum over all keys, dropped or not.
template <class Unit, bool dropout, int count>
inline void exponentials(const Block& b, int64_t lane, float keep_scale, float* factors) {
  Floats most[count], sum[count] = {};
  largest(b, lane, most);
  over_ranges(b.keys, [&](int64_t begin, int64_t end) {
    Floats part[count] = {};
    for (int64_t key = begin; key < end; key += kDepth<Unit>) {
      Floats e[count][kDepth<Unit>] = {};
      for (int k = 0; k < smaller(kDepth<Unit>, end - key); ++k)
        for (int i = 0; i < count; ++i) {
          const int64_t at = lane + i * kFloats;
          const Floats v = exponential<Unit>(load<Floats>(b.scores + (key + k) * b.stride + at), most[i], b.scale);
          part[i] += v;
          e[i][k] = b.with_dropout<dropout>(v, key + k, at);
        }
      Unit* const to = reinterpret_cast<Unit*>(b.scores) + key / kDepth<Unit> * b.stride + lane;
      for (int i = 0; i < count; ++i) store_along_keys(to + i * kFloats, e[i]);
    }
    for (int i = 0; i < count; ++i) sum[i] += part[i];
  });
  for (int i = 0; i < count; ++i) store_raw(factors + lane + i * kFloats, 1.0f / sum[i] * keep_scale);
}

// The backward for the queries from `lane` on, without the scale of dropout. From the gradients g of the probabilities
// after dropout: scores become the probabilities P after dropout, and `grads` the gradients of the scores,
// P_j (g_j - sum of P_k g_k), both as units along the queries. along_keys, where it is not null, receives the latter as
// units along the keys.
template <class Unit, bool dropout, int count>
inline void softmax_backward(const Block& b, int64_t lane, Unit* along_keys) {
  Floats most[count], sum[count] = {}, weighted[count] = {};
  largest(b, lane, most);
  over_ranges(b.keys, [&](int64_t begin, int64_t end) {
    Floats part[count] = {}, weighted_part[count] = {};
    for (int64_t key = begin; key < end; ++key)
      for (int i = 0; i < count; ++i) {
        const int64_t at = lane + i * kFloats;
        float* const score = b.scores + key * b.stride + at;
        const Floats e = exponential<Unit>(load<Floats>(score), most[i], b.scale);
        part[i] += e;
        weighted_part[i] += e * b.with_dropout<dropout>(load<Floats>(b.grads + key * b.stride + at), key, at);
        store_raw(score, e);
      }
    for (int i = 0; i < count; ++i) {
      sum[i] += part[i];
      weighted[i] += weighted_part[i];
    }
  });
  for (int i = 0; i < count; ++i) {
    sum[i] = 1.0f / sum[i];
    weighted[i] *= sum[i];
  }
  for (int64_t key = 0; key < b.keys; key += kDepth<Unit>) {
    Floats by_query[count][kDepth<Unit>] = {};
    for (int k = 0; k < smaller(kDepth<Unit>, b.keys - key); ++k) {
      const int64_t row = (key + k) * b.stride;
      Floats p[count], grad[count];
      for (int i = 0; i < count; ++i) {
        const int64_t at = lane + i * kFloats;
        const Floats probability = load<Floats>(b.scores + row + at) * sum[i];
        const Floats g = b.with_dropout<dropout>(load<Floats>(b.grads + row + at), key + k, at);
        grad[i] = by_query[i][k] = probability * (g - weighted[i]);
        p[i] = b.with_dropout<dropout>(probability, key + k, at);
      }
      const int64_t to = row + lane / kDepth<Unit>;
      store_along_queries(reinterpret_cast<Unit*>(b.scores) + to, p);
      store_along_queries(reinterpret_cast<Unit*>(b.grads) + to, grad);
    }
    if (along_keys)
      for (int i = 0; i < count; ++i)
        store_along_keys(along_keys + key / kDepth<Unit> * b.stride + lane + i * kFloats, by_query[i]);
  }
}

// The same for all queries of the block.
template <class Unit, bool dropout>
void exponentials(const Block& b, float keep_scale, float* factors) {
  along_registers<2>(b.stride, [&](auto registers, int64_t lane, int64_t) {
    exponentials<Unit, dropout, registers.kCount>(b, lane, keep_scale, factors);
  });
}
template <class Unit, bool dropout>
void softmax_backward(const Block& b, Unit* along_keys) {
  along_registers<2>(b.stride, [&](auto registers, int64_t lane, int64_t) {
    softmax_backward<Unit, dropout, registers.kCount>(b, lane, along_keys);
  });
}

}  // namespace
}  // namespace minbert::MINBERT_ISA
