// Bias and GELU, with the exact error function.
#include "cpu/normal.h"
#include "cpu/rows.h"
#include "cpu/vector_math.h"
#include "row_math.h"

namespace minbert::MINBERT_ISA {
namespace {

// In float32: both factors of z Phi(z), as near as float32 can hold them.
template <int count>
inline void gelu(const Floats (&z)[count], Floats (&y)[count], float) {
  Floats density[count], distribution[count];
  normal(z, density, distribution);
  for (int i = 0; i < count; ++i) y[i] = z[i] * distribution[i];
}
template <int count>
inline void gelu_slope(const Floats (&z)[count], Floats (&slope)[count], float) {
  Floats density[count], distribution[count];
  normal(z, density, distribution);
  for (int i = 0; i < count; ++i) slope[i] = gelu_derivative(z[i], distribution[i], density[i]);
}

// For results that are rounded to bfloat16. Not memory but multiplying bounds these loops: there is no division and no
// exponential. With a = |z|, the tails Phi(-a) and Phi(-a) - a phi(a) are p(a)^16 and (root - a) p(a)^8, where the
// polynomials p, fits of our own, reach 0 at kBeyond. The first is off by 2^-13 of itself for a < 4 (bfloat16 keeps
// 2^-9), and the second, because the bias' gradient is a float32 sum of it, by 2^-17; beyond, by 3e-9 and 1e-8.
constexpr float kBeyond = 8.5f;

// p(|z|)^(2^squarings); `a` receives |z|.
template <int squarings, int count, int terms>
inline void power_of_polynomial(const Floats (&z)[count], const float (&p)[terms], Floats (&a)[count],
                                Floats (&power)[count]) {
  Floats near[count];
  for (int i = 0; i < count; ++i) {
    a[i] = (Floats)((Vector<uint32_t, kFloats>)z[i] & 0x7FFFFFFF);
    near[i] = smaller_or_second(all_lanes(kBeyond), a[i]);
    power[i] = near[i] * p[0] + p[1];
  }
  for (int step = 2; step < terms; ++step)
    for (int i = 0; i < count; ++i) power[i] = power[i] * near[i] + p[step];
  for (int squaring = 0; squaring < squarings; ++squaring)
    for (int i = 0; i < count; ++i) power[i] *= power[i];
}

template <int count>
inline void gelu(const Floats (&z)[count], Floats (&y)[count], BFloat16) {
  constexpr float p[] = {-0x1.795bd2p-15f, 0x1.66071cp-11f, -0x1.634a26p-10f,
                         -0x1.24151ep-6f,  -0x1.873e20p-5f, 0x1.ea4bd2p-1f};
  Floats a[count], tail[count];
  power_of_polynomial<4>(z, p, a, tail);
  for (int i = 0; i < count; ++i) y[i] = z[i] * ((Vector<int32_t, kFloats>)z[i] < 0 ? tail[i] : 1 - tail[i]);
}
template <int count>
inline void gelu_slope(const Floats (&z)[count], Floats (&slope)[count], BFloat16) {
  constexpr float kRoot = 0.75179154f;
  constexpr float p[] = {-0x1.2e912cp-22f, 0x1.f58836p-18f, -0x1.fabfe2p-15f, -0x1.ee9014p-16f, 0x1.31f1a8p-9f,
                         -0x1.760472p-9f,  -0x1.76770ap-5f, -0x1.0258c8p-5f,  0x1.e68d30p-1f};
  Floats a[count], power[count];
  power_of_polynomial<3>(z, p, a, power);
  for (int i = 0; i < count; ++i) {
    const Floats tail = (kRoot - a[i]) * power[i];
    slope[i] = (Vector<int32_t, kFloats>)z[i] < 0 ? tail : 1 - tail;
  }
}

template <int count>
struct Registers {
  static constexpr int kCount = count;
};

// Calls body(registers, at, count): `together` registers at once, and one by one what is left of the row.
template <int together, class Body>
inline void along_row_together(int64_t columns, const Body& body) {
  int64_t at = 0;
  for (; at + together * kFloats <= columns; at += together * kFloats) body(Registers<together>{}, at, kFloats);
  for (; at < columns; at += kFloats) body(Registers<1>{}, at, smaller(kFloats, columns - at));
}

// As many registers at once as keep the multipliers busy while each waits for its last result.
template <class Element>
constexpr int kTogether = sizeof(Element) == 2 ? 8 : 3;

template <int n, class Element>
inline void read(const Element* from, int64_t count, Floats (&v)[n]) {
  if constexpr (n == 1)
    v[0] = load_first(from, count);
  else
    load_several(from, v);
}
template <bool streamed, int n, class Element>
inline void write(Element* to, int64_t count, const Floats (&v)[n]) {
  if constexpr (n == 1)
    store_first<streamed>(to, v[0], count);
  else
    store_several<streamed>(to, v);
}

template <bool streamed, class Element>
void forward_row(int64_t columns, const Element* x, const float* bias, Element* y) {
  along_row_together<kTogether<Element>>(columns, [&](auto registers, int64_t at, int64_t count) {
    constexpr int n = registers.kCount;
    Floats z[n], result[n];
    read(x + at, count, z);
    for (int i = 0; i < n; ++i) z[i] += load_first(bias + at + i * kFloats, count);
    gelu(z, result, Element{});
    write<streamed>(y + at, count, result);
  });
}

template <bool streamed, class Element>
void backward_row(int64_t columns, const Element* d_y, const Element* x, const float* bias, Element* d_x,
                  float* d_bias) {
  along_row_together<kTogether<Element>>(columns, [&](auto registers, int64_t at, int64_t count) {
    constexpr int n = registers.kCount;
    Floats z[n], gradient[n], slope[n];
    read(x + at, count, z);
    for (int i = 0; i < n; ++i) z[i] += load_first(bias + at + i * kFloats, count);
    gelu_slope(z, slope, Element{});
    read(d_y + at, count, gradient);
    for (int i = 0; i < n; ++i) {
      gradient[i] *= slope[i];
      float* const sum = d_bias + at + i * kFloats;
      store_raw(sum, load<Floats>(sum) + gradient[i]);
    }
    write<streamed>(d_x + at, count, gradient);
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
