// Attention over sequences of one packed stream, forward and backward. The work is cut into items of one sequence and a
// few heads; an item packs its rows into float32, holds whole rows of scores for a block of queries, and writes its
// part of the result once. No two items share any output, so the result is the same for any thread count.
#include "cpu/pack.h"
#include "cpu/philox_vectors.h"
#include "cpu/vector_math.h"

namespace minbert::MINBERT_ISA {
namespace {

constexpr int64_t kGroup = 4;       // heads that share the random words of one counter
constexpr int64_t kBlockRows = 64;  // queries whose scores are held at a time

// Softmax --------------------------------------------------------------------------------------------------------------

template <int... lane>
inline Vector<int32_t, kFloats> lane_numbers(Lanes<lane...>) {
  return Vector<int32_t, kFloats>{lane...};
}

// Sets what follows the first `length` elements in their last register.
inline void fill_last_register(float* row, int64_t length, float value) {
  const int64_t last = (length - 1) / kFloats * kFloats;
  const Floats v = load<Floats>(row + last);
  const auto inside = lane_numbers(EveryLane{}) < static_cast<int32_t>(length - last);
  const Floats filled = inside ? v : all_lanes(value);
  std::memcpy(row + last, &filled, sizeof(filled));
}

inline Floats largest(const float* row, int64_t length) {
  Floats most = load<Floats>(row);
  for (int64_t at = kFloats; at < length; at += kFloats) most = larger(most, load<Floats>(row + at));
  return largest_of_lanes(most);
}

// Bytes of a mask, 0 or 1, as numbers.
inline Floats kept(const uint8_t* keep) {
  const auto bytes = load_raw<Vector<uint8_t, kFloats>>(keep);
  return __builtin_convertvector(__builtin_convertvector(bytes, Vector<int32_t, kFloats>), Floats);
}

// Scores become e^(score - largest), 0 where dropped. Returns the sum over all, dropped or not.
template <bool dropout>
float exponentials(float* scores, int64_t length, const uint8_t* keep) {
  fill_last_register(scores, length, -__builtin_inff());
  const Floats most = largest(scores, length);
  Floats sum{};
  for (int64_t at = 0; at < length; at += kFloats) {
    Floats e = exp(load<Floats>(scores + at) - most);
    sum += e;
    if (dropout) e *= kept(keep + at);
    std::memcpy(scores + at, &e, sizeof(e));
  }
  return sum_of_lanes(sum)[0];
}

// From scores s and the gradients g of the probabilities after dropout (without its scale, which g has already): scores
// become the probabilities P after dropout, gradients become those of the scores, P_j (g_j - sum of P_k g_k).
template <bool dropout>
void softmax_backward(float* scores, float* grads, int64_t length, const uint8_t* keep) {
  fill_last_register(scores, length, -__builtin_inff());
  fill_last_register(grads, length, 0);
  const Floats most = largest(scores, length);
  Floats sum{}, weighted{};
  for (int64_t at = 0; at < length; at += kFloats) {
    const Floats e = exp(load<Floats>(scores + at) - most);
    Floats g = load<Floats>(grads + at);
    if (dropout) {
      g *= kept(keep + at);
      std::memcpy(grads + at, &g, sizeof(g));
    }
    sum += e;
    weighted += e * g;
    std::memcpy(scores + at, &e, sizeof(e));
  }
  const Floats inverse = 1.0f / sum_of_lanes(sum), mean = sum_of_lanes(weighted) * inverse;
  for (int64_t at = 0; at < length; at += kFloats) {
    Floats p = load<Floats>(scores + at) * inverse;
    const Floats ds = p * (load<Floats>(grads + at) - mean);
    if (dropout) p *= kept(keep + at);
    std::memcpy(scores + at, &p, sizeof(p));
    std::memcpy(grads + at, &ds, sizeof(ds));
  }
}

// Scratch --------------------------------------------------------------------------------------------------------------

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

// What one thread needs for an item: packed rows of its heads, and the scores of a block of queries. A sequence of several
// blocks of queries keeps the transposed keys and values of all heads, since all blocks need them; with a single block,
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
  Arena counter{nullptr, 0};
  Buffers(counter, smaller(p.max_seqlen, p.tokens), p.head_dim, backward);
  return counter.used;
}

// Items ----------------------------------------------------------------------------------------------------------------

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

  Plan(const AttentionProblem& p, int32_t* order, int threads) : p(p), order(order), groups((p.heads + 3) / kGroup) {
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

// Forward and backward -------------------------------------------------------------------------------------------------

enum Part { kQueries, kKeys, kValues };

// An item's tokens from `row` on, `rows` of them.
template <class Element>
Heads<const Element> heads_of(const AttentionProblem& p, QueriesKeysValues qkv, Part part, const Item& item, int64_t row,
                              int64_t rows) {
  const Element* const data = static_cast<const Element*>(qkv.data) + (item.first_token + row) * qkv.token_stride +
                              part * qkv.part_stride + item.first_head * qkv.head_stride;
  return {data, qkv.token_stride, qkv.head_stride, rows, item.heads, p.head_dim};
}

template <class Element>
Heads<const Element> heads_of(const AttentionProblem& p, HeadRows x, const Item& item, int64_t row, int64_t rows) {
  const Element* const data = static_cast<const Element*>(x.data) + (item.first_token + row) * x.token_stride +
                              item.first_head * x.head_stride;
  return {data, x.token_stride, x.head_stride, rows, item.heads, p.head_dim};
}

// The same of a contiguous tensor [N, parts, H, d] that is written.
template <class Element>
Heads<Element> heads_of(const AttentionProblem& p, Element* x, int64_t parts, int64_t part, const Item& item, int64_t row,
                        int64_t rows) {
  const int64_t token = item.first_token + row, stride = p.heads * p.head_dim;
  return {x + (token * parts + part) * stride + item.first_head * p.head_dim, parts * stride, p.head_dim, rows,
          item.heads, p.head_dim};
}

void draw_masks(const AttentionProblem& p, const Item& item, int64_t row, int64_t rows, int64_t keys, uint8_t* keep) {
  for (int64_t i = 0; i < rows; ++i)
    keep_query(keep + i * keys, rows * keys, item.first_head, item.heads, keys, item.first_token + row + i, p.dropout);
}

template <class Element>
void attend(const AttentionProblem& p, QueriesKeysValues qkv, Element* out, const Item& item, Arena& arena) {
  const Buffers b(arena, item.length, p.head_dim, false);
  const int64_t keys = round_up(item.length, kPanel), columns = round_up(p.head_dim, kFloats);
  const int64_t blocks = (item.length + kBlockRows - 1) / kBlockRows;
  float factors[kGroup][kBlockRows];
  pack(heads_of<Element>(p, qkv, kKeys, item, 0, item.length), 1, b.keys, columns);
  pack(heads_of<Element>(p, qkv, kValues, item, 0, item.length), 1, b.values, columns);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t row = item.length * block / blocks, rows = item.length * (block + 1) / blocks - row;
    pack(heads_of<Element>(p, qkv, kQueries, item, row, rows), p.scale, b.queries, columns);
    if (p.dropout.threshold) draw_masks(p, item, row, rows, keys, b.keep);
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
               b.queries[head], columns);  // the queries have done their part
    }
    unpack(b.queries, columns, [&](int64_t head, int64_t i) { return factors[head][i]; },
           heads_of(p, out, 1, 0, item, row, rows));
  }
}

template <class Element>
void attend_backward(const AttentionProblem& p, HeadRows grad_out, QueriesKeysValues qkv, Element* grad_qkv,
                     const Item& item, Arena& arena) {
  const Buffers b(arena, item.length, p.head_dim, true);
  const int64_t keys = round_up(item.length, kPanel), columns = round_up(p.head_dim, kFloats);
  const int64_t blocks = (item.length + kBlockRows - 1) / kBlockRows;
  const auto store = [&](float* const* from, Part part, int64_t row, int64_t rows, float factor) {
    unpack(from, columns, [&](int64_t, int64_t) { return factor; }, heads_of(p, grad_qkv, 3, part, item, row, rows));
  };
  pack(heads_of<Element>(p, qkv, kKeys, item, 0, item.length), 1, b.keys, columns);
  pack(heads_of<Element>(p, qkv, kValues, item, 0, item.length), 1, b.values, columns);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t row = item.length * block / blocks, rows = item.length * (block + 1) / blocks - row;
    pack(heads_of<Element>(p, qkv, kQueries, item, row, rows), p.scale, b.queries, columns);
    pack(heads_of<Element>(p, grad_out, item, row, rows), p.keep_scale, b.grad_out, columns);
    if (p.dropout.threshold) draw_masks(p, item, row, rows, keys, b.keep);
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
      // Values and then queries are not needed any more: their gradients take their places.
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
  Arena counter{nullptr, 0};
  counter.take<int32_t>(p.sequences);
  return counter.used + threads * scratch_of_thread(p, backward);
}

bool attention(const AttentionProblem& p, QueriesKeysValues qkv, void* out, void* scratch, int threads) noexcept {
  if (!lengths_are_valid(p)) return false;
  for_each_item(p, false, scratch, threads, [&](const Item& item, Arena& arena) {
    if (p.dtype == DType::float32)
      attend(p, qkv, static_cast<float*>(out), item, arena);
    else
      attend(p, qkv, static_cast<BFloat16*>(out), item, arena);
  });
  return true;
}

bool attention_backward(const AttentionProblem& p, HeadRows grad_out, QueriesKeysValues qkv, void* grad_qkv,
                        void* scratch, int threads) noexcept {
  if (!lengths_are_valid(p)) return false;
  for_each_item(p, true, scratch, threads, [&](const Item& item, Arena& arena) {
    if (p.dtype == DType::float32)
      attend_backward(p, grad_out, qkv, static_cast<float*>(grad_qkv), item, arena);
    else
      attend_backward(p, grad_out, qkv, static_cast<BFloat16*>(grad_qkv), item, arena);
  });
  return true;
}

}  // namespace minbert::MINBERT_ISA
