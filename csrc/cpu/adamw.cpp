// The AdamW step on the weighted sum of the task gradients, in one pass over memory.
#include "adamw.h"

#include "cpu/multi_tensor.h"
#include "cpu/simd_math.h"

namespace minbert::MINBERT_ISA {
namespace {

// The tensors that an update reads and writes, from one element on; average, copy and low_bits may be null. Where
// low_bits is not, the parameter is split: copy has the other part of it, and param is null.
template <class Scalar>
struct State {
  Scalar *param, *exp_avg, *exp_avg_sq, *average;
  BFloat16* copy;
  int16_t* low_bits;

  State operator+(int64_t elements) const {
    const auto from = [&](auto* tensor) { return tensor ? tensor + elements : nullptr; };
    return {from(param), from(exp_avg), from(exp_avg_sq), from(average), from(copy), from(low_bits)};
  }
};

inline void store_copy(BFloat16* to, Floats v) { store_raw(to, narrow(v, BFloat16{})); }
inline void store_copy(BFloat16* to, Doubles v) {  // via float32, as torch does
  Floats single = {};
  for (int lane = 0; lane < kDoubles; ++lane) single[lane] = static_cast<float>(v[lane]);
  const auto bits = narrow(single, BFloat16{});
  std::memcpy(to, &bits, kDoubles * sizeof(BFloat16));
}

inline Floats load_param(const State<float>& at) {
  if (!at.low_bits) return load<Floats>(at.param);
  const auto low = load_raw<Vector<int16_t, kFloats>>(at.low_bits);
  const auto high = load_raw<Vector<uint16_t, kFloats>>(at.copy);
  return (Floats)joined_bits(__builtin_convertvector(high, Bits), (Bits) __builtin_convertvector(low, Ints));
}
inline void store_param(const State<float>& at, Floats v) {
  if (at.low_bits) {
    const Bits bits = v == v ? (Bits)v : Bits{} + kNaN;
    store_raw(at.copy, narrow(high_bits(bits)));
    store_raw(at.low_bits, narrow(bits & 0xFFFF));
  } else {
    store_raw(at.param, v);
    if (at.copy) store_copy(at.copy, v);
  }
}
inline Doubles load_param(const State<double>& at) { return load<Doubles>(at.param); }  // never split
inline void store_param(const State<double>& at, Doubles v) {
  store_raw(at.param, v);
  if (at.copy) store_copy(at.copy, v);
}

template <class Register, class Scalar>
inline void update(Register grad, const State<Scalar>& at, const AdamWScalars<Scalar>& scalars) {
  Register param = load_param(at), exp_avg = load<Register>(at.exp_avg);
  Register exp_avg_sq = load<Register>(at.exp_avg_sq);
  adamw(grad, param, exp_avg, exp_avg_sq, scalars, [](Register v) { return square_root(v); });
  store_raw(at.exp_avg, exp_avg);
  store_raw(at.exp_avg_sq, exp_avg_sq);
  store_param(at, param);
  if (!at.average) return;
  store_raw(at.average, scalars.average(load<Register>(at.average), param));
}

template <class Element>
void update_chunk(const TaskGradients& g, const Chunk& chunk, const double* weights, const AdamWState& state,
                  const AdamWStep& step) {
  using Register = typename AccumulatorOf<Element>::type;
  using Scalar = decltype(Register{}[0] + 0);
  constexpr int kRegister = sizeof(Register) / sizeof(Scalar), kDepth = 2, kStep = kDepth * kRegister;
  const AdamWScalars<Scalar> scalars(step);
  const auto tensor = [&](void* const* tensors) {
    return tensors ? static_cast<Scalar*>(tensors[chunk.tensor]) : nullptr;
  };
  const auto low_bits = state.low_bits ? static_cast<int16_t*>(state.low_bits[chunk.tensor]) : nullptr;
  void* const* const halves = low_bits ? state.params : state.copies;
  const State<Scalar> first = State<Scalar>{low_bits ? nullptr : tensor(state.params),
                                            tensor(state.exp_avgs),
                                            tensor(state.exp_avg_sqs),
                                            tensor(state.averages),
                                            halves ? static_cast<BFloat16*>(halves[chunk.tensor]) : nullptr,
                                            low_bits} +
                              chunk.begin;
  const auto update_step = [&](int64_t at, const State<Scalar>& of_step) {
    Register total[kDepth] = {};
    add_weighted<Element>(g, chunk, weights, at, total);
    for (int i = 0; i < kDepth; ++i) update(total[i], of_step + i * kRegister, scalars);
  };
  int64_t at = 0;
  for (; at + kStep <= chunk.length; at += kStep) update_step(at, first + at);
  if (at == chunk.length) return;
  const int64_t rest = chunk.length - at;
  const State<Scalar> last = first + at;
  Scalar padded[4][kStep] = {};
  BFloat16 padded_copy[kStep] = {};
  int16_t padded_low_bits[kStep] = {};
  Scalar* const tensors[] = {last.param, last.exp_avg, last.exp_avg_sq, last.average};
  for (int i = 0; i < 4; ++i)
    if (tensors[i]) std::memcpy(padded[i], tensors[i], rest * sizeof(Scalar));
  if (last.low_bits) {
    std::memcpy(padded_copy, last.copy, rest * sizeof(BFloat16));
    std::memcpy(padded_low_bits, last.low_bits, rest * sizeof(int16_t));
  }
  update_step(at, {padded[0], padded[1], padded[2], last.average ? padded[3] : nullptr,
                   last.copy ? padded_copy : nullptr, last.low_bits ? padded_low_bits : nullptr});
  for (int i = 0; i < 4; ++i)
    if (tensors[i]) std::memcpy(tensors[i], padded[i], rest * sizeof(Scalar));
  if (last.copy) std::memcpy(last.copy, padded_copy, rest * sizeof(BFloat16));
  if (last.low_bits) std::memcpy(last.low_bits, padded_low_bits, rest * sizeof(int16_t));
}

}  // namespace

void combine_adamw(const TaskGradients& g, const double* weights, AdamWState state, AdamWStep step, Gate gate,
                   int threads) noexcept {
  if (!is_open(gate)) return;
  const int64_t kStateBytes = (state.averages ? 8 : 6) * sizeof(float);  // of one element, read and written
  int64_t elements = 0;
  for (int64_t tensor = 0; tensor < g.tensors; ++tensor) elements += g.sizes[tensor];
  const int64_t work = g.tasks * gradient_bytes(g) + kStateBytes * elements;
  parallel(threads, g.first_chunk[g.tensors], work, [&](int64_t index) {
    const Chunk chunk = find_chunk(g, index);
    const double* const own = weights_of(g, chunk, weights);
    with_element(g.dtypes[chunk.tensor],
                 [&](auto element) { update_chunk<decltype(element)>(g, chunk, own, state, step); });
  });
}

}  // namespace minbert::MINBERT_ISA
