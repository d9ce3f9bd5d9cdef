// The layers of BERT over a packed stream, without dropout and gradients. A stream of many tokens is divided into
// groups of sequences, each of which one thread takes through all layers: the activations of a group stay in its L2
// cache, and no thread waits for another one in between. The threads share the work on a single group's ops.
#include "cpu/attention_tiles.h"
#include "cpu/packed_linear.h"

namespace minbert::MINBERT_ISA {

Attention attention;
AttentionScratch attention_scratch;
FirstTokenAttention first_token_attention;
LayerNormForward layer_norm_forward;

namespace {

constexpr int64_t kGroupTokens = 256;    // of a group
constexpr int64_t kTokensOfThread = 96;  // at least, for threads with groups of their own

struct Norm {
  float *weight, *bias;

  Norm(Allocator& memory, int64_t columns)
      : weight(memory.allocate<float>(columns)), bias(memory.allocate<float>(columns)) {}
};

int64_t inner_width(const EncoderProblem& p) { return round_up(p.inner, kPanel); }

template <class Unit>
struct PackedLayer {
  PackedLinear<Unit> queries, keys_values, attention_output;
  Norm attention_norm;
  PackedLinear<Unit> intermediate, output;
  Norm output_norm;

  PackedLayer(const EncoderProblem& p, Allocator& memory)
      : queries(memory, p.hidden, p.hidden),
        keys_values(memory, p.hidden, 2 * p.hidden),
        attention_output(memory, p.hidden, p.hidden),
        attention_norm(memory, p.hidden),
        intermediate(memory, p.hidden, p.inner),
        output(memory, p.inner, p.hidden),
        output_norm(memory, p.hidden) {}
};

// Calls run(element, unit) with values of the C++ types of activations and of the products' units, or returns false
// where this instruction set does not multiply the dtype.
template <class Run>
bool with_types(DType dtype, const Run& run) {
  if (dtype == DType::float32) {
    run(float{}, float{});
    return true;
  }
  if constexpr (kDepth<typename UnitOf<BFloat16>::type> > 1) {
    if (dtype == DType::bfloat16) {
      run(BFloat16{}, Pair{});
      return true;
    }
  }
  return false;
}

// Groups of whole sequences --------------------------------------------------------------------------------------

struct Groups {
  int64_t count, most_tokens;
  int at_once;  // threads with a group of their own; 1: all threads share each group

  Groups(const EncoderProblem& p, int threads) {
    count = (p.tokens + kGroupTokens - 1) / kGroupTokens;
    at_once = p.tokens >= threads * kTokensOfThread && p.sequences >= threads ? threads : 1;
    count = round_up(count, at_once);
    most_tokens = smaller(p.tokens, p.tokens / count + 1 + p.max_seqlen);
  }

  // The first sequence of a group.
  int64_t begin(const EncoderProblem& p, int64_t group) const {
    int64_t sequence = 0;
    while (p.cu_seqlens[sequence] * count < group * p.tokens) ++sequence;
    return sequence;
  }
};

// The activations of a group, and scratch memory of the ops.
template <class Element>
struct Activations {
  Element *hidden, *attended, *context, *mixed, *firsts, *wide;
  MeanRstd* mean_rstd;
  int32_t* cu_seqlens;
  float *of_rows, *of_first_tokens;
  void* of_attention;

  Activations(const EncoderProblem& p, int64_t tokens, Allocator& memory, int threads) {
    Element** const of_width[] = {&hidden, &attended, &context, &mixed, &firsts};
    for (Element** rows : of_width) *rows = memory.allocate<Element>(tokens * p.hidden);
    wide = memory.allocate<Element>(tokens * (3 * p.hidden > inner_width(p) ? 3 * p.hidden : inner_width(p)));
    mean_rstd = memory.allocate<MeanRstd>(tokens);
    cu_seqlens = memory.allocate<int32_t>(p.sequences + 1);
    of_rows = memory.allocate<float>(row_scratch(tokens, p.hidden));
    of_first_tokens = memory.allocate<float>(first_token_scratch(tokens, p.sequences, p.hidden / p.heads));
    of_attention =
        memory.allocate<char>(attention_scratch(attention_problem(p, nullptr, p.sequences, tokens), false, threads));
  }

  static AttentionProblem attention_problem(const EncoderProblem& p, const int32_t* cu_seqlens, int64_t sequences,
                                            int64_t tokens) {
    const int64_t head_dim = p.hidden / p.heads;
    const float scale = 1 / __builtin_sqrtf(static_cast<float>(head_dim));
    return {p.dtype, cu_seqlens, sequences, tokens, p.max_seqlen, p.heads, head_dim, scale, {}, 1};
  }
};

// Layers ----------------------------------------------------------------------------------------------------------

template <class Unit, class Element>
struct GroupEncoder {
  const EncoderProblem& p;
  const Activations<Element>& b;
  int64_t sequences, tokens;
  int threads;

  // The attention's results in b.context, from the layer's input.
  void attend(const PackedLayer<Unit>& layer, const Element* x) const {
    const int64_t width = p.hidden, head_dim = p.hidden / p.heads;
    linear<false>(layer.queries, Rows<const Element>{x, width}, tokens, Rows<Element>{b.wide, 3 * width}, false,
                  threads);
    linear<false>(layer.keys_values, Rows<const Element>{x, width}, tokens, Rows<Element>{b.wide + width, 3 * width},
                  false, threads);
    attention(Activations<Element>::attention_problem(p, b.cu_seqlens, sequences, tokens),
              {b.wide, 3 * width, width, head_dim}, b.context, nullptr, b.of_attention, threads);
  }

  // The same of the first tokens alone, whose rows of x go to b.firsts.
  void attend_first_tokens(const PackedLayer<Unit>& layer, const Element* x) const {
    const int64_t width = p.hidden;
    for (int64_t s = 0; s < sequences; ++s)
      std::memcpy(b.firsts + s * width, x + b.cu_seqlens[s] * width, width * sizeof(Element));
    linear<false>(layer.queries, Rows<const Element>{b.firsts, width}, sequences, Rows<Element>{b.mixed, width}, false,
                  threads);
    linear<false>(layer.keys_values, Rows<const Element>{x, width}, tokens, Rows<Element>{b.wide, 2 * width}, false,
                  threads);
    first_token_attention(Activations<Element>::attention_problem(p, b.cu_seqlens, sequences, tokens), b.mixed, b.wide,
                          b.context, b.of_first_tokens, threads);
  }

  // What follows the attention: `rows` rows of `out` from b.context and the rows' inputs.
  void feed_forward(const PackedLayer<Unit>& layer, const Element* x, int64_t rows, Element* out) const {
    const int64_t width = p.hidden, inner = inner_width(p);
    const Rows<Element> mixed{b.mixed, width}, wide{b.wide, inner};
    linear<false>(layer.attention_output, Rows<const Element>{b.context, width}, rows, mixed, false, threads);
    add_norm(layer.attention_norm, x, rows, b.attended);
    linear<true>(layer.intermediate, Rows<const Element>{b.attended, width}, rows, wide, true, threads);
    linear<false>(layer.output, Rows<const Element>{b.wide, inner}, rows, mixed, false, threads);
    add_norm(layer.output_norm, b.attended, rows, out);
  }

  void add_norm(const Norm& norm, const Element* residual, int64_t rows, Element* out) const {
    layer_norm_forward({rows, p.hidden, p.dtype}, b.mixed, residual, norm.weight, norm.bias, p.eps, {}, out,
                       b.mean_rstd, b.of_rows, threads);
  }

  void encode(const char* packed, const Element* x, Element* out) const {
    Allocator memory{const_cast<char*>(packed), 0};
    for (int64_t i = 1; i <= p.layers; ++i) {
      const PackedLayer<Unit> layer(p, memory);
      const bool first_tokens = i == p.layers && p.first_tokens;
      first_tokens ? attend_first_tokens(layer, x) : attend(layer, x);
      feed_forward(layer, first_tokens ? b.firsts : x, first_tokens ? sequences : tokens,
                   i == p.layers ? out : b.hidden);
      x = b.hidden;
    }
  }
};

template <class Unit, class Element>
void encode_group(const EncoderProblem& p, const Groups& groups, int64_t group, const void* packed, const Element* x,
                  Element* out, char* scratch, int threads) {
  const int64_t begin = groups.begin(p, group), end = groups.begin(p, group + 1);
  if (begin == end) return;
  Allocator memory{scratch, 0};
  const Activations<Element> b(p, groups.most_tokens, memory, threads);
  const int32_t first_token = p.cu_seqlens[begin];
  for (int64_t s = begin; s <= end; ++s) b.cu_seqlens[s - begin] = p.cu_seqlens[s] - first_token;
  GroupEncoder<Unit, Element>{p, b, end - begin, p.cu_seqlens[end] - first_token, threads}.encode(
      static_cast<const char*>(packed), x + first_token * p.hidden,
      out + (p.first_tokens ? begin : first_token) * p.hidden);
}

template <class Element>
int64_t scratch_of_group(const EncoderProblem& p, const Groups& groups, int threads) {
  Allocator counter{nullptr, 0};
  Activations<Element>(p, groups.most_tokens, counter, groups.at_once > 1 ? 1 : threads);
  return counter.used;
}

}  // namespace

int64_t packed_layer_bytes(const EncoderProblem& p) noexcept {
  int64_t bytes = 0;
  with_types(p.dtype, [&](auto, auto unit) {
    Allocator counter{nullptr, 0};
    PackedLayer<decltype(unit)>(p, counter);
    bytes = counter.used;
  });
  return bytes;
}

void pack_layer(const EncoderProblem& p, const float* const* parameters, void* packed, int threads) noexcept {
  with_types(p.dtype, [&](auto, auto unit) {
    Allocator memory{static_cast<char*>(packed), 0};
    const PackedLayer<decltype(unit)> to(p, memory);
    const float* const* next = parameters;
    const auto copy = [&](const Norm& norm) {
      std::memcpy(norm.weight, *next++, p.hidden * sizeof(float));
      std::memcpy(norm.bias, *next++, p.hidden * sizeof(float));
    };
    pack(next[0], next[1], to.queries, threads);
    pack(next[0] + p.hidden * p.hidden, next[1] + p.hidden, to.keys_values, threads);
    pack(next[2], next[3], to.attention_output, threads);
    next += 4;
    copy(to.attention_norm);
    pack(next[0], next[1], to.intermediate, threads);
    pack(next[2], next[3], to.output, threads);
    next += 4;
    copy(to.output_norm);
  });
}

int64_t encoder_scratch(const EncoderProblem& p, int threads) noexcept {
  const Groups groups(p, threads);
  int64_t bytes = 0;
  with_types(p.dtype, [&](auto element, auto) { bytes = scratch_of_group<decltype(element)>(p, groups, threads); });
  return bytes * groups.at_once;
}

bool encoder_layers(const EncoderProblem& p, const void* packed, const void* x, void* out, void* scratch,
                    int threads) noexcept {
  if (!lengths_are_valid({p.dtype, p.cu_seqlens, p.sequences, p.tokens, p.max_seqlen, p.heads, 0, 0, {}, 0}))
    return false;
  const Groups groups(p, threads);
  return with_types(p.dtype, [&](auto element, auto unit) {
    using Element = decltype(element);
    const int64_t bytes = scratch_of_group<Element>(p, groups, threads);
    const int inner_threads = groups.at_once > 1 ? 1 : threads;
    int64_t claimed = 0;
    const auto work = [&](int64_t slot) {
      for (int64_t group = __atomic_fetch_add(&claimed, 1, __ATOMIC_RELAXED); group < groups.count;
           group = __atomic_fetch_add(&claimed, 1, __ATOMIC_RELAXED))
        encode_group<decltype(unit)>(p, groups, group, packed, static_cast<const Element*>(x),
                                     static_cast<Element*>(out), static_cast<char*>(scratch) + slot * bytes,
                                     inner_threads);
    };
    parallel(groups.at_once, groups.at_once, int64_t{1} << 40, work);
  });
}

}  // namespace minbert::MINBERT_ISA
