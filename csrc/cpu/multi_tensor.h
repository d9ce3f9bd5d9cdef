// Lists of tensors as chunks, and the weighted sum of the tasks' gradients in registers.
#pragma once

#include "cpu/simd.h"

namespace minbert::MINBERT_ISA {
namespace {

struct Chunk {
  int64_t tensor, begin, length;
};

// The interval of `value`: first[i] <= value < first[i + 1] of count + 1 rising numbers.
int64_t find_interval(const int64_t* first, int64_t count, int64_t value) {
  int64_t low = 0, high = count;  // first[low] <= value < first[high]
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (first[middle] <= value ? low : high) = middle;
  }
  return low;
}

Chunk find_chunk(const TaskGradients& g, int64_t chunk) {
  const int64_t low = find_interval(g.first_chunk, g.tensors, chunk);
  const int64_t begin = (chunk - g.first_chunk[low]) * kChunk;
  return {low, begin, smaller(kChunk, g.sizes[low] - begin)};
}

// The weights of the chunk's part of the model, of weights [G, T].
const double* weights_of(const TaskGradients& g, const Chunk& chunk, const double* weights) {
  return g.first_tensor ? weights + g.tasks * find_interval(g.first_tensor, g.model_parts, chunk.tensor) : weights;
}

template <class Element>
const Element* gradient(const TaskGradients& g, int64_t task, const Chunk& chunk) {
  const void* data = g.data[task * g.tensors + chunk.tensor];
  return data ? static_cast<const Element*>(data) + chunk.begin : nullptr;
}

// Calls f with a value of the C++ type of `dtype`.
template <class F>
void with_element(DType dtype, const F& f) {
  switch (dtype) {
    case DType::float32:
      return f(float{});
    case DType::bfloat16:
      return f(BFloat16{});
    case DType::float64:
      return f(double{});
    case DType::float16:
      return;  // Python refuses it
  }
}

// The bytes of one task's gradient.
int64_t gradient_bytes(const TaskGradients& g) {
  int64_t bytes = 0;
  for (int64_t tensor = 0; tensor < g.tensors; ++tensor)
    with_element(g.dtypes[tensor], [&](auto element) { bytes += g.sizes[tensor] * sizeof(element); });
  return bytes;
}

template <class Element>
struct AccumulatorOf {
  using type = Floats;
};
template <>
struct AccumulatorOf<double> {
  using type = Doubles;
};

// total += the weighted sum of the elements from `at` on, as many as `total` holds; zeros follow a chunk's last
// element.
template <class Element, class Accumulator, int depth>
inline void add_weighted(const TaskGradients& g, const Chunk& chunk, const double* weights, int64_t at,
                         Accumulator (&total)[depth]) {
  using Scalar = decltype(Accumulator{}[0] + 0);
  constexpr int kLanes = sizeof(Accumulator) / sizeof(Scalar), kStep = depth * kLanes;
  const int64_t count = smaller(kStep, chunk.length - at);
  for (int64_t task = 0; task < g.tasks; ++task) {
    const Element* from = gradient<Element>(g, task, chunk);
    if (!from) continue;
    from += at;
    Element padded[kStep];
    if (count < kStep) {
      std::memset(padded, 0, sizeof(padded));
      std::memcpy(padded, from, count * sizeof(Element));
      from = padded;
    }
    const Scalar weight = static_cast<Scalar>(weights[task]);
    for (int i = 0; i < depth; ++i) total[i] += weight * load<Accumulator>(from + i * kLanes);
  }
}

}  // namespace
}  // namespace minbert::MINBERT_ISA
