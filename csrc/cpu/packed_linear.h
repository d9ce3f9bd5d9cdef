// Linear layers whose weights are packed once as the right side of their products.
#pragma once

#include "cpu/allocator.h"
#include "cpu/gelu.h"

namespace minbert::MINBERT_ISA {
namespace {

// The product x @ weight.T + bias. `weight` has a panel of kPanel outputs after the other, each [depth, kPanel] units;
// zeros fill the last unit of the depth and the last panel, of the bias too.
template <class Unit>
struct PackedLinear {
  int64_t inputs, outputs, depth;
  Unit* weight;
  float* bias;

  PackedLinear(Allocator& memory, int64_t inputs, int64_t outputs)
      : inputs(inputs), outputs(outputs), depth(round_up(inputs, kDepth<Unit>) / kDepth<Unit>) {
    weight = memory.allocate<Unit>(round_up(outputs, kPanel) * depth);
    bias = memory.allocate<float>(round_up(outputs, kPanel));
  }

  int64_t panels() const { return round_up(outputs, kPanel) / kPanel; }
};

inline float unit_of(const float* value, int64_t, float) { return value[0]; }
inline Pair unit_of(const float* values, int64_t count, Pair) {
  const Floats both{values[0], count > 1 ? values[1] : 0.0f};
  const Bits bits = bfloat16_bits(both);
  return {bits[0] | bits[1] << 16};
}

// From weight [outputs, inputs] and bias [outputs].
template <class Unit>
void pack(const float* weight, const float* bias, const PackedLinear<Unit>& to, int threads) {
  parallel(threads, to.panels(), to.outputs * to.inputs * 8, [&](int64_t panel) {
    Unit* unit = to.weight + panel * kPanel * to.depth;
    for (int64_t k = 0; k < to.depth; ++k)
      for (int64_t lane = 0; lane < kPanel; ++lane, ++unit) {
        const int64_t output = panel * kPanel + lane, input = k * kDepth<Unit>;
        *unit = output < to.outputs ? unit_of(weight + output * to.inputs + input, to.inputs - input, Unit{}) : Unit{};
      }
    for (int64_t lane = 0; lane < kPanel; ++lane) {
      const int64_t output = panel * kPanel + lane;
      to.bias[output] = output < to.outputs ? bias[output] : 0;
    }
  });
}

// A matrix whose rows are `stride` elements apart.
template <class Element>
struct Rows {
  Element* data;
  int64_t stride;
};

// The float32 results of a block of rows and one panel become results of the layer.
template <bool with_gelu, int registers, class Element>
inline void finish(const float* sums, const float* bias, Rows<Element> to, int64_t columns) {
  Floats z[registers];
  for (int i = 0; i < registers; ++i) z[i] = load<Floats>(sums + i * kFloats) + load<Floats>(bias + i % 2 * kFloats);
  if constexpr (with_gelu) {
    Floats result[registers];
    gelu(z, result, Element{});
    for (int i = 0; i < registers; ++i) z[i] = result[i];
  }
  for (int i = 0; i < registers; ++i) {
    const int64_t count = smaller(kFloats, columns - i % 2 * kFloats);
    if (count > 0) store_result(to.data + i / 2 * to.stride + i % 2 * kFloats, z[i], count);
  }
}

constexpr int64_t kBlock = 4 * kTileRows;  // rows whose sums stay in the L1 cache

// to [rows, outputs] = x [rows, inputs] @ weight.T + bias, or GELU of that. The sums of an element do not depend on the
// number of rows. Where `fill`, the columns of the last panel that are no outputs are written too, as zeros.
template <bool with_gelu, class Unit, class Element>
void linear(const PackedLinear<Unit>& layer, Rows<const Element> x, int64_t rows, Rows<Element> to, bool fill,
            int threads) {
  constexpr int kRows = sizeof(Element) == 2 ? 4 : 2;  // whose registers hide the latency of GELU
  const int64_t blocks = (rows + kBlock - 1) / kBlock, panels = layer.panels();
  const int64_t width = fill ? panels * kPanel : layer.outputs;
  const int64_t work = rows * layer.depth * panels * kPanel / 8;  // of a product in the time of a loop over memory
  parallel(threads, panels * blocks, work, [&](int64_t item) {
    alignas(64) float sums[kBlock * kPanel];
    const int64_t panel = item / blocks, column = panel * kPanel;
    const int64_t first = rows * (item % blocks) / blocks, count = rows * (item % blocks + 1) / blocks - first;
    const Left<Unit> left{reinterpret_cast<const Unit*>(x.data + first * x.stride), x.stride / kDepth<Unit>, false};
    const Right<Unit> right{layer.weight + column * layer.depth, kPanel, layer.depth * kPanel};
    multiply(left, right, count, layer.depth, kPanel, Output<float>{sums, kPanel}, false, [] {});
    int64_t row = 0;
    const auto finish_rows = [&](auto registers, int64_t height) {
      for (; row + height <= count; row += height)
        finish<with_gelu, registers.kCount>(sums + row * kPanel, layer.bias + column,
                                            Rows<Element>{to.data + (first + row) * to.stride + column, to.stride},
                                            width - column);
    };
    finish_rows(Registers<2 * kRows>{}, kRows);
    finish_rows(Registers<2>{}, 1);
  });
}

}  // namespace
}  // namespace minbert::MINBERT_ISA
