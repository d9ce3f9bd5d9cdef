// Attention and its gradients against plain loops in float64: lengths around the blocks and panels, odd numbers of
// heads, tensors that are views of wider ones, and scratch memory of exactly the size that was asked for.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "launch.h"
#include "philox.h"

using namespace minbert;

namespace {

using Numbers = std::vector<double>;

double number(uint64_t i) {  // in [-1, 1), different for every i
  return philox({{static_cast<uint32_t>(i), 0, 0, 0}}, 7).word[0] / 2147483648.0 - 1;
}

// Float32 or bfloat16 elements, and what they stand for.
struct Tensor {
  DType dtype;
  std::vector<char> bytes;

  Tensor(DType dtype, int64_t size) : dtype(dtype), bytes(size * (dtype == DType::float32 ? 4 : 2), '\xFF') {}  // NaN

  double get(int64_t i) const {
    float value;
    if (dtype == DType::float32) {
      std::memcpy(&value, bytes.data() + 4 * i, 4);
    } else {
      uint16_t half;
      std::memcpy(&half, bytes.data() + 2 * i, 2);
      const uint32_t bits = static_cast<uint32_t>(half) << 16;
      std::memcpy(&value, &bits, 4);
    }
    return value;
  }

  void set(int64_t i, float value) {  // truncates to bfloat16
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint16_t half = static_cast<uint16_t>(bits >> 16);
    if (dtype == DType::float32)
      std::memcpy(bytes.data() + 4 * i, &value, 4);
    else
      std::memcpy(bytes.data() + 2 * i, &half, 2);
  }
};

struct Case {
  AttentionProblem problem;
  QueriesKeysValues strides;
  HeadRows grad_strides;
  Tensor qkv, grad_out;
};

// The result [N, H, d] and the gradient [N, 3, H, d].
void attend(const Case& c, Numbers& out, Numbers& grad) {
  const AttentionProblem& p = c.problem;
  const auto at = [&](int64_t part, int64_t token, int64_t head, int64_t i) {
    return c.qkv.get(token * c.strides.token_stride + part * c.strides.part_stride + head * c.strides.head_stride + i);
  };
  const auto grad_at = [&](int64_t token, int64_t head, int64_t i) {
    return c.grad_out.get(token * c.grad_strides.token_stride + head * c.grad_strides.head_stride + i);
  };
  const auto grad_of = [&](int64_t part, int64_t token, int64_t head, int64_t i) -> double& {
    return grad[((token * 3 + part) * p.heads + head) * p.head_dim + i];
  };
  out.assign(p.tokens * p.heads * p.head_dim, 0);
  grad.assign(3 * out.size(), 0);
  for (int64_t s = 0; s < p.sequences; ++s)
    for (int64_t head = 0; head < p.heads; ++head)
      for (int64_t query = p.cu_seqlens[s]; query < p.cu_seqlens[s + 1]; ++query) {
        const int64_t first = p.cu_seqlens[s], length = p.cu_seqlens[s + 1] - first;
        Numbers probability(length), scale(length), grad_probability(length);
        double sum = 0, mean = 0;
        for (int64_t key = 0; key < length; ++key) {
          double score = 0;
          for (int64_t i = 0; i < p.head_dim; ++i) score += at(0, query, head, i) * at(1, first + key, head, i);
          sum += probability[key] = std::exp(p.scale * score);
          const Words4 words = philox({{static_cast<uint32_t>(key), p.dropout.first_row + static_cast<uint32_t>(query),
                                        static_cast<uint32_t>(head / 4), p.dropout.stream_id}},
                                      p.dropout.seed);
          scale[key] = words.word[head % 4] >= p.dropout.threshold ? p.keep_scale : 0;
        }
        for (int64_t key = 0; key < length; ++key) {
          probability[key] /= sum;
          const double dropped = probability[key] * scale[key];
          for (int64_t i = 0; i < p.head_dim; ++i) {
            out[(query * p.heads + head) * p.head_dim + i] += dropped * at(2, first + key, head, i);
            grad_of(2, first + key, head, i) += dropped * grad_at(query, head, i);
            grad_probability[key] += scale[key] * grad_at(query, head, i) * at(2, first + key, head, i);
          }
          mean += probability[key] * grad_probability[key];
        }
        for (int64_t key = 0; key < length; ++key) {
          const double grad_score = p.scale * probability[key] * (grad_probability[key] - mean);
          for (int64_t i = 0; i < p.head_dim; ++i) {
            grad_of(0, query, head, i) += grad_score * at(1, first + key, head, i);
            grad_of(1, first + key, head, i) += grad_score * at(0, query, head, i);
          }
        }
      }
}

void compare(const char* what, const Case& c, const Tensor& got, const Numbers& expected) {
  const double unit = c.problem.dtype == DType::float32 ? 1e-5 : 8e-3;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double error = std::abs(got.get(i) - expected[i]);
    if (error <= unit * std::abs(expected[i]) + 2e-5) continue;
    std::fprintf(stderr, "%s: element %d is %g, expected %g (%d heads of %d, %d tokens)\n", what, static_cast<int>(i),
                 got.get(i), expected[i], static_cast<int>(c.problem.heads), static_cast<int>(c.problem.head_dim),
                 static_cast<int>(c.problem.tokens));
    std::exit(1);
  }
}

void test_case(Isa isa, const std::vector<int32_t>& cu_seqlens, int64_t heads, int64_t head_dim, DType dtype,
               bool dropout, bool views) {
  const int64_t sequences = static_cast<int64_t>(cu_seqlens.size()) - 1, tokens = cu_seqlens.back();
  int64_t longest = 0;
  for (int64_t s = 0; s < sequences; ++s)
    if (cu_seqlens[s + 1] - cu_seqlens[s] > longest) longest = cu_seqlens[s + 1] - cu_seqlens[s];
  const AttentionProblem problem{dtype,
                                 cu_seqlens.data(),
                                 sequences,
                                 tokens,
                                 longest,
                                 heads,
                                 head_dim,
                                 0.4f,
                                 {int64_t{-5} * (int64_t{1} << 33) + 99, dropout ? 1u << 30 : 0u, 17, 1, ~0u - 40},
                                 dropout ? 1 / 0.75f : 1.0f};
  const int64_t gap = views ? 5 : 0, row = heads * head_dim + gap;
  Case c{problem,
         {nullptr, 3 * row + gap, row, head_dim},
         {nullptr, row, head_dim},
         {dtype, tokens * (3 * row + gap) - 2 * gap},
         {dtype, tokens * row - gap}};
  for (int64_t i = 0; i < tokens * (3 * row + gap) - 2 * gap; ++i) c.qkv.set(i, static_cast<float>(number(i)));
  for (int64_t i = 0; i < tokens * row - gap; ++i) c.grad_out.set(i, static_cast<float>(number(i + (1 << 24))));
  c.strides.data = c.qkv.bytes.data();
  c.grad_strides.data = c.grad_out.bytes.data();

  Numbers expected, expected_grad;
  attend(c, expected, expected_grad);
  std::vector<std::vector<char>> first;
  for (const int threads : {1, 3}) {
    Tensor out(dtype, tokens * heads * head_dim), grad(dtype, 3 * tokens * heads * head_dim);
    for (const bool backward : {false, true}) {
      const int64_t size = kernels(isa).attention_scratch(problem, backward, threads);
      void* const scratch = std::aligned_alloc(64, size);
      std::memset(scratch, 0xFF, size);
      const bool valid = backward ? kernels(isa).attention_backward(problem, c.grad_strides, c.strides,
                                                                    grad.bytes.data(), scratch, threads)
                                  : kernels(isa).attention(problem, c.strides, out.bytes.data(), scratch, threads);
      if (!valid) std::fprintf(stderr, "attention refuses good lengths\n"), std::exit(1);
      std::free(scratch);
    }
    compare("attention", c, out, expected);
    compare("attention's gradient", c, grad, expected_grad);
    if (first.empty()) first = {out.bytes, grad.bytes};
    if (first[0] != out.bytes || first[1] != grad.bytes)
      std::fprintf(stderr, "attention differs between thread counts\n"), std::exit(1);
  }
}

void test_bad_lengths(Isa isa) {
  const std::vector<std::vector<int32_t>> bad = {{1, 9}, {0, 8}, {0, 7, 5, 9}, {0, 5, 5, 9}, {0, 9}};
  for (const auto& cu_seqlens : bad) {
    const AttentionProblem problem{
        DType::float32, cu_seqlens.data(), static_cast<int64_t>(cu_seqlens.size()) - 1, 9, 7, 1, 8, 1, {0, 0, 0}, 1};
    if (kernels(isa).attention(problem, {nullptr, 24, 8, 8}, nullptr, nullptr, 1) ||
        kernels(isa).attention_backward(problem, {nullptr, 8, 8}, {nullptr, 24, 8, 8}, nullptr, nullptr, 1))
      std::fprintf(stderr, "attention takes bad lengths\n"), std::exit(1);
  }
}

}  // namespace

void test_attention(Isa isa) {
  for (const DType dtype : {DType::float32, DType::bfloat16})
    for (const bool dropout : {false, true}) {
      test_case(isa, {0, 1, 8, 24, 57, 122, 251}, 5, 24, dtype, dropout, true);
      test_case(isa, {0, 64, 66, 79}, 4, 32, dtype, dropout, false);
      test_case(isa, {0, 131}, 1, 128, dtype, dropout, false);
      test_case(isa, {0, 33, 65, 66}, 3, 8, dtype, dropout, true);
    }
  test_bad_lengths(isa);
}
