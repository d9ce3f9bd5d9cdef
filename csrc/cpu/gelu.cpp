// Bias and GELU.
#include "cpu/gelu.h"

#include "cpu/rowwise.h"

namespace minbert::MINBERT_ISA {
namespace {

template <int n, class Element>
inline void read(const Element* from, int64_t count, Floats (&v)[n]) {
  if constexpr (n == 1)
    v[0] = load_first(from, count);
  else
    load_several(from, v);
}
template <int n, class Element>
inline void write(Element* to, int64_t count, const Floats (&v)[n], bool streamed) {
  if constexpr (n == 1)
    store_first(to, v[0], count, streamed);
  else
    store_several(to, v, streamed);
}

template <bool streamed, class Element>
void forward_row(int64_t columns, const Element* x, const float* bias, Element* y) {
  along_registers<kTogether<Element>>(columns, [&](auto registers, int64_t at, int64_t count) {
    constexpr int n = registers.kCount;
    Floats z[n], result[n];
    read(x + at, count, z);
    for (int i = 0; i < n; ++i) z[i] += load_first(bias + at + i * kFloats, count);
    gelu(z, result, Element{});
    write(y + at, count, result, streamed);
  });
}

template <bool streamed, class Element>
void backward_row(int64_t columns, const Element* d_y, const Element* x, const float* bias, Element* d_x,
                  float* d_bias) {
  along_registers<kTogether<Element>>(columns, [&](auto registers, int64_t at, int64_t count) {
    constexpr int n = registers.kCount;
    Floats z[n], gradient[n], derivative[n];
    read(x + at, count, z);
    for (int i = 0; i < n; ++i) z[i] += load_first(bias + at + i * kFloats, count);
    gelu_derivative(z, derivative, Element{});
    read(d_y + at, count, gradient);
    for (int i = 0; i < n; ++i) {
      gradient[i] *= derivative[i];
      float* const sum = d_bias + at + i * kFloats;
      store_raw(sum, load<Floats>(sum) + gradient[i]);
    }
    write(d_x + at, count, gradient, streamed);
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
