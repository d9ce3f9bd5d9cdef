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

// The bits of an item's heads for a block of queries, in what the forward keeps for the backward; null where it does
// not.
template <class Bits>
Bits* kept_block(const AttentionProblem& p, Bits* kept, const Item& item, const Queries& queries) {
  if (!kept) return nullptr;
  const int64_t of_token = keep_bytes(smaller(p.max_seqlen, p.tokens)) / sizeof(KeepBits);
  return kept + item.first_token * p.heads * of_token +
         (queries.first / kKeepQueries * p.heads + item.first_head * queries.keep_bits) * item.length;
}

void draw_block(const AttentionProblem& p, const Item& item, const Queries& queries, KeepBits* keep) {
  const Keys philox_keys(p.dropout.seed);
  for (int64_t lane = 0; lane < queries.count; lane += kFloats)
    keep_queries(keep + lane / kKeepQueries * item.length, queries.keep_bits * item.length, item.first_head, item.heads,
                 item.length, item.first_token + queries.first + lane, lane % kKeepQueries, p.dropout, philox_keys);
}

// The scores of one head for a block of queries.
template <class Unit>
Block block_of(const AttentionProblem& p, const Item& item, const Queries& queries, int64_t head,
               const Buffers<Unit>& b, const KeepBits* keep) {
  return {b.scores,    b.grads, queries.registers * kFloats,
          item.length, p.scale, keep + head * queries.keep_bits * item.length};
}

template <class Unit, class Element>
void attend(const AttentionProblem& p, QueriesKeysValues qkv, Element* out, KeepBits* kept, const Item& item,
            Allocator& scratch, const Item& next) {
  const Buffers<Unit> b(scratch, item.length, p.head_dim, false);
  const int64_t columns = round_up(p.head_dim, kFloats), depth = p.head_dim / kDepth<Unit>;
  const int64_t key_units = (item.length + kDepth<Unit> - 1) / kDepth<Unit>;
  const bool in_place = Queries::block_count(item.length) == 1;
  float factors[kBlockRows];
  Left<Unit> keys[kGroup];
  Right<Unit> values[kGroup];
  Prefetch prefetch{next.length, next.heads * p.head_dim * static_cast<int64_t>(sizeof(Element))};
  for (int part = kQueries; part <= kValues; ++part) prefetch.add(head_of<Element>(p, qkv, part, next, 0, 0, 0));
  prefetch.add(head_of(p, out, 1, 0, next, 0, 0, 0));
  prefetch.divide(item.heads * (tiles(item.length, item.length) + tiles(item.length, p.head_dim)));
  const auto between = [&] { prefetch.step(); };
  for (int64_t i = 0; i < Queries::block_count(item.length); ++i) {
    const Queries queries(item.length, i);
    KeepBits* keep = kept_block(p, kept, item, queries);
    if (!keep) keep = b.keep;
    if (p.dropout.threshold) draw_block(p, item, queries, keep);
    for (int64_t head = 0; head < item.heads; ++head) {
      if (queries.first == 0) {
        keys[head] =
            rows_on_the_left(head_of<Element>(p, qkv, kKeys, item, head, 0, item.length), b.keys[head], in_place);
        values[head] =
            rows_on_the_right(head_of<Element>(p, qkv, kValues, item, head, 0, item.length), b.values[head], in_place);
      }
      load_transposed(head_of<Element>(p, qkv, kQueries, item, head, queries.first, queries.count), b.queries);
      const Block block = block_of(p, item, queries, head, b, keep);
      multiply<Unit, Element>(keys[head], {b.queries, kPanel, depth * kPanel}, item.length, depth, queries.count,
                              {b.scores, block.stride}, false, between);
      p.dropout.threshold ? exponentials<Unit, true>(block, p.keep_scale, factors)
                          : exponentials<Unit, false>(block, p.keep_scale, factors);
      const auto result = head_of(p, out, 1, 0, item, head, queries.first, queries.count);
      multiply<Unit, Element>({reinterpret_cast<Unit*>(b.scores), block.stride, true}, values[head], queries.count,
                              key_units, p.head_dim, {b.rows, columns, result.data, result.stride, factors, 1}, false,
                              between);
    }
  }
}

template <class Unit, class Element>
void attend_backward(const AttentionProblem& p, HeadRows grad_out, QueriesKeysValues qkv, const KeepBits* kept,
                     Element* grad_qkv, const Item& item, Allocator& scratch, const Item& next) {
  const Buffers<Unit> b(scratch, item.length, p.head_dim, true);
  const int64_t columns = round_up(p.head_dim, kFloats), depth = p.head_dim / kDepth<Unit>;
  const int64_t key_units = (item.length + kDepth<Unit> - 1) / kDepth<Unit>;
  const bool in_place = Queries::block_count(item.length) == 1;
  const float factors[] = {p.scale * p.keep_scale, p.scale * p.keep_scale, p.keep_scale};  // of queries, keys, values
  Left<Unit> keys[kGroup], values[kGroup];
  Right<Unit> keys_right[kGroup];
  Prefetch prefetch{next.length, next.heads * p.head_dim * static_cast<int64_t>(sizeof(Element))};
  for (int part = kQueries; part <= kValues; ++part) {
    prefetch.add(head_of<Element>(p, qkv, part, next, 0, 0, 0));
    prefetch.add(head_of(p, grad_qkv, 3, part, next, 0, 0, 0));
  }
  prefetch.add(head_of<Element>(p, grad_out, next, 0, 0, 0));
  prefetch.divide(item.heads * (2 * tiles(item.length, item.length) + 3 * tiles(item.length, p.head_dim)));
  const auto between = [&] { prefetch.step(); };
  for (int64_t i = 0; i < Queries::block_count(item.length); ++i) {
    const Queries queries(item.length, i);
    const bool is_last = queries.first + queries.count == item.length;
    const KeepBits* keep = kept_block(p, kept, item, queries);
    if (!keep) {
      keep = b.keep;
      if (p.dropout.threshold) draw_block(p, item, queries, b.keep);
    }
    const int64_t query_units = (queries.count + kDepth<Unit> - 1) / kDepth<Unit>;
    for (int64_t head = 0; head < item.heads; ++head) {
      if (queries.first == 0) {
        const auto rows = head_of<Element>(p, qkv, kKeys, item, head, 0, item.length);
        keys[head] = rows_on_the_left(rows, b.keys[head], in_place);
        keys_right[head] = rows_on_the_right(rows, b.keys_right[head], in_place);
        values[head] =
            rows_on_the_left(head_of<Element>(p, qkv, kValues, item, head, 0, item.length), b.values[head], in_place);
      }
      const auto rows = head_of<Element>(p, qkv, kQueries, item, head, queries.first, queries.count);
      const auto grad_rows = head_of<Element>(p, grad_out, item, head, queries.first, queries.count);
      load_transposed(rows, b.queries);
      load_transposed(grad_rows, b.grad_out);
      const Right<Unit> queries_right = rows_on_the_right(rows, b.queries_right, in_place);
      const Right<Unit> grad_out_right = rows_on_the_right(grad_rows, b.grad_out_right, in_place);

      const Block block = block_of(p, item, queries, head, b, keep);
      const Left<Unit> probabilities{reinterpret_cast<Unit*>(b.scores), block.stride, false};
      const Left<Unit> grads{reinterpret_cast<Unit*>(b.grads), block.stride, false};
      const Left<Unit> grads_transposed{kDepth<Unit> > 1 ? b.grads_along_keys : grads.data, block.stride, true};
      const auto output = [&](float* sums, Part part, int64_t row, bool is_complete) -> Output<Element> {
        const auto result = head_of(p, grad_qkv, 3, part, item, head, row, item.length - row);
        return {sums, columns, is_complete ? result.data : nullptr, result.stride, factors + part, 0};
      };
      multiply<Unit, Element>(keys[head], {b.queries, kPanel, depth * kPanel}, item.length, depth, queries.count,
                              {b.scores, block.stride}, false, between);
      multiply<Unit, Element>(values[head], {b.grad_out, kPanel, depth * kPanel}, item.length, depth, queries.count,
                              {b.grads, block.stride}, false, between);
      p.dropout.threshold ? softmax_backward<Unit, true>(block, b.grads_along_keys)
                          : softmax_backward<Unit, false>(block, b.grads_along_keys);
      multiply<Unit, Element>(probabilities, grad_out_right, item.length, query_units, p.head_dim,
                              output(b.grad_values[head], kValues, 0, is_last), queries.first > 0, between);
      multiply<Unit, Element>(grads, queries_right, item.length, query_units, p.head_dim,
                              output(b.grad_keys[head], kKeys, 0, is_last), queries.first > 0, between);
      multiply<Unit, Element>(grads_transposed, keys_right[head], queries.count, key_units, p.head_dim,
                              output(b.rows, kQueries, queries.first, true), false, between);
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

bool attention(const AttentionProblem& p, QueriesKeysValues qkv, void* out, void* keep, void* scratch,
               int threads) noexcept {
  if (!lengths_are_valid(p)) return false;
  for_each_item(p, false, scratch, threads, [&](const Item& item, Allocator& allocator, const Item& next) {
    with_types(p, item, [&](auto element, auto unit) {
      attend<decltype(unit)>(p, qkv, static_cast<decltype(element)*>(out), static_cast<KeepBits*>(keep), item,
                             allocator, next);
    });
  });
  return true;
}

bool attention_backward(const AttentionProblem& p, HeadRows grad_out, QueriesKeysValues qkv, const void* keep,
                        void* grad_qkv, void* scratch, int threads) noexcept {
  if (!lengths_are_valid(p)) return false;
  for_each_item(p, true, scratch, threads, [&](const Item& item, Allocator& allocator, const Item& next) {
    with_types(p, item, [&](auto element, auto unit) {
      attend_backward<decltype(unit)>(p, grad_out, qkv, static_cast<const KeepBits*>(keep),
                                      static_cast<decltype(element)*>(grad_qkv), item, allocator, next);
    });
  });
  return true;
}

}  // namespace minbert::MINBERT_ISA
