// Attention within the sequences of a packed stream, forward and backward. A work item is one sequence and a few heads:
// it converts its rows to float32, holds whole rows of scores for a block of queries, and writes its part of the result
// once. No two items write the same output, so that the result does not depend on the thread count.
#include "cpu/attention_tiles.h"
#include "cpu/dropout_mask.h"
#include "cpu/head_matrices.h"
#include "cpu/softmax.h"

namespace minbert::MINBERT_ISA {
namespace {

enum Part { kQueries, kKeys, kValues };

// The rows [row, row + rows) of an item.
template <class Element>
Heads<const Element> heads_of(const AttentionProblem& p, QueriesKeysValues qkv, Part part, const Item& item,
                              int64_t row, int64_t rows) {
  const Element* const data = static_cast<const Element*>(qkv.data) + (item.first_token + row) * qkv.token_stride +
                              part * qkv.part_stride + item.first_head * qkv.head_stride;
  return {data, qkv.token_stride, qkv.head_stride, rows, item.heads, p.head_dim};
}

template <class Element>
Heads<const Element> heads_of(const AttentionProblem& p, HeadRows x, const Item& item, int64_t row, int64_t rows) {
  const Element* const data =
      static_cast<const Element*>(x.data) + (item.first_token + row) * x.token_stride + item.first_head * x.head_stride;
  return {data, x.token_stride, x.head_stride, rows, item.heads, p.head_dim};
}

// The same rows of a contiguous output [N, parts, H, d].
template <class Element>
Heads<Element> heads_of(const AttentionProblem& p, Element* x, int64_t parts, int64_t part, const Item& item,
                        int64_t row, int64_t rows) {
  const int64_t token = item.first_token + row, stride = p.heads * p.head_dim;
  return {x + (token * parts + part) * stride + item.first_head * p.head_dim,
          parts * stride,
          p.head_dim,
          rows,
          item.heads,
          p.head_dim};
}

void keep_rows(const AttentionProblem& p, const Item& item, int64_t row, int64_t rows, int64_t keys, uint8_t* keep) {
  const Keys philox_keys(p.dropout.seed);
  for (int64_t i = 0; i < rows; ++i)
    keep_query(keep + i * keys, rows * keys, item.first_head, item.heads, keys, item.first_token + row + i, p.dropout,
               philox_keys);
}

template <class Element>
void attend(const AttentionProblem& p, QueriesKeysValues qkv, Element* out, const Item& item, Allocator& scratch) {
  const Buffers b(scratch, item.length, p.head_dim, false);
  const int64_t keys = round_up(item.length, kPanel), columns = round_up(p.head_dim, kFloats);
  const int64_t blocks = (item.length + kBlockRows - 1) / kBlockRows;
  float factors[kGroup][kBlockRows];
  load_heads(heads_of<Element>(p, qkv, kKeys, item, 0, item.length), 1, b.keys, columns);
  load_heads(heads_of<Element>(p, qkv, kValues, item, 0, item.length), 1, b.values, columns);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t row = item.length * block / blocks, rows = item.length * (block + 1) / blocks - row;
    load_heads(heads_of<Element>(p, qkv, kQueries, item, row, rows), p.scale, b.queries, columns);
    if (p.dropout.threshold) keep_rows(p, item, row, rows, keys, b.keep);
    for (int64_t head = 0; head < item.heads; ++head) {
      if (block == 0) transpose_into_panels(b.keys[head], columns, item.length, p.head_dim, b.keys_transposed[head]);
      multiply({b.queries[head], columns, false}, {b.keys_transposed[head], kPanel, p.head_dim * kPanel}, rows,
               p.head_dim, item.length, b.scores, keys);
      for (int64_t i = 0; i < rows; ++i) {
        float* const scores = b.scores + i * keys;
        const uint8_t* const keep = b.keep + (head * rows + i) * keys;
        factors[head][i] = p.keep_scale / (p.dropout.threshold ? exponentials<true>(scores, item.length, keep)
                                                               : exponentials<false>(scores, item.length, keep));
      }
      multiply({b.scores, keys, false}, {b.values[head], columns, kPanel}, rows, item.length, p.head_dim,
               b.queries[head], columns);  // overwrites the queries, which are not needed any more
    }
    store_heads(
        b.queries, columns, [&](int64_t head, int64_t i) { return factors[head][i]; },
        heads_of(p, out, 1, 0, item, row, rows));
  }
}

template <class Element>
void attend_backward(const AttentionProblem& p, HeadRows grad_out, QueriesKeysValues qkv, Element* grad_qkv,
                     const Item& item, Allocator& scratch) {
  const Buffers b(scratch, item.length, p.head_dim, true);
  const int64_t keys = round_up(item.length, kPanel), columns = round_up(p.head_dim, kFloats);
  const int64_t blocks = (item.length + kBlockRows - 1) / kBlockRows;
  const auto store = [&](float* const* from, Part part, int64_t row, int64_t rows, float factor) {
    store_heads(
        from, columns, [&](int64_t, int64_t) { return factor; }, heads_of(p, grad_qkv, 3, part, item, row, rows));
  };
  load_heads(heads_of<Element>(p, qkv, kKeys, item, 0, item.length), 1, b.keys, columns);
  load_heads(heads_of<Element>(p, qkv, kValues, item, 0, item.length), 1, b.values, columns);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t row = item.length * block / blocks, rows = item.length * (block + 1) / blocks - row;
    load_heads(heads_of<Element>(p, qkv, kQueries, item, row, rows), p.scale, b.queries, columns);
    load_heads(heads_of<Element>(p, grad_out, item, row, rows), p.keep_scale, b.grad_out, columns);
    if (p.dropout.threshold) keep_rows(p, item, row, rows, keys, b.keep);
    for (int64_t head = 0; head < item.heads; ++head) {
      if (block == 0) {
        transpose_into_panels(b.keys[head], columns, item.length, p.head_dim, b.keys_transposed[head]);
        transpose_into_panels(b.values[head], columns, item.length, p.head_dim, b.values_transposed[head]);
      }
      multiply({b.queries[head], columns, false}, {b.keys_transposed[head], kPanel, p.head_dim * kPanel}, rows,
               p.head_dim, item.length, b.scores, keys);
      multiply({b.grad_out[head], columns, false}, {b.values_transposed[head], kPanel, p.head_dim * kPanel}, rows,
               p.head_dim, item.length, b.grad_scores, keys);
      for (int64_t i = 0; i < rows; ++i) {
        float *const scores = b.scores + i * keys, *const grads = b.grad_scores + i * keys;
        const uint8_t* const keep = b.keep + (head * rows + i) * keys;
        p.dropout.threshold ? softmax_backward<true>(scores, grads, item.length, keep)
                            : softmax_backward<false>(scores, grads, item.length, keep);
      }
      // The gradients overwrite the values and then the queries, which are not needed any more.
      multiply({b.scores, keys, true}, {b.grad_out[head], columns, kPanel}, item.length, rows, p.head_dim,
               b.values[head], columns, block > 0);
      multiply({b.grad_scores, keys, true}, {b.queries[head], columns, kPanel}, item.length, rows, p.head_dim,
               b.grad_keys[head], columns, block > 0);
      multiply({b.grad_scores, keys, false}, {b.keys[head], columns, kPanel}, rows, item.length, p.head_dim,
               b.queries[head], columns);
    }
    store(b.queries, kQueries, row, rows, p.scale);
  }
  store(b.grad_keys, kKeys, 0, item.length, 1);
  store(b.values, kValues, 0, item.length, 1);
}

}  // namespace

int64_t attention_scratch(const AttentionProblem& p, bool backward, int threads) noexcept {
  Allocator counter{nullptr, 0};
  counter.allocate<int32_t>(p.sequences);
  return counter.used + threads * scratch_of_thread(p, backward);
}

bool attention(const AttentionProblem& p, QueriesKeysValues qkv, void* out, void* scratch, int threads) noexcept {
  if (!lengths_are_valid(p)) return false;
  for_each_item(p, false, scratch, threads, [&](const Item& item, Allocator& allocator) {
    with_activation(p.dtype,
                    [&](auto element) { attend(p, qkv, static_cast<decltype(element)*>(out), item, allocator); });
  });
  return true;
}

bool attention_backward(const AttentionProblem& p, HeadRows grad_out, QueriesKeysValues qkv, void* grad_qkv,
                        void* scratch, int threads) noexcept {
  if (!lengths_are_valid(p)) return false;
  for_each_item(p, true, scratch, threads, [&](const Item& item, Allocator& allocator) {
    with_activation(p.dtype, [&](auto element) {
      attend_backward(p, grad_out, qkv, static_cast<decltype(element)*>(grad_qkv), item, allocator);
    });
  });
  return true;
}

}  // namespace minbert::MINBERT_ISA
