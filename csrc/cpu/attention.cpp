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

// What one thread needs for a sequence. A sequence of several blocks of queries keeps the packed keys and values of all
// heads of its item, since all blocks need them; with a single block, one head after the other uses the same memory.
struct Buffers {
  float *queries, *scores, *out;                                  // of one block
  float *grad_out, *grad_scores;                                  // only for the backward
  uint8_t* keep;                                                  // [kGroup, rows, keys]
  float *keys_transposed[kGroup], *values[kGroup];                // values: transposed panels in the backward
  float *keys[kGroup], *grad_keys[kGroup], *grad_values[kGroup];  // only for the backward

  Buffers(Arena& arena, int64_t length, int64_t head_dim, bool backward) {
    const int64_t rows = smaller(length, kBlockRows), keys_padded = round_up(length, kPanel);
    const int64_t columns = round_up(head_dim, kFloats);
    queries = arena.take<float>(rows * columns);
    out = arena.take<float>(rows * columns);
    scores = arena.take<float>(rows * keys_padded);
    keep = arena.take<uint8_t>(kGroup * rows * keys_padded);
    grad_out = arena.take<float>(backward ? rows * columns : 0);
    grad_scores = arena.take<float>(backward ? rows * keys_padded : 0);
    for (int64_t head = 0; head < kGroup; ++head) {
      const bool own = head == 0 || length > kBlockRows;
      const auto take = [&](float** piece, int64_t count) { piece[head] = own ? arena.take<float>(count) : piece[0]; };
      take(keys_transposed, keys_padded * columns);
      take(values, keys_padded * columns);
      if (backward) {
        take(keys, length * columns);
        take(grad_keys, length * columns);
        take(grad_values, length * columns);
      }
    }
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

template <class Element>
Rows<const Element> rows_of(const AttentionProblem& p, QueriesKeysValues qkv, Part part, int64_t token, int64_t count,
                            int64_t head) {
  return {static_cast<const Element*>(qkv.data) + token * qkv.token_stride + part * qkv.part_stride +
              head * qkv.head_stride,
          qkv.token_stride, count, p.head_dim};
}

void draw_masks(const AttentionProblem& p, const Item& item, int64_t row, int64_t rows, int64_t keys, uint8_t* keep) {
  for (int64_t i = 0; i < rows; ++i)
    keep_query(keep + i * keys, rows * keys, item.first_head, item.heads, keys, item.first_token + row + i, p.dropout);
}

template <class Element>
void attend(const AttentionProblem& p, QueriesKeysValues qkv, Element* out, const Item& item, Arena& arena) {
  const Buffers buffers(arena, item.length, p.head_dim, false);
  const int64_t keys = round_up(item.length, kPanel), columns = round_up(p.head_dim, kFloats);
  const int64_t blocks = (item.length + kBlockRows - 1) / kBlockRows;
  float factors[kBlockRows];
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t row = item.length * block / blocks, rows = item.length * (block + 1) / blocks - row;
    if (p.dropout.threshold) draw_masks(p, item, row, rows, keys, buffers.keep);
    for (int64_t h = 0; h < item.heads; ++h) {
      const int64_t head = item.first_head + h;
      if (block == 0) {
        pack_transposed(rows_of<Element>(p, qkv, kKeys, item.first_token, item.length, head), buffers.keys_transposed[h]);
        pack(rows_of<Element>(p, qkv, kValues, item.first_token, item.length, head), 1, buffers.values[h], columns);
      }
      pack(rows_of<Element>(p, qkv, kQueries, item.first_token + row, rows, head), p.scale, buffers.queries, columns);
      multiply({buffers.queries, columns, false}, {buffers.keys_transposed[h], kPanel, p.head_dim * kPanel}, rows,
               p.head_dim, item.length, buffers.scores, keys);
      for (int64_t i = 0; i < rows; ++i) {
        float* const scores = buffers.scores + i * keys;
        const uint8_t* const keep = buffers.keep + (h * rows + i) * keys;
        factors[i] = p.keep_scale / (p.dropout.threshold ? exponentials<true>(scores, item.length, keep)
                                                         : exponentials<false>(scores, item.length, keep));
      }
      multiply({buffers.scores, keys, false}, {buffers.values[h], columns, kPanel}, rows, item.length, p.head_dim,
               buffers.out, columns);
      unpack<Element>(buffers.out, columns, [&](int64_t i) { return factors[i]; },
                      {out + ((item.first_token + row) * p.heads + head) * p.head_dim, p.heads * p.head_dim, rows,
                       p.head_dim});
    }
  }
}

template <class Element>
void attend_backward(const AttentionProblem& p, HeadRows grad_out, QueriesKeysValues qkv, Element* grad_qkv,
                     const Item& item, Arena& arena) {
  const Buffers buffers(arena, item.length, p.head_dim, true);
  const int64_t keys = round_up(item.length, kPanel), columns = round_up(p.head_dim, kFloats);
  const int64_t blocks = (item.length + kBlockRows - 1) / kBlockRows;
  const auto store = [&](Part part, int64_t head, int64_t row, int64_t rows, const float* from, float factor) {
    const int64_t at = (((item.first_token + row) * 3 + part) * p.heads + head) * p.head_dim;
    unpack<Element>(from, columns, [&](int64_t) { return factor; },
                    {grad_qkv + at, 3 * p.heads * p.head_dim, rows, p.head_dim});
  };
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t row = item.length * block / blocks, rows = item.length * (block + 1) / blocks - row;
    if (p.dropout.threshold) draw_masks(p, item, row, rows, keys, buffers.keep);
    for (int64_t h = 0; h < item.heads; ++h) {
      const int64_t head = item.first_head + h;
      if (block == 0) {
        const auto k = rows_of<Element>(p, qkv, kKeys, item.first_token, item.length, head);
        pack(k, 1, buffers.keys[h], columns);
        pack_transposed(k, buffers.keys_transposed[h]);
        pack_transposed(rows_of<Element>(p, qkv, kValues, item.first_token, item.length, head), buffers.values[h]);
      }
      pack(rows_of<Element>(p, qkv, kQueries, item.first_token + row, rows, head), p.scale, buffers.queries, columns);
      pack(Rows<const Element>{static_cast<const Element*>(grad_out.data) +
                                   (item.first_token + row) * grad_out.token_stride + head * grad_out.head_stride,
                               grad_out.token_stride, rows, p.head_dim},
           p.keep_scale, buffers.grad_out, columns);
      multiply({buffers.queries, columns, false}, {buffers.keys_transposed[h], kPanel, p.head_dim * kPanel}, rows,
               p.head_dim, item.length, buffers.scores, keys);
      multiply({buffers.grad_out, columns, false}, {buffers.values[h], kPanel, p.head_dim * kPanel}, rows, p.head_dim,
               item.length, buffers.grad_scores, keys);
      for (int64_t i = 0; i < rows; ++i) {
        float *const scores = buffers.scores + i * keys, *const grads = buffers.grad_scores + i * keys;
        const uint8_t* const keep = buffers.keep + (h * rows + i) * keys;
        p.dropout.threshold ? softmax_backward<true>(scores, grads, item.length, keep)
                            : softmax_backward<false>(scores, grads, item.length, keep);
      }
      multiply({buffers.scores, keys, true}, {buffers.grad_out, columns, kPanel}, item.length, rows, p.head_dim,
               buffers.grad_values[h], columns, block > 0);
      multiply({buffers.grad_scores, keys, true}, {buffers.queries, columns, kPanel}, item.length, rows, p.head_dim,
               buffers.grad_keys[h], columns, block > 0);
      multiply({buffers.grad_scores, keys, false}, {buffers.keys[h], columns, kPanel}, rows, item.length, p.head_dim,
               buffers.out, columns);
      store(kQueries, head, row, rows, buffers.out, p.scale);
      if (block == blocks - 1) {
        store(kKeys, head, 0, item.length, buffers.grad_keys[h], 1);
        store(kValues, head, 0, item.length, buffers.grad_values[h], 1);
      }
    }
  }
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
