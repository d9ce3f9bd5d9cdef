// Gradient surgery: the Gram matrix of the task gradients, the weights computed from it, and the weighted sum of the
// task gradients.
#include "cpu/multi_tensor.h"
#include "gram_summation.h"
#include "pcgrad.h"

namespace minbert::MINBERT_ISA {
namespace {

// Gram -------------------------------------------------------------------------------------------------------------

// Products of float32 are exact in float64, so that almost no error accumulates in a chunk; memory latency hides the
// conversion. A tile is the products of up to kTile gradients with up to kTile others; its sums stay in registers.
constexpr int kTile = 3;
constexpr int64_t kBlock = 1024;  // elements of every gradient that are read from memory once and then from the cache

inline double sum(Doubles v) {
  double total = 0;
  for (int lane = 0; lane < kDoubles; ++lane) total += v[lane];
  return total;
}

// gram[i, j] += <left_i, right_j> for the tile's gradients; only j >= i where both sides are the same.
template <int lefts, int rights, bool same, class Element>
void add_tile(const Element* const* left, const Element* const* right, int64_t length, double* gram, int64_t stride) {
  constexpr int kDepth = lefts == 1 ? 4 : lefts == 2 ? 2 : 1;  // enough sums to hide the latency of an addition
  Doubles total[kDepth][lefts][rights] = {};
  const auto add = [&](int depth, const auto& read) {
    Doubles a[lefts], b[rights];
    for (int i = 0; i < lefts; ++i) a[i] = read(left[i]);
    for (int j = 0; j < rights; ++j) b[j] = same ? a[j % lefts] : read(right[j]);
    for (int i = 0; i < lefts; ++i)
      for (int j = same ? i : 0; j < rights; ++j) total[depth][i][j] += a[i] * b[j];
  };
  int64_t at = 0;
  for (; at + kDepth * kDoubles <= length; at += kDepth * kDoubles)
    for (int depth = 0; depth < kDepth; ++depth)
      add(depth, [&](const Element* from) { return load<Doubles>(from + at + depth * kDoubles); });
  for (; at + kDoubles <= length; at += kDoubles) add(0, [&](const Element* from) { return load<Doubles>(from + at); });
  if (at < length) add(0, [&](const Element* from) { return load_first<Doubles>(from + at, length - at); });
  for (int i = 0; i < lefts; ++i)
    for (int j = same ? i : 0; j < rights; ++j)
      for (int depth = 0; depth < kDepth; ++depth) gram[i * stride + j] += sum(total[depth][i][j]);
}

template <class Element>
using AddTile = void(const Element* const*, const Element* const*, int64_t, double*, int64_t);
template <class Element>
constexpr AddTile<Element>* kOnDiagonal[] = {add_tile<1, 1, true, Element>, add_tile<2, 2, true, Element>,
                                             add_tile<3, 3, true, Element>};
template <class Element>
constexpr AddTile<Element>* kOffDiagonal[] = {add_tile<3, 1, false, Element>, add_tile<3, 2, false, Element>,
                                              add_tile<3, 3, false, Element>};

// The upper triangle of one chunk's Gram matrix.
template <class Element>
void gram_of_chunk(const TaskGradients& g, const Chunk& chunk, double* gram) {
  static const Element zeros[kBlock] = {};
  const int64_t tasks = g.tasks;
  std::memset(gram, 0, tasks * tasks * sizeof(double));
  int64_t present = 0;
  for (int64_t task = 0; task < tasks; ++task) present += gradient<Element>(g, task, chunk) != nullptr;
  if (present == 0) return;
  for (int64_t begin = 0; begin < chunk.length; begin += kBlock) {
    const int64_t length = smaller(kBlock, chunk.length - begin);
    const auto read_tile = [&](int64_t first, const Element** rows) {
      const int64_t count = smaller(kTile, tasks - first);
      for (int64_t i = 0; i < count; ++i) {
        const Element* data = gradient<Element>(g, first + i, chunk);
        rows[i] = data ? data + begin : zeros;
      }
      return count;
    };
    for (int64_t i = 0; i < tasks; i += kTile) {
      const Element *left[kTile], *right[kTile];
      const int64_t lefts = read_tile(i, left);
      kOnDiagonal<Element>[lefts - 1](left, left, length, gram + i* tasks + i, tasks);
      for (int64_t j = i + kTile; j < tasks; j += kTile) {
        const int64_t rights = read_tile(j, right);
        kOffDiagonal<Element>[rights - 1](left, right, length, gram + i* tasks + j, tasks);
      }
    }
  }
  for (int64_t i = 0; i < tasks; ++i)  // an absent gradient is orthogonal to all others, even to one with Inf or NaN
    for (int64_t j = i; j < tasks; ++j)
      if (!gradient<Element>(g, i, chunk) || !gradient<Element>(g, j, chunk)) gram[i * tasks + j] = 0;
}

// Combine ----------------------------------------------------------------------------------------------------------

template <bool streamed, class Element>
void combine_chunk(const TaskGradients& g, const Chunk& chunk, const double* weights, Element* out) {
  using Accumulator = typename AccumulatorOf<Element>::type;
  using Scalar = decltype(Accumulator{}[0] + 0);
  constexpr int kLanes = sizeof(Accumulator) / sizeof(Scalar), kDepth = 4, kStep = kDepth * kLanes;
  Element padded[kStep];
  for (int64_t at = 0; at < chunk.length; at += kStep) {
    const int64_t count = smaller(kStep, chunk.length - at);
    Accumulator total[kDepth] = {};
    add_weighted<Element>(g, chunk, weights, at, total);
    Element* to = count < kStep ? padded : out + at;
    for (int depth = 0; depth < kDepth; ++depth)
      store_raw(to + depth * kLanes, narrow(total[depth], Element{}), streamed && count == kStep);
    if (count < kStep) std::memcpy(out + at, padded, count * sizeof(Element));
  }
  if (streamed) end_streams();
}

// Whether `out` is one of the gradients: then it is in the cache, and non-temporal stores do not pay.
bool is_a_gradient(const TaskGradients& g, const Chunk& chunk, const void* out) {
  for (int64_t task = 0; task < g.tasks; ++task)
    if (g.data[task * g.tensors + chunk.tensor] == out) return true;
  return false;
}

}  // namespace

void gram(const TaskGradients& g, double* partials, double* gram, int threads) noexcept {
  const int64_t entries = g.tasks * g.tasks;
  parallel(threads, g.first_chunk[g.tensors], g.tasks * gradient_bytes(g), [&](int64_t index) {
    const Chunk chunk = find_chunk(g, index);
    with_element(g.dtypes[chunk.tensor],
                 [&](auto element) { gram_of_chunk<decltype(element)>(g, chunk, partials + index * entries); });
  });
  for (int64_t part = 0; part < g.model_parts; ++part, gram += entries) {
    const int64_t first = g.first_chunk[g.first_tensor ? g.first_tensor[part] : 0];
    const int64_t chunks = g.first_chunk[g.first_tensor ? g.first_tensor[part + 1] : g.tensors] - first;
    for (int64_t i = 0; i < g.tasks; ++i)
      for (int64_t j = i; j < g.tasks; ++j) {
        double lanes[kLanes] = {};
        for (int64_t chunk = 0; chunk < chunks; ++chunk)
          lanes[chunk % kLanes] += partials[(first + chunk) * entries + i * g.tasks + j];
        gram[i * g.tasks + j] = gram[j * g.tasks + i] = sum_of_lanes(lanes);
      }
  }
}

void surgery_weights(const SurgeryProblem& problem, const SurgeryResult& result) noexcept {
  minbert::surgery_weights(problem, result, 0, 1, [] {});
}

void combine(const TaskGradients& g, const double* weights, void* const* out, int threads) noexcept {
  const int64_t output_bytes = gradient_bytes(g);
  parallel(threads, g.first_chunk[g.tensors], (g.tasks + 1) * output_bytes, [&](int64_t index) {
    const Chunk chunk = find_chunk(g, index);
    const double* const own = weights_of(g, chunk, weights);
    with_element(g.dtypes[chunk.tensor], [&](auto element) {
      using Element = decltype(element);
      Element* to = static_cast<Element*>(out[chunk.tensor]) + chunk.begin;
      if (pays_to_stream(out[chunk.tensor], output_bytes) && !is_a_gradient(g, chunk, out[chunk.tensor]))
        combine_chunk<true>(g, chunk, own, to);
      else
        combine_chunk<false>(g, chunk, own, to);
    });
  });
}

}  // namespace minbert::MINBERT_ISA
