// smart_init and smart_ascend against plain loops in float64.
#include "box_muller.h"
#include "check.h"

namespace minbert {
namespace {

constexpr double kHalfUnit[] = {0x1p-24, 0x1p-8};  // of float32 and bfloat16

double exact_normal(Words4 words, int64_t index) {
  const uint32_t* pair = words.word + index / 2 * 2;
  const double u = ((pair[0] >> 8) + 1) * 0x1p-24, angle = (pair[1] >> 8) * 0x1p-24 * 2 * std::acos(-1.0);
  return std::sqrt(-2 * std::log(u)) * (index % 2 ? std::sin(angle) : std::cos(angle));
}

// The normals of single counters, which GPUs compute: every third radius, the largest one at every third angle.
// Their errors reach 1.15 * 2^-20; those of the reference in float32 reach 2.5 * 2^-20.
void test_single_normals() {
  for (uint32_t i = 0; i < 1u << 24; i += 3) {
    const Words4 words{{i << 8, i * 0x9E3779B9u, 0, i << 8}};
    float z[4];
    normals(words, z);
    for (int index = 0; index < 4; ++index) {
      const double error = std::abs(z[index] - exact_normal(words, index));
      CHECK(error <= 1.2 * 0x1p-20, "the normal is off by %g for word %d", error, static_cast<int>(i));
    }
  }
}

void test_init(Isa isa) {
  const int64_t first_row = (int64_t{1} << 33) - 5;  // among the rows, numbers begin again at 0
  const int64_t seed[] = {int64_t{-5} * (int64_t{1} << 33) + 99, first_row};
  const uint32_t stream_id = 17;
  const float sigma = 0.5f;
  for (const DType dtype : {DType::float32, DType::bfloat16})
    for (const int64_t rows : {1, 2, 7, 33})
      for (const int64_t columns : {1, 3, 4, 15, 64, 129})
        for (const int threads : kThreadCounts) {
          Buffer x(rows * columns, dtype, 1), out(rows * columns, dtype, 3);
          for (int64_t i = 0; i < rows * columns; ++i) x.set(i, number(i)), out.set(i, NAN);
          const float scale = 0.25f, *const scales[] = {nullptr, &scale};
          const float* const unit = scales[columns % 2];
          kernels(isa).smart_init(
              {x.data(), out.data(), dtype, rows, columns, unit ? 4 * sigma : sigma, unit, seed, stream_id}, threads);
          for (int64_t row = 0; row < rows; ++row)
            for (int64_t column = 0; column < columns; ++column) {
              const Words4 words = philox(
                  {{static_cast<uint32_t>(column / 4), static_cast<uint32_t>(first_row + row), 1, stream_id}}, seed[0]);
              const double expected = x.get(row * columns + column) + sigma * exact_normal(words, column % 4);
              const double error = std::abs(out.get(row * columns + column) - expected);
              CHECK(error <= 1.1 * kHalfUnit[dtype == DType::bfloat16] * std::abs(expected) + 1e-6,
                    "%s: smart_init is off by %g at (%d, %d)", kIsaNames[static_cast<int>(isa)], error,
                    static_cast<int>(row), static_cast<int>(column));
            }
        }
}

struct Norm {
  bool infinity;
  double total = 0;

  void add(double v) { total = infinity ? std::fmax(total, std::abs(v)) : total + v * v; }
  double value() const { return infinity ? total : std::sqrt(total); }
};

void test_ascent_of(Isa isa, DType dtype, int64_t columns, bool infinity, bool per_sequence, bool onto_ball,
                    int threads) {
  const std::vector<int32_t> cu_seqlens = {0, 1, 8, 24, 57};
  const int64_t tokens = cu_seqlens.back(), size = tokens * columns;
  const int64_t groups = per_sequence ? static_cast<int64_t>(cu_seqlens.size()) - 1 : tokens;
  const double eta = 0.25, epsilon = 0.125;
  const float scale = 0.5f;
  Buffer perturbed(size, dtype, 0), x(size, dtype, 1), grad(size, dtype, 2), out(size, dtype, 3);
  for (int64_t i = 0; i < size; ++i) {
    x.set(i, number(i));
    perturbed.set(i, x.get(i) + 0.1 * number(size + i));
    grad.set(i, i / columns == 5 ? NAN : 1e-20 * number(2 * size + i));
    out.set(i, NAN);
  }
  kernels(isa).smart_ascend(
      {perturbed.data(), x.data(), grad.data(), out.data(), dtype, per_sequence ? cu_seqlens.data() : nullptr, groups,
       tokens, columns, static_cast<float>(eta / scale), static_cast<float>(epsilon / scale), &scale, infinity,
       onto_ball},
      threads);
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t begin = (per_sequence ? cu_seqlens[group] : group) * columns;
    const int64_t end = (per_sequence ? cu_seqlens[group + 1] : group + 1) * columns;
    Norm gradient_norm{infinity}, distance{infinity};
    bool finite = true;
    for (int64_t i = begin; i < end; ++i) gradient_norm.add(grad.get(i)), finite = finite && std::isfinite(grad.get(i));
    const auto stepped = [&](int64_t i) {
      return perturbed.get(i) + (finite ? eta * grad.get(i) / gradient_norm.value() : 0);
    };
    for (int64_t i = begin; i < end; ++i) distance.add(stepped(i) - x.get(i));
    for (int64_t i = begin; i < end; ++i) {
      const double offset = stepped(i) - x.get(i);
      double expected = offset;
      if (onto_ball && infinity)
        expected = std::fmin(std::fmax(offset, -epsilon), epsilon);
      else if (!onto_ball || distance.value() > epsilon)
        expected = offset * epsilon / distance.value();
      expected += x.get(i);
      CHECK(std::abs(out.get(i) - expected) <= 1.1 * kHalfUnit[dtype == DType::bfloat16] * std::abs(expected) + 1e-6,
            "%s: smart_ascend gives %g, expected %g", kIsaNames[static_cast<int>(isa)], out.get(i), expected);
    }
  }
}

}  // namespace

void test_smart(Isa isa) {
  if (isa == Isa::portable) test_single_normals();
  test_init(isa);
  for (const DType dtype : {DType::float32, DType::bfloat16})
    for (const int64_t columns : {1, 3, 8, 21, 64})
      for (int choice = 0; choice < 8; ++choice)
        for (const int threads : kThreadCounts)
          test_ascent_of(isa, dtype, columns, choice & 1, choice & 2, choice & 4, threads);
}

}  // namespace minbert
