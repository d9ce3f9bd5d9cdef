// The division of attention into work items for the threads, and the scratch memory of an item.
#pragma once

#include "cpu/allocator.h"
#include "cpu/keep_bits.h"
#include "cpu/operands.h"

namespace minbert::MINBERT_ISA {
namespace {

constexpr int64_t kGroup = 4;       // heads whose random words come from the same counter
constexpr int64_t kBlockRows = 64;  // queries whose scores are in memory at a time
// Sequences of up to this many tokens, and those with a scale of 0, are multiplied in float32 even where the processor
// multiplies bfloat16: the errors of a few rounded probabilities, or of equal ones, do not cancel out.
constexpr int64_t kFewKeys = 16;

// A block of a sequence's queries. Every block but the last consists of whole KeepBits.
struct Queries {
  int64_t first, count, registers, keep_bits;

  Queries(int64_t length, int64_t block) {
    const int64_t all = (length + kKeepQueries - 1) / kKeepQueries, blocks = block_count(length);
    first = kKeepQueries * (all * block / blocks);
    keep_bits = all * (block + 1) / blocks - all * block / blocks;
    count = smaller(keep_bits * kKeepQueries, length - first);
    registers = (count + kFloats - 1) / kFloats;
  }

  static int64_t block_count(int64_t length) { return (length + kBlockRows - 1) / kBlockRows; }
};

// The memory of an item: the operands of its products, and the scores of a block of queries. In a sequence of several
// blocks every head has memory for what all blocks need; with a single block, the heads use the same memory in turn.
template <class Unit>
struct Buffers {
  Unit *keys[kGroup], *values[kGroup], *keys_right[kGroup];  // rows, or as a right side; keys_right: backward only
  float *grad_keys[kGroup], *grad_values[kGroup];            // backward only
  Unit *queries, *grad_out;                                  // transposed
  Unit *queries_right, *grad_out_right, *grads_along_keys;   // backward only
  float *rows, *scores, *grads;                              // rows: results of the queries
  KeepBits* keep;                                            // [kGroup, queries / kKeepQueries, keys]

  Buffers(Allocator& scratch, int64_t length, int64_t head_dim, bool backward) {
    const bool paired = kDepth<Unit> > 1;
    const int64_t lanes = round_up(smaller(length, kBlockRows), kFloats), columns = round_up(head_dim, kFloats);
    const int64_t keys_units = length * row_units<Unit>(head_dim), right_units = round_up(length, 2) * columns;
    const int64_t panel_units = round_up(lanes, kPanel) * columns, score_units = round_up(length, 2) * lanes;
    for (int64_t head = 0; head < kGroup; ++head) {
      if (head > 0 && length <= kBlockRows) {
        keys[head] = keys[0], values[head] = values[0], keys_right[head] = keys_right[0];
        grad_keys[head] = grad_keys[0], grad_values[head] = grad_values[0];
        continue;
      }
      keys[head] = scratch.allocate<Unit>(keys_units);
      values[head] = scratch.allocate<Unit>(backward ? keys_units : right_units);
      keys_right[head] = paired ? scratch.allocate<Unit>(backward ? right_units : 0) : keys[head];
      grad_keys[head] = scratch.allocate<float>(backward ? length * columns : 0);
      grad_values[head] = scratch.allocate<float>(backward ? length * columns : 0);
    }
    queries = scratch.allocate<Unit>(panel_units);
    grad_out = scratch.allocate<Unit>(backward ? panel_units : 0);
    queries_right = scratch.allocate<Unit>(backward ? lanes * columns : 0);
    grad_out_right = scratch.allocate<Unit>(backward ? lanes * columns : 0);
    rows = scratch.allocate<float>(lanes * columns);
    scores = scratch.allocate<float>(score_units);
    grads = scratch.allocate<float>(backward ? score_units : 0);
    grads_along_keys = paired ? scratch.allocate<Unit>(backward ? score_units : 0) : nullptr;
    keep = scratch.allocate<KeepBits>(kGroup * ((lanes + kKeepQueries - 1) / kKeepQueries) * length);
  }
};

int64_t scratch_of_thread(const AttentionProblem& p, bool backward) {
  const int64_t longest = smaller(p.max_seqlen, p.tokens), length = longest > 0 ? longest : 0;
  Allocator floats{nullptr, 0}, pairs{nullptr, 0};
  Buffers<float>(floats, length, p.head_dim, backward);
  Buffers<Pair>(pairs, length, p.head_dim, backward);
  return floats.used > pairs.used ? floats.used : pairs.used;
}

struct Item {
  int64_t first_token, length, first_head, heads;
};

// Items of up to kGroup heads, so that each random word is computed once, but of a single head where a sequence is so
// long that large items would leave threads idle. Long sequences come first.
struct Plan {
  const AttentionProblem& p;
  int32_t* order;  // sequences
  int64_t split;   // the first `split` sequences in `order` have items of a single head
  int64_t groups, items;
  int64_t probabilities;  // of one head

  Plan(const AttentionProblem& p, int32_t* order, int threads)
      : p(p), order(order), groups((p.heads + kGroup - 1) / kGroup) {
    probabilities = 0;
    for (int64_t s = 0; s < p.sequences; ++s) probabilities += length(s) * length(s);
    const int64_t largest = threads > 1 ? probabilities * p.heads / (3 * threads * kGroup) : probabilities + 1;
    split = 0;
    int64_t sorted = 0;
    for (int bit = 31; bit >= 0; --bit)
      for (int64_t s = 0; s < p.sequences; ++s)
        if (length(s) >> bit == 1) {
          order[sorted++] = static_cast<int32_t>(s);
          if ((int64_t{1} << bit) * (int64_t{1} << bit) > largest) split = sorted;
        }
    items = split * p.heads + (p.sequences - split) * groups;
  }

  int64_t length(int64_t sequence) const { return p.cu_seqlens[sequence + 1] - p.cu_seqlens[sequence]; }

  Item item(int64_t index) const {
    const bool single = index < split * p.heads;
    const int64_t rest = index - split * p.heads;
    const int64_t sequence = order[single ? index / p.heads : split + rest / groups];
    const int64_t head = single ? index % p.heads : rest % groups * kGroup;
    return {p.cu_seqlens[sequence], length(sequence), head, single ? 1 : smaller(kGroup, p.heads - head)};
  }
};

bool lengths_are_valid(const AttentionProblem& p) {
  if (p.cu_seqlens[0] != 0 || p.cu_seqlens[p.sequences] != p.tokens) return false;
  for (int64_t s = 0; s < p.sequences; ++s) {
    const int64_t length = int64_t{p.cu_seqlens[s + 1]} - p.cu_seqlens[s];
    if (length < 1 || length > p.max_seqlen) return false;
  }
  return true;
}

// Brings rows of several matrices into the L2 cache, some at each call of `step`: what the thread's next item reads and
// writes. The rows are too far apart for the hardware's prefetcher.
struct Prefetch {
  int64_t rows, bytes;
  const char* first[7] = {};
  int64_t strides[7] = {}, matrices = 0, row = 0, matrix = 0, rows_of_step = 0;

  template <class Element>
  void add(const Head<Element>& head) {
    first[matrices] = reinterpret_cast<const char*>(head.data);
    strides[matrices++] = head.stride * sizeof(Element);
  }

  // All is to be done in `steps` steps.
  void divide(int64_t steps) { rows_of_step = (rows * matrices + steps - 1) / steps; }

  void step() {
    for (int64_t i = 0; i < rows_of_step && matrix < matrices; ++i) {
      const char* const from = first[matrix] + row * strides[matrix];
      for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(from + at, 0, 2);
      if (++row == rows) row = 0, ++matrix;
    }
  }
};

// Calls run(item, scratch, next) for every item, with the thread's next item or, at the end, an empty one; `scratch`
// allocates memory that no other thread uses meanwhile.
template <class Run>
void for_each_item(const AttentionProblem& p, bool backward, void* scratch, int threads, const Run& run) {
  Allocator memory{static_cast<char*>(scratch), 0};
  const Plan plan(p, memory.allocate<int32_t>(p.sequences), threads);
  const int64_t bytes = scratch_of_thread(p, backward);
  int64_t claimed = 0;
  const auto claim = [&] {
    const int64_t index = __atomic_fetch_add(&claimed, 1, __ATOMIC_RELAXED);
    return index < plan.items ? plan.item(index) : Item{};
  };
  parallel(threads, threads, (backward ? 3 : 1) * plan.probabilities * p.heads * p.head_dim, [&](int64_t slot) {
    char* const of_thread = memory.base + memory.used + slot * bytes;
    for (Item item = claim(), next; item.length > 0; item = next) {
      next = claim();
      Allocator allocator{of_thread, 0};
      run(item, allocator, next);
    }
  });
}

}  // namespace
}  // namespace minbert::MINBERT_ISA
