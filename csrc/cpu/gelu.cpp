// Bias and GELU, with the exact error function.
#include "cpu/normal.h"
#include "cpu/rows.h"
#include "row_math.h"

namespace minbert::MINBERT_ISA {
namespace {

template <int count>
struct Registers {
  static constexpr int kCount = count;
};

// Calls body(registers, at, count): several registers at once, and one by one what is left of the row.
template <class Body>
inline void along_row_together(int64_t columns, const Body& body) {
  constexpr int kTogether = 3;
  int64_t at = 0;
  for (; at + kTogether * kFloats <= columns; at += kTogether * kFloats) body(Registers<kTogether>{}, at, kFloats);
  for (; at < columns; at += kFloats) body(Registers<1>{}, at, smaller(kFloats, columns - at));
}

template <bool streamed, class Element>
void forward_row(int64_t columns, const Element* x, const float* bias, Element* y) {
  along_row_together(columns, [&](auto registers, int64_t at, int64_t count) {
    constexpr int n = registers.kCount;
    Floats z[n], density[n], distribution[n];
    for (int i = 0; i < n; ++i)
      z[i] = load_first(x + at + i * kFloats, count) + load_first(bias + at + i * kFloats, count);
    normal(z, density, distribution);
    for (int i = 0; i < n; ++i) store_first<streamed>(y + at + i * kFloats, z[i] * distribution[i], count);
  });
}

template <bool streamed, class Element>
void backward_row(int64_t columns, const Element* d_y, const Element* x, const float* bias, Element* d_x,
                  float* d_bias) {
  along_row_together(columns, [&](auto registers, int64_t at, int64_t count) {
    constexpr int n = registers.kCount;
    Floats z[n], density[n], distribution[n];
    for (int i = 0; i < n; ++i)
      z[i] = load_first(x + at + i * kFloats, count) + load_first(bias + at + i * kFloats, count);
    normal(z, density, distribution);
    for (int i = 0; i < n; ++i) {
      const int64_t here = at + i * kFloats;
      const Floats gradient = load_first(d_y + here, count) * gelu_derivative(z[i], distribution[i], density[i]);
      store_raw(d_bias + here, load<Floats>(d_bias + here) + gradient);
      store_first<streamed>(d_x + here, gradient, count);
    }
  });
}

}  // namespace

void gelu_forward(Activation a, const void* x, const float* bias, void* y, int threads) noexcept {
  with_rows(a, y, [&](auto element, auto streamed) {
    using Element = decltype(element);
    over_chunks(threads, 0, a.rows, bytes_of(a) * 2, [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        forward_row<streamed.kValue>(a.columns, static_cast<const Element*>(x) + row * a.columns, bias,
                                     static_cast<Element*>(y) + row * a.columns);
      if (streamed.kValue) end_streams();
    });
  });
}

void gelu_backward(Activation a, const void* d_y, const void* x, const float* bias, void* d_x, float* d_bias,
                   float* scratch, int threads) noexcept {
  with_rows(a, d_x, [&](auto element, auto streamed) {
    using Element = decltype(element);
    over_chunks(threads, 0, a.rows, bytes_of(a) * 3, [&](int64_t chunk, int64_t begin, int64_t end) {
      float* sums = scratch_of(scratch, chunk, a.columns).sums[0];
      std::memset(sums, 0, padded(a.columns) * sizeof(float));
      for (int64_t row = begin; row < end; ++row) {
        const int64_t start = row * a.columns;
        backward_row<streamed.kValue>(a.columns, static_cast<const Element*>(d_y) + start,
                                      static_cast<const Element*>(x) + start, bias, static_cast<Element*>(d_x) + start,
                                      sums);
      }
      if (streamed.kValue) end_streams();
    });
  });
  add_chunks<1>(threads, a.rows, a.columns, scratch, {d_bias});
}

}  // namespace minbert::MINBERT_ISA
