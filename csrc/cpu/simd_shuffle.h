// Permutations of lanes within and between registers, transposes and reductions.
#pragma once

#include "cpu/simd.h"

namespace minbert::MINBERT_ISA {
namespace {

template <int... lane>
struct Lanes {};
template <int count, int... lane>
struct CountTo : CountTo<count - 1, count - 1, lane...> {};
template <int... lane>
struct CountTo<0, lane...> {
  using type = Lanes<lane...>;
};
using EveryLane = typename CountTo<kFloats>::type;

// Lane i of the result is lane source[i] of a, or lane source[i] - kFloats of b.
template <int... source>
inline Floats pick(Floats a, Floats b, Lanes<source...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, source...);
#else
  return __builtin_shuffle(a, b, Vector<int32_t, kFloats>{source...});
#endif
}

template <int step, int... lane>
inline Floats exchanged(Floats v, Lanes<lane...>) {  // swaps lanes i and i ^ step
  return pick(v, v, Lanes<(lane ^ step)...>{});
}

// Lanes i with the bit `step` are b's lanes i - step or i; the others are a's lanes i or i + step.
template <int step, int... lane>
inline Floats low_halves(Floats a, Floats b, Lanes<lane...>) {
  return pick(a, b, Lanes<(lane & step ? kFloats + lane - step : lane)...>{});
}
template <int step, int... lane>
inline Floats high_halves(Floats a, Floats b, Lanes<lane...>) {
  return pick(a, b, Lanes<(lane & step ? kFloats + lane : lane + step)...>{});
}

// Transposes a square of kFloats registers: swaps blocks of `step` lanes across the diagonal, then blocks half as wide.
template <int step = kFloats / 2>
inline void transpose(Floats (&square)[kFloats]) {
  if constexpr (step > 0) {
    for (int i = 0; i < kFloats; ++i)
      if (!(i & step)) {
        const Floats a = square[i], b = square[i + step];
        square[i] = low_halves<step>(a, b, EveryLane{});
        square[i + step] = high_halves<step>(a, b, EveryLane{});
      }
    transpose<step / 2>(square);
  }
}

// The sum, or the largest, of all lanes, in every lane.
template <int step = kFloats / 2>
inline Floats sum_of_lanes(Floats v) {
  if constexpr (step == 0)
    return v;
  else
    return sum_of_lanes<step / 2>(v + exchanged<step>(v, EveryLane{}));
}
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }
template <int step = kFloats / 2>
inline Floats largest_of_lanes(Floats v) {
  if constexpr (step == 0)
    return v;
  else
    return largest_of_lanes<step / 2>(larger(v, exchanged<step>(v, EveryLane{})));
}

}  // namespace
}  // namespace minbert::MINBERT_ISA
