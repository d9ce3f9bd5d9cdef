// Attention and its gradients against plain loops in float64: lengths around the blocks and panels, odd numbers of
// heads, tensors that are views of wider ones, and scratch memory of exactly the requested size.
#include "check.h"

namespace minbert {
namespace {

using Numbers = std::vector<double>;

// A Buffer of NaN.
Buffer poisoned(DType dtype, int64_t size) {
  Buffer buffer(size, dtype, 0);
  std::memset(buffer.data(), 0xFF, size * width(dtype));
  return buffer;
}

struct Case {
  AttentionProblem problem;
  QueriesKeysValues strides;
  HeadRows grad_strides;
  Buffer qkv, grad_out;
};

// Sums, and those of their terms' magnitudes.
struct Sums {
  Numbers value, magnitude;

  explicit Sums(int64_t size) : value(size), magnitude(size) {}

  void add(int64_t i, double term) {
    value[i] += term;
    magnitude[i] += std::abs(term);
  }
};

// The result [N, H, d] and the gradient [N, 3, H, d].
void attend(Case& c, Sums& out, Sums& grad) {
  const AttentionProblem& p = c.problem;
  const auto at = [&](int64_t part, int64_t token, int64_t head, int64_t i) {
    return c.qkv.get(token * c.strides.token_stride + part * c.strides.part_stride + head * c.strides.head_stride + i);
  };
  const auto grad_at = [&](int64_t token, int64_t head, int64_t i) {
    return c.grad_out.get(token * c.grad_strides.token_stride + head * c.grad_strides.head_stride + i);
  };
  const auto add_to_grad = [&](int64_t part, int64_t token, int64_t head, int64_t i, double term) {
    grad.add(((token * 3 + part) * p.heads + head) * p.head_dim + i, term);
  };
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
          scale[key] = keeps(p.dropout, key, query, head / 4, head % 4) ? p.keep_scale : 0;
        }
        for (int64_t key = 0; key < length; ++key) {
          probability[key] /= sum;
          const double dropped = probability[key] * scale[key];
          for (int64_t i = 0; i < p.head_dim; ++i) {
            out.add((query * p.heads + head) * p.head_dim + i, dropped * at(2, first + key, head, i));
            add_to_grad(2, first + key, head, i, dropped * grad_at(query, head, i));
            grad_probability[key] += scale[key] * grad_at(query, head, i) * at(2, first + key, head, i);
          }
          mean += probability[key] * grad_probability[key];
        }
        for (int64_t key = 0; key < length; ++key) {
          const double grad_score = p.scale * probability[key] * (grad_probability[key] - mean);
          for (int64_t i = 0; i < p.head_dim; ++i) {
            add_to_grad(0, query, head, i, grad_score * at(1, first + key, head, i));
            add_to_grad(1, first + key, head, i, grad_score * at(0, query, head, i));
          }
        }
      }
}

// `in_pairs`: each term's probability, or gradient of a score, is rounded to bfloat16, with an error of up to 2^-9.
void compare(const char* what, const Case& c, Buffer& got, const Sums& expected, bool in_pairs) {
  const double unit = c.problem.dtype == DType::float32 ? 1e-5 : 8e-3, of_term = in_pairs ? 0x1p-9 : 0;
  for (size_t i = 0; i < expected.value.size(); ++i) {
    const double wanted = expected.value[i], bound = unit * std::abs(wanted) + of_term * expected.magnitude[i] + 2e-5;
    CHECK(std::abs(got.get(i) - wanted) <= bound, "%s: element %d is %g, expected %g (%d heads of %d, %d tokens)", what,
          static_cast<int>(i), got.get(i), wanted, static_cast<int>(c.problem.heads),
          static_cast<int>(c.problem.head_dim), static_cast<int>(c.problem.tokens));
  }
}

// The same for the first token of each sequence alone: of the others, queries and gradients count for nothing.
void test_first_tokens(Isa isa, Case& c) {
  const AttentionProblem& p = c.problem;
  const int64_t row = p.heads * p.head_dim, s = p.sequences, n = p.tokens;
  Buffer queries = poisoned(p.dtype, s * row), keys_values = poisoned(p.dtype, 2 * n * row);
  Buffer grad_out = poisoned(p.dtype, s * row);
  for (int64_t i = 0; i < 2 * n * row; ++i)
    keys_values.set(i, c.qkv.get(i / (2 * row) * 3 * row + row + i % (2 * row)));
  Numbers of_first(n * row);
  for (int64_t i = 0; i < s * row; ++i) {
    const int64_t token = p.cu_seqlens[i / row];
    queries.set(i, c.qkv.get(token * 3 * row + i % row));
    of_first[token * row + i % row] = c.grad_out.get(token * row + i % row);
    grad_out.set(i, of_first[token * row + i % row]);
  }
  for (int64_t i = 0; i < n * row; ++i) c.grad_out.set(i, of_first[i]);
  Sums all(n * row), all_grads(3 * n * row), expected(s * row), queries_grad(s * row), others_grad(2 * n * row);
  attend(c, all, all_grads);
  for (int64_t i = 0; i < s * row; ++i) {
    const int64_t token = p.cu_seqlens[i / row];
    expected.value[i] = all.value[token * row + i % row];
    queries_grad.value[i] = all_grads.value[token * 3 * row + i % row];
  }
  for (int64_t i = 0; i < 2 * n * row; ++i)
    others_grad.value[i] = all_grads.value[i / (2 * row) * 3 * row + row + i % (2 * row)];
  for (const int threads : kThreadCounts) {
    Buffer out = poisoned(p.dtype, s * row), grads[] = {poisoned(p.dtype, s * row), poisoned(p.dtype, 2 * n * row)};
    std::vector<float> scratch(first_token_scratch(n, s, p.head_dim), NAN);
    CHECK(kernels(isa).first_token_attention(p, queries.data(), keys_values.data(), out.data(), scratch.data(),
                                             threads) &&
              kernels(isa).first_token_attention_backward(p, grad_out.data(), queries.data(), keys_values.data(),
                                                          grads[0].data(), grads[1].data(), scratch.data(), threads),
          "attention of first tokens refuses valid lengths");
    compare("attention of first tokens", c, out, expected, false);
    compare("its gradient of queries", c, grads[0], queries_grad, false);
    compare("its gradient of keys and values", c, grads[1], others_grad, false);
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
         poisoned(dtype, tokens * (3 * row + gap) - 2 * gap),
         poisoned(dtype, tokens * row - gap)};
  for (int64_t i = 0; i < tokens * (3 * row + gap) - 2 * gap; ++i) c.qkv.set(i, number(i));
  for (int64_t i = 0; i < tokens * row - gap; ++i) c.grad_out.set(i, number(i + (1 << 24)));
  c.strides.data = c.qkv.data();
  c.grad_strides.data = c.grad_out.data();

  const int64_t size = tokens * heads * head_dim;
  const bool in_pairs = isa == Isa::avx512bf16 && dtype == DType::bfloat16 && head_dim % 32 == 0;
  Sums expected(size), expected_grad(3 * size);
  attend(c, expected, expected_grad);
  std::vector<Buffer> first;
  for (const int threads : kThreadCounts) {
    Buffer out = poisoned(dtype, size), grad = poisoned(dtype, 3 * size);
    std::vector<uint8_t> keep(dropout ? tokens * heads * keep_bytes(longest) : 0, 0xFF);
    Buffer drawn_again = poisoned(dtype, 3 * size);
    for (const bool backward : {false, true}) {
      const int64_t bytes = kernels(isa).attention_scratch(problem, backward, threads);
      void* const scratch = std::aligned_alloc(64, bytes);
      std::memset(scratch, 0xFF, bytes);
      const auto run_backward = [&](const void* kept, Buffer& to) {
        return kernels(isa).attention_backward(problem, c.grad_strides, c.strides, kept, to.data(), scratch, threads);
      };
      uint8_t* const kept = dropout ? keep.data() : nullptr;
      const bool valid = backward ? run_backward(kept, grad) && run_backward(nullptr, drawn_again)
                                  : kernels(isa).attention(problem, c.strides, out.data(), kept, scratch, threads);
      CHECK(valid, "attention refuses valid lengths");
      std::free(scratch);
    }
    compare("attention", c, out, expected, in_pairs);
    compare("attention's gradient", c, grad, expected_grad, in_pairs);
    CHECK(std::memcmp(drawn_again.data(), grad.data(), 3 * size * width(dtype)) == 0,
          "attention's gradient differs where dropout's bits are drawn again");
    if (first.empty()) first = {out, grad};
    CHECK(std::memcmp(first[0].data(), out.data(), size * width(dtype)) == 0 &&
              std::memcmp(first[1].data(), grad.data(), 3 * size * width(dtype)) == 0,
          "attention differs between thread counts");
  }
  if (!views) test_first_tokens(isa, c);
}

void test_bad_lengths(Isa isa) {
  const std::vector<std::vector<int32_t>> bad = {{1, 9}, {0, 8}, {0, 7, 5, 9}, {0, 5, 5, 9}, {0, 9}};
  for (const auto& cu_seqlens : bad) {
    const AttentionProblem problem{
        DType::float32, cu_seqlens.data(), static_cast<int64_t>(cu_seqlens.size()) - 1, 9, 7, 1, 8, 1, {0, 0, 0}, 1};
    CHECK(!kernels(isa).attention(problem, {nullptr, 24, 8, 8}, nullptr, nullptr, nullptr, 1) &&
              !kernels(isa).attention_backward(problem, {nullptr, 8, 8}, {nullptr, 24, 8, 8}, nullptr, nullptr, nullptr,
                                               1),
          "attention accepts invalid lengths");
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

}  // namespace minbert
