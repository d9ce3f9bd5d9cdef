// SMART's perturbations (Jiang et al. 2019, algorithm 1): the normal start, and one projected step of gradient ascent.
#include "cpu/box_muller_simd.h"
#include "smart_ascent.h"

namespace minbert::MINBERT_ISA {
namespace {

// out = x + noise for `rows` rows, at most kRowsAtOnce; first_row is the number of the first one.
template <class Element>
void add_noise(const Element* x, Element* out, uint32_t first_row, int64_t rows, int64_t columns, float sigma,
               const Keys& keys, uint32_t stream_id, bool streamed) {
  Polar noise[kRowsAtOnce];
  philox_rows(even_lanes_first(), RowsFrom{first_row}, columns, 1, stream_id, keys,
              [&](int64_t i, int64_t column, const Words* word) {
                noise[i] = polar(word);
                if (i + 1 < kRowsAtOnce) return;
                Floats z[2][kRowsAtOnce];
                normals(noise, z[0], z[1]);
                for (int64_t row = 0; row < rows; ++row) {
                  const int64_t at = row * columns + column, left = columns - column;
                  if (left >= 2 * kFloats) {
                    Floats result[2];
                    load_several(x + at, result);
                    for (int half = 0; half < 2; ++half) result[half] += sigma * z[half][row];
                    store_several(out + at, result, streamed);
                  } else {
                    const int64_t first = smaller(kFloats, left), second = left - first;
                    store_first(out + at, load_first(x + at, first) + sigma * z[0][row], first);
                    if (second > 0)
                      store_first(out + at + kFloats, load_first(x + at + kFloats, second) + sigma * z[1][row], second);
                  }
                }
              });
}

// Norms of a group of elements. A non-finite element makes the norm NaN or Inf.
class InfinityNorm {
 public:
  void add(Floats v) {
    const Ints magnitude = (Ints)v & 0x7FFFFFFF;  // ordered like the absolute values, with NaN last
    largest_ = magnitude > largest_ ? magnitude : largest_;
  }
  float value() const {
    int32_t largest = 0;
    for (int lane = 0; lane < kFloats; ++lane) largest = largest_[lane] > largest ? largest_[lane] : largest;
    float value;
    std::memcpy(&value, &largest, sizeof(value));
    return value;
  }

 private:
  Ints largest_ = {};
};

class L2Norm {
 public:
  void add(Floats v) {  // the squares of all float32 numbers are normal float64 numbers
    Vector<float, kDoubles> halves[2];
    std::memcpy(halves, &v, sizeof(v));
    for (int half = 0; half < 2; ++half) {
      const Doubles wide = widen(halves[half]);
      total_[half] += wide * wide;
    }
  }
  float value() const {
    double total = 0;
    for (int lane = 0; lane < kDoubles; ++lane) total += total_[0][lane] + total_[1][lane];
    return static_cast<float>(__builtin_sqrt(total));
  }

 private:
  Doubles total_[2] = {};
};

// One group of an ascent, a range of elements.
template <class Element>
class Group {
 public:
  Group(const Ascent& ascent, int64_t begin, int64_t length)
      : perturbed_(static_cast<const Element*>(ascent.perturbed) + begin),
        x_(static_cast<const Element*>(ascent.x) + begin),
        grad_(static_cast<const Element*>(ascent.grad) + begin),
        out_(static_cast<Element*>(ascent.out) + begin),
        length_(length),
        eta_(ascent.eta * unit_of(ascent.scale)),
        epsilon_(ascent.epsilon * unit_of(ascent.scale)),
        streamed_(pays_to_stream(out_, ascent.tokens * ascent.columns * sizeof(Element))) {}

  template <class Norm>
  void measure_gradient() {
    Norm norm;
    along_registers<1>(length_, [&](auto, int64_t at, int64_t count) { norm.add(load_first(grad_ + at, count)); });
    const float gradient_norm = norm.value();
    steps_ = eta_ != 0 && has_direction(gradient_norm);
    if (steps_) step_ = Rescaling(gradient_norm, eta_);
  }

  void step_and_clamp() const {
    along_registers<1>(length_, [&](auto, int64_t at, int64_t count) {
      const Floats centre = load_first(x_ + at, count);
      store_first(out_ + at, clamped(stepped(at, count), centre - epsilon_, centre + epsilon_), count, streamed_);
    });
  }

  template <class Norm>
  void step_and_rescale(bool only_from_outside) const {
    Norm norm;
    along_registers<1>(
        length_, [&](auto, int64_t at, int64_t count) { norm.add(stepped(at, count) - load_first(x_ + at, count)); });
    const float distance = norm.value();
    const bool rescales = only_from_outside ? distance > epsilon_ : has_direction(distance);
    const Rescaling rescale = rescales ? Rescaling(distance, epsilon_) : Rescaling();
    along_registers<1>(length_, [&](auto, int64_t at, int64_t count) {
      Floats result = stepped(at, count);
      if (rescales) {
        const Floats centre = load_first(x_ + at, count);
        result = centre + rescale(result - centre);
      }
      store_first(out_ + at, result, count, streamed_);
    });
  }

 private:
  Floats stepped(int64_t at, int64_t count) const {
    const Floats start = load_first(perturbed_ + at, count);
    return steps_ ? start + step_(load_first(grad_ + at, count)) : start;
  }

  const Element *const perturbed_, *const x_, *const grad_;
  Element* const out_;
  const int64_t length_;
  const float eta_, epsilon_;
  const bool streamed_;
  Rescaling step_;
  bool steps_ = false;
};

template <class Element>
void ascend_group(const Ascent& ascent, int64_t index) {
  const int64_t first = ascent.cu_seqlens ? ascent.cu_seqlens[index] : index;
  const int64_t end = ascent.cu_seqlens ? ascent.cu_seqlens[index + 1] : index + 1;
  Group<Element> group(ascent, first * ascent.columns, (end - first) * ascent.columns);
  if (ascent.infinity_norm) {
    group.template measure_gradient<InfinityNorm>();
    if (ascent.onto_ball)
      group.step_and_clamp();
    else
      group.template step_and_rescale<InfinityNorm>(false);
  } else {
    group.template measure_gradient<L2Norm>();
    group.template step_and_rescale<L2Norm>(ascent.onto_ball);
  }
}

constexpr int64_t kRows = 16;  // tokens of one work item

}  // namespace

void smart_init(const NormalStart& start, int threads) noexcept {
  const Keys keys(start.seed[0]);
  const uint32_t first_row = static_cast<uint32_t>(start.seed[1]);
  const int64_t rows = start.rows, columns = start.columns;
  const float sigma = start.sigma * unit_of(start.scale);
  with_activation(start.dtype, [&](auto element) {
    using Element = decltype(element);
    const int64_t row_bytes = columns * static_cast<int64_t>(sizeof(Element)), bytes = rows * row_bytes;
    const bool streamed = pays_to_stream(start.out, bytes, row_bytes);
    parallel(threads, (rows + kRows - 1) / kRows, 8 * bytes, [&](int64_t index) {
      const int64_t end = smaller(rows, (index + 1) * kRows);
      for (int64_t row = index * kRows; row < end; row += kRowsAtOnce)
        add_noise(static_cast<const Element*>(start.x) + row * columns,
                  static_cast<Element*>(start.out) + row * columns, first_row + static_cast<uint32_t>(row),
                  smaller(kRowsAtOnce, end - row), columns, sigma, keys, start.stream_id, streamed);
      end_streams();
    });
  });
}

void smart_ascend(const Ascent& ascent, int threads) noexcept {
  const int64_t groups_at_once = ascent.cu_seqlens ? 1 : kRows;
  with_activation(ascent.dtype, [&](auto element) {
    using Element = decltype(element);
    const int64_t bytes = ascent.tokens * ascent.columns * static_cast<int64_t>(sizeof(Element));
    parallel(threads, (ascent.groups + groups_at_once - 1) / groups_at_once, 4 * bytes, [&](int64_t index) {
      const int64_t end = smaller(ascent.groups, (index + 1) * groups_at_once);
      for (int64_t group = index * groups_at_once; group < end; ++group) ascend_group<Element>(ascent, group);
      end_streams();
    });
  });
}

}  // namespace minbert::MINBERT_ISA
