// Every kernel against plain loops: all instruction sets, odd sizes and alignments, one thread and several. Buffers
// have the exact sizes, so that AddressSanitizer detects accesses beyond them.
#include "check.h"

using namespace minbert;

namespace {

void test_surgery(Isa isa) {
  for (const int64_t tasks : {1, 2, 3, 4, 5, 7})
    for (const int64_t shift : {0, 3}) {
      Problem problem(tasks, {1, 7, 33, 1025, 0, 2049, kChunk + 13}, shift);
      const int64_t tensors = static_cast<int64_t>(problem.sizes.size());
      std::vector<double> expected(tasks * tasks), magnitude(tasks * tasks), weights(tasks), first;
      for (int64_t t = 0; t < tasks; ++t) weights[t] = 1.0 - 0.3 * t;
      for (int64_t i = 0; i < tasks; ++i)
        for (int64_t j = 0; j < tasks; ++j)
          for (int64_t k = 0; k < tensors; ++k) {
            if (!problem.data[i * tensors + k] || !problem.data[j * tensors + k]) continue;
            for (int64_t at = 0; at < problem.sizes[k]; ++at) {
              const double term = problem.rows[i * tensors + k].get(at) * problem.rows[j * tensors + k].get(at);
              expected[i * tasks + j] += term;
              magnitude[i * tasks + j] += std::abs(term);
            }
          }
      for (const int threads : kThreadCounts) {
        std::vector<double> partials(problem.first_chunk.back() * tasks * tasks), gram(tasks * tasks, NAN);
        kernels(isa).gram(problem.view(), partials.data(), gram.data(), threads);
        for (int64_t entry = 0; entry < tasks * tasks; ++entry)
          CHECK(std::abs(gram[entry] - expected[entry]) <= 1e-13 * magnitude[entry],
                "%s: gram entry %d of %d tasks is %.17g, expected %.17g", kIsaNames[static_cast<int>(isa)],
                static_cast<int>(entry), static_cast<int>(tasks), gram[entry], expected[entry]);
        if (first.empty()) first = gram;
        CHECK(std::memcmp(first.data(), gram.data(), gram.size() * sizeof(double)) == 0,
              "gram differs between thread counts");

        std::vector<Buffer> results;
        std::vector<void*> out;
        for (int64_t k = 0; k < tensors; ++k) results.emplace_back(problem.sizes[k], problem.dtypes[k], shift);
        for (auto& result : results) out.push_back(result.data());
        for (int64_t k = 0; k < tensors; ++k)
          for (int64_t at = 0; at < problem.sizes[k]; ++at) results[k].set(at, NAN);
        kernels(isa).combine(problem.view(), weights.data(), out.data(), threads);
        for (int64_t k = 0; k < tensors; ++k) {
          const double unit = problem.dtypes[k] == DType::float64   ? 1e-15
                              : problem.dtypes[k] == DType::float32 ? 1e-6
                                                                    : 8e-3;
          for (int64_t at = 0; at < problem.sizes[k]; ++at) {
            double sum = 0, size = 0;
            for (int64_t t = 0; t < tasks; ++t)
              if (problem.data[t * tensors + k]) {
                sum += weights[t] * problem.rows[t * tensors + k].get(at);
                size += std::abs(weights[t] * problem.rows[t * tensors + k].get(at));
              }
            CHECK(std::abs(results[k].get(at) - sum) <= unit * size, "%s: combine gives %g, expected %g",
                  kIsaNames[static_cast<int>(isa)], results[k].get(at), sum);
          }
        }
      }
    }
}

void test_model_parts(Isa isa) {
  for (const int64_t tasks : {1, 3, 5})
    for (const int threads : kThreadCounts)
      check_model_parts(tasks, {[=](const TaskGradients& g, double* partials, double* gram) {
                                  kernels(isa).gram(g, partials, gram, threads);
                                },
                                [=](const TaskGradients& g, const double* weights, void* const* out) {
                                  kernels(isa).combine(g, weights, out, threads);
                                },
                                [=](const TaskGradients& g, const double* weights, AdamWState state, AdamWStep step) {
                                  kernels(isa).combine_adamw(g, weights, state, step, {}, threads);
                                }});
}

// Large enough for streaming stores, and written over row 0 itself.
void test_large_combine(Isa isa) {
  const int64_t size = (int64_t{16} << 20) / 4 + 5;
  for (const bool in_place : {false, true}) {
    std::vector<float> a(size), b(size), out(size, NAN);
    for (int64_t i = 0; i < size; ++i) a[i] = static_cast<float>(i % 1021), b[i] = static_cast<float>(i % 509);
    const std::vector<float> original = a;
    const void* data[] = {a.data(), b.data()};
    void* outputs[] = {in_place ? a.data() : out.data()};
    const DType dtype = DType::float32;
    const int64_t first_chunk[] = {0, (size + kChunk - 1) / kChunk};
    const double weights[] = {2, -1};
    kernels(isa).combine({2, 1, data, &dtype, &size, first_chunk}, weights, outputs, 3);
    const float* result = static_cast<const float*>(outputs[0]);
    for (int64_t i = 0; i < size; ++i)
      CHECK(result[i] == 2 * original[i] - b[i], "%s: combine at %lld", kIsaNames[static_cast<int>(isa)],
            static_cast<long long>(i));
  }
}

void test_masks(Isa isa) {
  const uint32_t first_row = ~0u - 20;  // among the masks' rows, numbers begin again at 0
  const Dropout dropout{int64_t{-5} * (int64_t{1} << 33) + 99, 429496729u, 17, 1, first_row};
  for (const int64_t rows : {1, 2, 33})
    for (const int64_t columns : {1, 3, 4, 15, 64, 129, 768})
      for (const int threads : kThreadCounts) {
        std::vector<uint8_t> keep(rows * columns, 2);
        kernels(isa).dropout_mask(keep.data(), rows, columns, dropout, threads);
        for (int64_t row = 0; row < rows; ++row)
          for (int64_t column = 0; column < columns; ++column) {
            CHECK(keep[row * columns + column] == keeps(dropout, column / 4, row, 0, column % 4),
                  "%s: dropout_mask at (%d, %d)", kIsaNames[static_cast<int>(isa)], static_cast<int>(row),
                  static_cast<int>(column));
          }
      }

  const std::vector<int32_t> cu_seqlens = {0, 1, 8, 24, 57, 190};
  const int64_t sequences = static_cast<int64_t>(cu_seqlens.size()) - 1;
  for (const int64_t heads : {1, 3, 4, 6, 12})
    for (const int threads : kThreadCounts) {
      int64_t size = 0;
      for (int64_t s = 0; s < sequences; ++s) {
        const int64_t length = cu_seqlens[s + 1] - cu_seqlens[s];
        size += heads * length * length;
      }
      std::vector<uint8_t> keep(size, 2);
      kernels(isa).attention_dropout_mask(keep.data(), cu_seqlens.data(), sequences, heads, dropout, threads);
      const uint8_t* at = keep.data();
      for (int64_t s = 0; s < sequences; ++s)
        for (int64_t head = 0; head < heads; ++head)
          for (int32_t query = cu_seqlens[s]; query < cu_seqlens[s + 1]; ++query)
            for (int32_t key = 0; key < cu_seqlens[s + 1] - cu_seqlens[s]; ++key) {
              CHECK(*at++ == keeps(dropout, key, query, head / 4, head % 4), "%s: attention_dropout_mask",
                    kIsaNames[static_cast<int>(isa)]);
            }
    }
}

// The known answers of Salmon et al.'s Random123, kat_vectors.
void test_philox() {
  const uint32_t zeros[] = {0x5f6fb709, 0x0d893f64, 0x4f121f81, 0x4f730a48};
  const uint32_t ones[] = {0x5207ddc2, 0x45165e59, 0x4d8ee751, 0x8c52f662};
  const uint32_t pi[] = {0x4dfccaba, 0x190a87f0, 0xc47362ba, 0xb6b5242a};
  const Words4 digits{{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}};
  CHECK(std::memcmp(philox({{0, 0, 0, 0}}, 0).word, zeros, sizeof(zeros)) == 0, "philox of zeros");
  CHECK(std::memcmp(philox({{~0u, ~0u, ~0u, ~0u}}, -1).word, ones, sizeof(ones)) == 0, "philox of ones");
  CHECK(std::memcmp(philox(digits, 0x299f31d0a4093822).word, pi, sizeof(pi)) == 0, "philox of the digits of pi");
}

}  // namespace

int main() {
  test_philox();
  test_cuda_on_host();
  test_quadratic_programs();
  for (const Isa isa : {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512bf16}) {
    if (!supports(isa)) {
      std::printf("%s: not on this processor\n", kIsaNames[static_cast<int>(isa)]);
      continue;
    }
    test_surgery(isa);
    test_model_parts(isa);
    test_large_combine(isa);
    test_masks(isa);
    test_adamw(isa);
    test_smart(isa);
    test_weightings(isa);
    test_rowwise(isa);
    test_attention(isa);
    std::printf("%s: ok\n", kIsaNames[static_cast<int>(isa)]);
  }
}
