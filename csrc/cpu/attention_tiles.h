// The division of attention into work items for the threads, and the scratch memory of an item.
#pragma once

#include "cpu/matmul.h"

namespace minbert::MINBERT_ISA {
namespace {

constexpr int64_t kGroup = 4;       // heads whose random words come from the same counter
constexpr int64_t kBlockRows = 64;  // queries whose scores are in memory at a time

// Allocates aligned arrays from scratch memory; without a base it only counts their bytes.
struct Allocator {
  char* base;
  int64_t used;

  template <class T>
  T* allocate(int64_t count) {
    T* const array = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return array;
  }
};

// The memory of an item: its heads as matrices, and the scores of a block of queries. In a sequence of several blocks
// every head has memory for its transposed keys and values, since every block needs them; with a single block, the
// heads use the same memory in turn.
struct Buffers {
  float *queries[kGroup], *keys[kGroup], *values[kGroup];
  float *grad_out[kGroup], *grad_keys[kGroup];  // backward only
  float *keys_transposed[kGroup], *values_transposed[kGroup];
  float *scores, *grad_scores;
  uint8_t* keep;  // [kGroup, rows, keys]

  Buffers(Allocator& scratch, int64_t length, int64_t head_dim, bool backward) {
    const int64_t rows = smaller(length, kBlockRows), keys_padded = round_up(length, kPanel);
    const int64_t columns = round_up(head_dim, kFloats), score_count = rows * keys_padded;
    for (int64_t head = 0; head < kGroup; ++head) {
      const bool separate = head == 0 || length > kBlockRows;
      queries[head] = scratch.allocate<float>(rows * columns);
      keys[head] = scratch.allocate<float>(length * columns);
      values[head] = scratch.allocate<float>(length * columns);
      keys_transposed[head] = separate ? scratch.allocate<float>(keys_padded * columns) : keys_transposed[0];
      if (!backward) continue;
      grad_out[head] = scratch.allocate<float>(rows * columns);
      grad_keys[head] = scratch.allocate<float>(length * columns);
      values_transposed[head] = separate ? scratch.allocate<float>(keys_padded * columns) : values_transposed[0];
    }
    scores = scratch.allocate<float>(score_count);
    grad_scores = scratch.allocate<float>(backward ? score_count : 0);
    keep = scratch.allocate<uint8_t>(kGroup * score_count);
  }
};

int64_t scratch_of_thread(const AttentionProblem& p, bool backward) {
  const int64_t longest = smaller(p.max_seqlen, p.tokens);
  Allocator counter{nullptr, 0};
  Buffers(counter, longest > 0 ? longest : 0, p.head_dim, backward);
  return counter.used;
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

// Calls run(item, scratch) for every item; `scratch` allocates memory that no other thread uses meanwhile.
template <class Run>
void for_each_item(const AttentionProblem& p, bool backward, void* scratch, int threads, const Run& run) {
  Allocator memory{static_cast<char*>(scratch), 0};
  const Plan plan(p, memory.allocate<int32_t>(p.sequences), threads);
  const int64_t bytes = scratch_of_thread(p, backward);
  int64_t next = 0;
  parallel(threads, threads, (backward ? 3 : 1) * plan.probabilities * p.heads * p.head_dim, [&](int64_t slot) {
    char* const of_thread = memory.base + memory.used + slot * bytes;
    for (int64_t index; (index = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < plan.items;) {
      Allocator allocator{of_thread, 0};
      run(plan.item(index), allocator);
    }
  });
}

}  // namespace
}  // namespace minbert::MINBERT_ISA
