// Attention within the sequences of a packed stream, forward and backward. A work item is one sequence and a few heads:
// for a block of queries it holds the scores of all keys, transposed, and it writes its part of the result once. No two
// items write the same output, so that the result does not depend on the thread count.
#include "cpu/attention_tiles.h"
#include "cpu/keep_bits.h"
#include "cpu/operands.h"
#include "cpu/softmax_of_columns.h"

namespace minbert::MINBERT_ISA {
namespace {

enum Part { kQueries, kKeys, kValues };

// The rows [row, row + rows) of one of an item's heads.
template <class Element>
Head<const Element> head_of(const AttentionProblem& p, QueriesKeysValues qkv, int part, const Item& item, int64_t head,
                            int64_t row, int64_t rows) {
  const Element* const data = static_cast<const Element*>(qkv.data) + (item.first_token + row) * qkv.token_stride +
                              part * qkv.part_stride + (item.first_head + head) * qkv.head_stride;
  return {data, qkv.token_stride, rows, p.head_dim};
}

template <class Element>
Head<const Element> head_of(const AttentionProblem& p, HeadRows x, const Item& item, int64_t head, int64_t row,
                            int64_t rows) {
  const Element* const data = static_cast<const Element*>(x.data) + (item.first_token + row) * x.token_stride +
                              (item.first_head + head) * x.head_stride;
  return {data, x.token_stride, rows, p.head_dim};
}

// The same rows of a contiguous output [N, parts, H, d].
template <class Element>
Head<Element> head_of(const AttentionProblem& p, Element* x, int64_t parts, int64_t part, const Item& item,
                      int64_t head, int64_t row, int64_t rows) {
  const int64_t stride = p.heads * p.head_dim;
  return {x + ((item.first_token + row) * parts + part) * stride + (item.first_head + head) * p.head_dim,
          parts * stride, rows, p.head_dim};
}

void keep_block(const AttentionProblem& p, const Item& item, const Queries& queries, KeepBits* keep) {
  const Keys philox_keys(p.dropout.seed);
  for (int64_t i = 0; i < queries.registers; ++i)
    keep_queries(keep + i * item.length, queries.registers * item.length, item.first_head, item.heads, item.length,
                 item.first_token + queries.first + i * kFloats, p.dropout, philox_keys);
}

// The scores of one head for a block of queries.
template <class Unit>
Block block_of(const AttentionProblem& p, const Item& item, const Queries& queries, int64_t head,
               const Buffers<Unit>& b) {
  const KeepBits* const keep = b.keep + head * queries.registers * item.length;
  return {b.scores, b.grads, queries.registers * kFloats, item.length, p.scale, keep};
}

template <class Unit, class Element>
void attend(const AttentionProblem& p, QueriesKeysValues qkv, Element* out, const Item& item, Allocator& scratch,
            const Item& next) {
  const Buffers<Unit> b(scratch, item.length, p.head_dim, false);
  const int64_t columns = round_up(p.head_dim, kFloats), depth = p.head_dim / kDepth<Unit>;
  const int64_t key_units = (item.length + kDepth<Unit> - 1) / kDepth<Unit>;
  float factors[kBlockRows];
  Prefetch prefetch{next.length, next.heads * p.head_dim * static_cast<int64_t>(sizeof(Element))};
  for (int part = kQueries; part <= kValues; ++part) prefetch.add(head_of<Element>(p, qkv, part, next, 0, 0, 0));
  prefetch.add(head_of(p, out, 1, 0, next, 0, 0, 0));
  for (int64_t i = 0; i < Queries::block_count(item.length); ++i) {
    const Queries queries(item.length, i);
    if (p.dropout.threshold) keep_block(p, item, queries, b.keep);
    for (int64_t head = 0; head < item.heads; ++head) {
      if (queries.first == 0) {
        load_rows(head_of<Element>(p, qkv, kKeys, item, head, 0, item.length), b.keys[head]);
        load_right(head_of<Element>(p, qkv, kValues, item, head, 0, item.length), b.values[head]);
      }
      load_transposed(head_of<Element>(p, qkv, kQueries, item, head, queries.first, queries.count), b.queries);
      const Block block = block_of(p, item, queries, head, b);
      prefetch.step(2 * kGroup);
      multiply<Unit>({b.keys[head], row_units<Unit>(p.head_dim), false}, {b.queries, kPanel, depth * kPanel},
                     item.length, depth, queries.count, b.scores, block.stride);
      p.dropout.threshold ? exponentials<Unit, true>(block, factors) : exponentials<Unit, false>(block, factors);
      prefetch.step(2 * kGroup);
      multiply<Unit>({reinterpret_cast<Unit*>(b.scores), block.stride, true}, {b.values[head], columns, kPanel},
                     queries.count, key_units, p.head_dim, b.rows, columns);
      store_rows(
          b.rows, columns, [&](int64_t i) { return factors[i] * p.keep_scale; },
          head_of(p, out, 1, 0, item, head, queries.first, queries.count));
    }
  }
}

template <class Unit, class Element>
void attend_backward(const AttentionProblem& p, HeadRows grad_out, QueriesKeysValues qkv, Element* grad_qkv,
                     const Item& item, Allocator& scratch, const Item& next) {
  const Buffers<Unit> b(scratch, item.length, p.head_dim, true);
  const int64_t columns = round_up(p.head_dim, kFloats), depth = p.head_dim / kDepth<Unit>;
  const int64_t units = row_units<Unit>(p.head_dim), key_units = (item.length + kDepth<Unit> - 1) / kDepth<Unit>;
  Prefetch prefetch{next.length, next.heads * p.head_dim * static_cast<int64_t>(sizeof(Element))};
  for (int part = kQueries; part <= kValues; ++part) {
    prefetch.add(head_of<Element>(p, qkv, part, next, 0, 0, 0));
    prefetch.add(head_of(p, grad_qkv, 3, part, next, 0, 0, 0));
  }
  prefetch.add(head_of<Element>(p, grad_out, next, 0, 0, 0));
  const auto store = [&](const float* from, Part part, int64_t head, int64_t row, int64_t rows, float factor) {
    store_rows(from, columns, [&](int64_t) { return factor; }, head_of(p, grad_qkv, 3, part, item, head, row, rows));
  };
  for (int64_t i = 0; i < Queries::block_count(item.length); ++i) {
    const Queries queries(item.length, i);
    if (p.dropout.threshold) keep_block(p, item, queries, b.keep);
    const int64_t query_units = (queries.count + kDepth<Unit> - 1) / kDepth<Unit>;
    for (int64_t head = 0; head < item.heads; ++head) {
      if (queries.first == 0) {
        const auto keys = head_of<Element>(p, qkv, kKeys, item, head, 0, item.length);
        load_rows(keys, b.keys[head]);
        if (kDepth<Unit> > 1) load_right(keys, b.keys_right[head]);
        load_rows(head_of<Element>(p, qkv, kValues, item, head, 0, item.length), b.values[head]);
      }
      const auto rows = head_of<Element>(p, qkv, kQueries, item, head, queries.first, queries.count);
      const auto grad_rows = head_of<Element>(p, grad_out, item, head, queries.first, queries.count);
      load_transposed(rows, b.queries);
      load_transposed(grad_rows, b.grad_out);
      load_right(rows, b.queries_right);
      load_right(grad_rows, b.grad_out_right);

      const Block block = block_of(p, item, queries, head, b);
      const Left<Unit> probabilities{reinterpret_cast<Unit*>(b.scores), block.stride, false};
      const Left<Unit> grads{reinterpret_cast<Unit*>(b.grads), block.stride, false};
      const Left<Unit> grads_transposed{kDepth<Unit> > 1 ? b.grads_along_keys : grads.data, block.stride, true};
      prefetch.step(5 * kGroup);
      multiply<Unit>({b.keys[head], units, false}, {b.queries, kPanel, depth * kPanel}, item.length, depth,
                     queries.count, b.scores, block.stride);
      prefetch.step(5 * kGroup);
      multiply<Unit>({b.values[head], units, false}, {b.grad_out, kPanel, depth * kPanel}, item.length, depth,
                     queries.count, b.grads, block.stride);
      p.dropout.threshold ? softmax_backward<Unit, true>(block, b.grads_along_keys)
                          : softmax_backward<Unit, false>(block, b.grads_along_keys);
      prefetch.step(5 * kGroup);
      multiply<Unit>(probabilities, {b.grad_out_right, columns, kPanel}, item.length, query_units, p.head_dim,
                     b.grad_values[head], columns, queries.first > 0);
      prefetch.step(5 * kGroup);
      multiply<Unit>(grads, {b.queries_right, columns, kPanel}, item.length, query_units, p.head_dim, b.grad_keys[head],
                     columns, queries.first > 0);
      prefetch.step(5 * kGroup);
      multiply<Unit>(grads_transposed, {b.keys_right[head], columns, kPanel}, queries.count, key_units, p.head_dim,
                     b.rows, columns);
      store(b.rows, kQueries, head, queries.first, queries.count, p.scale * p.keep_scale);
      if (queries.first + queries.count < item.length) continue;
      store(b.grad_keys[head], kKeys, head, 0, item.length, p.scale * p.keep_scale);
      store(b.grad_values[head], kValues, head, 0, item.length, p.keep_scale);
    }
  }
}

// Calls run(element, unit) with values of the C++ types of the tensors and of the products' units.
template <class Run>
void with_types(const AttentionProblem& p, const Item& item, const Run& run) {
  with_activation(p.dtype, [&](auto element) {
    using Unit = typename UnitOf<decltype(element)>::type;
    const bool pays = item.length > kFewKeys && p.scale != 0 && p.head_dim % (kDepth<Unit> * kFloats) == 0;
    pays ? run(element, Unit{}) : run(element, 0.0f);
  });
}

}  // namespace

int64_t attention_scratch(const AttentionProblem& p, bool backward, int threads) noexcept {
  Allocator counter{nullptr, 0};
  counter.allocate<int32_t>(p.sequences);
  return counter.used + threads * scratch_of_thread(p, backward);
}

bool attention(const AttentionProblem& p, QueriesKeysValues qkv, void* out, void* scratch, int threads) noexcept {
  if (!lengths_are_valid(p)) return false;
  for_each_item(p, false, scratch, threads, [&](const Item& item, Allocator& allocator, const Item& next) {
    with_types(p, item, [&](auto element, auto unit) {
      attend<decltype(unit)>(p, qkv, static_cast<decltype(element)*>(out), item, allocator, next);
    });
  });
  return true;
}

bool attention_backward(const AttentionProblem& p, HeadRows grad_out, QueriesKeysValues qkv, void* grad_qkv,
                        void* scratch, int threads) noexcept {
  if (!lengths_are_valid(p)) return false;
  for_each_item(p, true, scratch, threads, [&](const Item& item, Allocator& allocator, const Item& next) {
    with_types(p, item, [&](auto element, auto unit) {
      attend_backward<decltype(unit)>(p, grad_out, qkv, static_cast<decltype(element)*>(grad_qkv), item, allocator,
                                      next);
    });
  });
  return true;
}

}  // namespace minbert::MINBERT_ISA
