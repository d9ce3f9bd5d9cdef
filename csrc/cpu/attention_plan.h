// How attention is cut into items for the threads, and what memory an item works in.
#pragma once

#include "cpu/product.h"

namespace minbert::MINBERT_ISA {
namespace {

constexpr int64_t kGroup = 4;       // heads that share the random words of one counter
constexpr int64_t kBlockRows = 64;  // queries whose scores are held at a time

// Hands out aligned pieces of the scratch memory, or only counts them.
struct Arena {
  char* base;
  int64_t used;

  template <class T>
  T* take(int64_t count) {
    T* const piece = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return piece;
  }
};

// What one thread needs for an item: packed rows of its heads, and the scores of a block of queries. A sequence of
// several blocks keeps the transposed keys and values of all heads, since every block needs them; with a single block,
// one head after the other uses the same memory.
struct Buffers {
  float *queries[kGroup], *keys[kGroup], *values[kGroup];
  float *grad_out[kGroup], *grad_keys[kGroup];  // only for the backward
  float *keys_transposed[kGroup], *values_transposed[kGroup];
  float *scores, *grad_scores;
  uint8_t* keep;  // [kGroup, rows, keys]

  Buffers(Arena& arena, int64_t length, int64_t head_dim, bool backward) {
    const int64_t rows = smaller(length, kBlockRows), keys_padded = round_up(length, kPanel);
    const int64_t columns = round_up(head_dim, kFloats), score_count = rows * keys_padded;
    for (int64_t head = 0; head < kGroup; ++head) {
      const bool own = head == 0 || length > kBlockRows;
      queries[head] = arena.take<float>(rows * columns);
      keys[head] = arena.take<float>(length * columns);
      values[head] = arena.take<float>(length * columns);
      keys_transposed[head] = own ? arena.take<float>(keys_padded * columns) : keys_transposed[0];
      if (!backward) continue;
      grad_out[head] = arena.take<float>(rows * columns);
      grad_keys[head] = arena.take<float>(length * columns);
      values_transposed[head] = own ? arena.take<float>(keys_padded * columns) : values_transposed[0];
    }
    scores = arena.take<float>(score_count);
    grad_scores = arena.take<float>(backward ? score_count : 0);
    keep = arena.take<uint8_t>(kGroup * score_count);
  }
};

int64_t scratch_of_thread(const AttentionProblem& p, bool backward) {
  const int64_t longest = smaller(p.max_seqlen, p.tokens);
  Arena counter{nullptr, 0};
  Buffers(counter, longest > 0 ? longest : 0, p.head_dim, backward);
  return counter.used;
}

struct Item {
  int64_t first_token, length, first_head, heads;
};

// Items of up to kGroup heads, so that each random word is drawn once; but of a single head where a sequence is so long
// that few large items would leave threads idle. Long sequences come first.
struct Plan {
  const AttentionProblem& p;
  int32_t* order;  // sequences
  int64_t split, groups, items;
  int64_t probabilities;  // of one head

  Plan(const AttentionProblem& p, int32_t* order, int threads)
      : p(p), order(order), groups((p.heads + kGroup - 1) / kGroup) {
    probabilities = 0;
    for (int64_t s = 0; s < p.sequences; ++s) probabilities += length(s) * length(s);
    const int64_t largest = threads > 1 ? probabilities * p.heads / (3 * threads * kGroup) : probabilities + 1;
    split = 0;
    int64_t placed = 0;
    for (int bit = 31; bit >= 0; --bit)
      for (int64_t s = 0; s < p.sequences; ++s)
        if (length(s) >> bit == 1) {
          order[placed++] = static_cast<int32_t>(s);
          if ((int64_t{1} << bit) * (int64_t{1} << bit) > largest) split = placed;
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

// Calls run(item, arena) for every item, each arena being used by one thread at a time.
template <class Run>
void for_each_item(const AttentionProblem& p, bool backward, void* scratch, int threads, const Run& run) {
  Arena memory{static_cast<char*>(scratch), 0};
  const Plan plan(p, memory.take<int32_t>(p.sequences), threads);
  const int64_t bytes = scratch_of_thread(p, backward);
  int64_t next = 0;
  parallel(threads, threads, (backward ? 3 : 1) * plan.probabilities * p.heads * p.head_dim, [&](int64_t slot) {
    char* const own = memory.base + memory.used + slot * bytes;
    for (int64_t index; (index = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < plan.items;) {
      Arena arena{own, 0};
      run(plan.item(index), arena);
    }
  });
}

}  // namespace
}  // namespace minbert::MINBERT_ISA
