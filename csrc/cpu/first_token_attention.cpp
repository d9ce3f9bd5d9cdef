// Attention of the first token of every sequence, forward and backward. A work item is a sequence. One query reads each
// key and value once: there is nothing to tile, and memory bounds it.
#include "cpu/attention_tiles.h"
#include "cpu/dropout_mask.h"
#include "cpu/rowwise.h"
#include "cpu/softmax.h"

namespace minbert::MINBERT_ISA {
namespace {

// One sequence: its scratch memory, and where its heads are.
struct FirstToken {
  const AttentionProblem& p;
  int64_t sequence, first_token, length;
  float *scores, *grads, *query, *grad_out;
  uint8_t* keep;  // [kGroup, padded(length)]

  FirstToken(const AttentionProblem& p, int64_t sequence, float* scratch)
      : p(p), sequence(sequence), first_token(p.cu_seqlens[sequence]) {
    length = p.cu_seqlens[sequence + 1] - first_token;
    const int64_t row = padded(length), head = padded(p.head_dim);
    scores = scratch + first_token_scratch(first_token, sequence, p.head_dim);
    grads = scores + row;
    keep = reinterpret_cast<uint8_t*>(grads + row);
    query = grads + 2 * row;
    grad_out = query + head;
  }

  int64_t at(int64_t head) const { return (sequence * p.heads + head) * p.head_dim; }  // in [S, H, d]
  int64_t keys_at(int64_t token, int64_t part, int64_t head) const {                   // in [N, 2, H, d]
    return (((first_token + token) * 2 + part) * p.heads + head) * p.head_dim;
  }
  const uint8_t* keep_of(int64_t head) const { return keep + head % kGroup * padded(length); }

  // Draws the masks of a group of heads before the first of them.
  void draw_masks(int64_t head, const Keys& keys) const {
    if (p.dropout.threshold && head % kGroup == 0)
      keep_query(keep, padded(length), head, smaller(kGroup, p.heads - head), length, first_token, p.dropout, keys);
  }
};

template <class Element>
void load_row(const Element* from, float factor, int64_t columns, float* to) {
  along_row(columns,
            [&](int64_t at, int, int64_t count) { store_raw(to + at, load_first(from + at, count) * factor); });
}

// to[token] = the inner product of `row` and a token's key or value.
template <class Element>
void inner_products(const FirstToken& s, const float* row, const Element* keys_values, int64_t part, int64_t head,
                    float* to) {
  for (int64_t token = 0; token < s.length; ++token) {
    const Element* const other = keys_values + s.keys_at(token, part, head);
    Floats sum{};
    along_row(s.p.head_dim,
              [&](int64_t at, int, int64_t count) { sum += load<Floats>(row + at) * load_first(other + at, count); });
    to[token] = sum_of_lanes(sum)[0];
  }
}

// to = factor times the sum of the tokens' keys or values, each times its weight.
template <class Element>
void weighted_sum(const FirstToken& s, const float* weights, const Element* keys_values, int64_t part, int64_t head,
                  float factor, Element* to) {
  along_row(s.p.head_dim, [&](int64_t at, int, int64_t count) {
    Floats sum{};
    for (int64_t token = 0; token < s.length; ++token)
      sum += weights[token] * load_first(keys_values + s.keys_at(token, part, head) + at, count);
    store_first(to + at, sum * factor, count);
  });
}

// The gradient of every token's key or value: its weight times `row`.
template <class Element>
void outer_product(const FirstToken& s, const float* weights, const float* row, int64_t part, int64_t head,
                   Element* grad_keys_values) {
  for (int64_t token = 0; token < s.length; ++token) {
    Element* const to = grad_keys_values + s.keys_at(token, part, head);
    along_row(s.p.head_dim, [&](int64_t at, int, int64_t count) {
      store_first(to + at, weights[token] * load<Floats>(row + at), count);
    });
  }
}

enum Part { kKeys, kValues };

template <class Element>
void attend(const FirstToken& s, const Element* queries, const Element* keys_values, Element* out, const Keys& keys) {
  const AttentionProblem& p = s.p;
  for (int64_t head = 0; head < p.heads; ++head) {
    s.draw_masks(head, keys);
    load_row(queries + s.at(head), p.scale, p.head_dim, s.query);
    inner_products(s, s.query, keys_values, kKeys, head, s.scores);
    const float sum = p.dropout.threshold ? exponentials<true>(s.scores, s.length, s.keep_of(head))
                                          : exponentials<false>(s.scores, s.length, nullptr);
    weighted_sum(s, s.scores, keys_values, kValues, head, p.keep_scale / sum, out + s.at(head));
  }
}

template <class Element>
void attend_backward(const FirstToken& s, const Element* grad_out, const Element* queries, const Element* keys_values,
                     Element* grad_queries, Element* grad_keys_values, const Keys& keys) {
  const AttentionProblem& p = s.p;
  for (int64_t head = 0; head < p.heads; ++head) {
    s.draw_masks(head, keys);
    load_row(queries + s.at(head), p.scale, p.head_dim, s.query);
    load_row(grad_out + s.at(head), p.keep_scale, p.head_dim, s.grad_out);
    inner_products(s, s.query, keys_values, kKeys, head, s.scores);
    inner_products(s, s.grad_out, keys_values, kValues, head, s.grads);
    p.dropout.threshold ? softmax_backward<true>(s.scores, s.grads, s.length, s.keep_of(head))
                        : softmax_backward<false>(s.scores, s.grads, s.length, nullptr);
    outer_product(s, s.grads, s.query, kKeys, head, grad_keys_values);
    outer_product(s, s.scores, s.grad_out, kValues, head, grad_keys_values);
    weighted_sum(s, s.grads, keys_values, kKeys, head, p.scale, grad_queries + s.at(head));
  }
}

// Calls run(element, sequence, keys) for every sequence.
template <class Run>
bool for_each_sequence(const AttentionProblem& p, float* scratch, int threads, const Run& run) {
  if (!lengths_are_valid(p)) return false;
  const Keys keys(p.dropout.seed);
  with_activation(p.dtype, [&](auto element) {
    parallel(threads, p.sequences, 16 * p.tokens * p.heads * p.head_dim,
             [&](int64_t sequence) { run(element, FirstToken(p, sequence, scratch), keys); });
  });
  return true;
}

}  // namespace

bool first_token_attention(const AttentionProblem& p, const void* queries, const void* keys_values, void* out,
                           float* scratch, int threads) noexcept {
  return for_each_sequence(p, scratch, threads, [&](auto element, const FirstToken& s, const Keys& keys) {
    using Element = decltype(element);
    attend(s, static_cast<const Element*>(queries), static_cast<const Element*>(keys_values),
           static_cast<Element*>(out), keys);
  });
}

bool first_token_attention_backward(const AttentionProblem& p, const void* grad_out, const void* queries,
                                    const void* keys_values, void* grad_queries, void* grad_keys_values, float* scratch,
                                    int threads) noexcept {
  return for_each_sequence(p, scratch, threads, [&](auto element, const FirstToken& s, const Keys& keys) {
    using Element = decltype(element);
    attend_backward(s, static_cast<const Element*>(grad_out), static_cast<const Element*>(queries),
                    static_cast<const Element*>(keys_values), static_cast<Element*>(grad_queries),
                    static_cast<Element*>(grad_keys_values), keys);
  });
}

}  // namespace minbert::MINBERT_ISA
