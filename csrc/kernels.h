// Every entry point of the native kernels, on one page.
//
// Plain C++17: pointers, sizes, a dtype and a thread count. The caller owns all memory and has validated all arguments;
// a kernel allocates nothing and throws nothing. Shapes: T tasks, K tensors, N packed tokens, S sequences, H heads.
// Unless stated otherwise, tensors are contiguous and outputs overlap no input.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace minbert {

// Increases with every change of the binding's arguments: Python refuses a binary built from another checkout.
constexpr int kInterface = 14;

enum class DType : int32_t { float32 = 0, bfloat16 = 1, float64 = 2, float16 = 3 };  // float16: only on CUDA devices

// Gradient surgery works in chunks of this many elements of one tensor. Neither the chunks nor, therefore, the results
// depend on the thread count. On a CUDA device a block of threads processes one of a chunk's kChunkParts parts.
constexpr int64_t kChunk = 1 << 16, kChunkParts = 4;

constexpr int64_t kModelParts = 1 << 15;  // the most parts of a model

// One gradient per task over K dense tensors, which may be parts of larger ones. The tensors belong to G parts of the
// model, one after the other: each part has a Gram matrix and weights of its own.
struct TaskGradients {
  int64_t tasks, tensors;
  const void* const* data;     // [T, K]; a null pointer is a gradient of zeros
  const DType* dtypes;         // [K]
  const int64_t* sizes;        // [K], elements
  const int64_t* first_chunk;  // [K + 1]: the chunks of tensor k are first_chunk[k] up to first_chunk[k + 1]
  int64_t model_parts = 1;
  const int64_t* first_tensor =
      nullptr;  // [G + 1]: the tensors of part p are first_tensor[p] up to first_tensor[p + 1]
};

// Philox4x32-7 gives four random words per (seed, counter); a word below `threshold` drops its element.
struct Dropout {
  int64_t seed;
  uint32_t threshold, stream_id;
  float scale = 1;                // multiplies the kept elements: 1 / (1 - p)
  uint32_t first_row = 0;         // the number of row 0 in a larger activation; counters number rows modulo 2^32
  const int32_t* rows = nullptr;  // the rows' numbers, counted from first_row; null: consecutive
};
static inline constexpr uint32_t row_number(const Dropout& dropout, int64_t row) {
  return dropout.first_row + static_cast<uint32_t>(dropout.rows ? dropout.rows[row] : row);
}

// gram [G, T, T]: entry (i, j) of a part is the inner product of g_i and g_j there in float64, summed in the order of
// gram_summation.h over the chunks of the part. partials: scratch, [chunks, T, T], on a CUDA device [chunks,
// kChunkParts, T, T].
using Gram = void(const TaskGradients&, double* partials, double* gram, int threads) noexcept;

// Computes one weight per task from the Gram matrix of each of G parts: PCGrad's in the orders `orders`, else
// `weights`, else equal ones. Clipping and statistics are those of all parts together.
struct SurgeryProblem {
  int64_t parts, tasks;
  const double* gram;        // [G, T, T]
  const int64_t* orders;     // [G, T, T]: row i lists the tasks in the order of task i's projections; or null
  const double* weights;     // [G, T], or null
  const double* own_square;  // a scalar: the squared norm of the gradients that are not per task; null means 0
  double max_norm;           // clips the norm of all gradients; 0 does not clip
  bool mean;                 // combine the mean of the task gradients rather than their sum
};
struct SurgeryResult {
  double* weights;  // [G, T], clipped
  double* stats;    // [4]: norm before clipping, clip scale, whether the norm is finite, projected share
  double* scratch;  // [T + 3, G, T]
};
using SurgeryWeights = void(const SurgeryProblem&, const SurgeryResult&) noexcept;

// The rules of the literature for the weights of the tasks, in the order of kernels/weightings.py. Those from famo on
// read the losses.
enum class WeightingRule : int32_t {
  upgrad,
  dualproj,
  mgda,
  cagrad,
  imtl_g,
  aligned_mtl,
  nash_mtl,
  config,
  gradvac,
  fairgrad,
  random,
  famo,
  uncertainty,
  dwa,
  gradnorm,
  geometric_mean
};

// Computes one weight per task by a rule, as reference.task_weights does, in each of G parts. What the rule does not
// read may be null. T is at most 16.
struct WeightingProblem {
  WeightingRule rule;
  int64_t parts, tasks, state_size;
  const double* gram;     // [G, T, T]
  const double* losses;   // [T]; null exactly where the rule does not read them
  const double* noise;    // [G, T]
  const int64_t* orders;  // [G, T, T]
  double* state;          // [G, S], updated in place
  double* weights;        // [G, T]
  double* scratch;        // weighting_scratch(T) numbers, on a CUDA device for each part
  double options[2];      // in the order of kernels/weightings.py
};
using TaskWeights = void(const WeightingProblem&) noexcept;
// What a rule needs for itself; and for all: a CUDA device computes the T rows of UPGrad at once.
static inline constexpr MINBERT_HOST_DEVICE int64_t rule_scratch(int64_t tasks) { return (3 * tasks + 8) * tasks; }
static inline constexpr MINBERT_HOST_DEVICE int64_t weighting_scratch(int64_t tasks) {
  return (2 * tasks + 1 + rule_scratch(tasks)) * tasks;
}

// out[k] = sum over t of w[t] g_t[k], for K tensors that each have a gradient in some task, where w is the row of
// weights [G, T] of the tensor's part. out[k] may be the same memory as one of the g_t[k]. Accumulates in float32
// (float64 for float64).
using Combine = void(const TaskGradients&, const double* weights, void* const* out, int threads) noexcept;

// AdamW's parameters and moments [K]: float64 for float64 gradients, float32 for others.
struct AdamWState {
  void *const *params, *const *exp_avgs, *const *exp_avg_sqs;
  void* const* averages = nullptr;  // [K]: exponential moving averages of the parameters; or null
  void* const* copies = nullptr;    // [K]: bfloat16 copies of the parameters; it, or any of them, may be null
  // [K]: int16, the low bits of split parameters (adamw.h); it, or any of them, may be null. Such a parameter is
  // bfloat16, and has no copy.
  void* const* low_bits = nullptr;
};

// The update is skipped where the scalar that `flag` points to, a float64 or a bool, is 0.
struct Gate {
  const void* flag = nullptr;
  bool is_bool = false;
};

// One step's scalars (reference.adamw_): param = keep param - step_size exp_avg / (sqrt(exp_avg_sq) + eps).
struct AdamWStep {
  double keep, beta1, beta2, eps, step_size;
  double momentum = 0;  // average = momentum average + (1 - momentum) param
};

// One AdamW step, in place, with the gradient that `Combine` computes, which is never stored. A tensor that has no
// gradient in any task has a gradient of zeros.
using CombineAdamW = void(const TaskGradients&, const double* weights, AdamWState, AdamWStep, Gate,
                          int threads) noexcept;

// keep [rows, columns], bytes 0 or 1: element (row, column) reads word column % 4 of counter (column / 4, row, 0,
// stream_id).
using DropoutMask = void(uint8_t* keep, int64_t rows, int64_t columns, Dropout, int threads) noexcept;

// keep: one [H, length, length] block per sequence, end to end. Probability (head, query, key) reads word head % 4 of
// counter (key's position in its sequence, query's row in the packed stream, head / 4, stream_id). cu_seqlens: [S + 1].
using AttentionDropoutMask = void(uint8_t* keep, const int32_t* cu_seqlens, int64_t sequences, int64_t heads, Dropout,
                                  int threads) noexcept;

// out = x + sigma z, all [rows, columns] of float32 or bfloat16 (CUDA: float16 too), with standard normals z: element
// (row, column) is made of the words of counter (column / 4, row, 1, stream_id) by reference.normal. sigma is in units
// of the number behind `scale`, or of 1 where that is null. The kernel reads seed and scale where it runs.
struct NormalStart {
  const void* x;
  void* out;
  DType dtype;
  int64_t rows, columns;
  float sigma;
  const float* scale;
  const int64_t* seed;  // [2]: the seed, and Dropout's first_row in the low 32 bits
  uint32_t stream_id;
};
using SmartInit = void(const NormalStart&, int threads) noexcept;

// One projected step of reference.smart_ascend. perturbed, x, grad and out: [N, columns] of one of the dtypes above. A
// group is a token where cu_seqlens is null, else one of the S sequences; `groups` is N or S.
struct Ascent {
  const void *perturbed, *x, *grad;
  void* out;
  DType dtype;
  const int32_t* cu_seqlens;
  int64_t groups, tokens, columns;
  float eta, epsilon;  // in units of `scale`, as above
  const float* scale;
  bool infinity_norm, onto_ball;  // else the L2 norm; else onto the sphere of radius epsilon
};
using SmartAscend = void(const Ascent&, int threads) noexcept;

// Rows in scratch memory are padded to whole registers.
constexpr int64_t kPadding = 32;
static inline constexpr int64_t padded(int64_t columns) { return (columns + kPadding - 1) / kPadding * kPadding; }

// Attention within each sequence of a packed stream. Tensors are float32 or bfloat16, with contiguous heads; the other
// strides are arbitrary, in elements.
struct AttentionProblem {
  DType dtype;
  const int32_t* cu_seqlens;  // [S + 1]
  int64_t sequences, tokens, max_seqlen, heads;
  int64_t head_dim;  // a multiple of 8
  float scale;       // of the scores
  Dropout dropout;   // threshold 0 drops nothing
  float keep_scale;  // multiplies the probabilities that dropout keeps
};
struct QueriesKeysValues {
  const void* data;  // [N, 3, H, d]
  int64_t token_stride, part_stride, head_stride;
};
struct HeadRows {
  const void* data;  // [N, H, d]
  int64_t token_stride, head_stride;
};

// Bytes for each token and head that hold dropout's bits, one for each probability.
static inline constexpr int64_t keep_bytes(int64_t max_seqlen) { return (max_seqlen + 15) / 16 * 2; }

// out [N, H, d]. keep: null, or receives dropout's bits for the backward of the same instruction set, in
// [N, H, keep_bytes(max_seqlen)] bytes. scratch: attention_scratch bytes, aligned to 64. Returns false, and writes
// nothing, unless cu_seqlens rises from 0 to `tokens` in steps of 1 to `max_seqlen`.
using Attention = bool(const AttentionProblem&, QueriesKeysValues, void* out, void* keep, void* scratch,
                       int threads) noexcept;

// grad_qkv [N, 3, H, d]. Recomputes the scores, and the masks where `keep` is null.
using AttentionBackward = bool(const AttentionProblem&, HeadRows grad_out, QueriesKeysValues, const void* keep,
                               void* grad_qkv, void* scratch, int threads) noexcept;

using AttentionScratch = int64_t(const AttentionProblem&, bool backward, int threads) noexcept;

// Attention of each sequence's first token alone: queries, out and their gradients [S, H, d], keys_values and
// grad_keys_values [N, 2, H, d], all contiguous. scratch: first_token_scratch floats. Returns as `Attention` does.
using FirstTokenAttention = bool(const AttentionProblem&, const void* queries, const void* keys_values, void* out,
                                 float* scratch, int threads) noexcept;
using FirstTokenAttentionBackward = bool(const AttentionProblem&, const void* grad_out, const void* queries,
                                         const void* keys_values, void* grad_queries, void* grad_keys_values,
                                         float* scratch, int threads) noexcept;
// For each sequence: a head's scores, their gradients, and the masks of four heads in bytes, as long as the sequence
// and padded; and two rows of a head.
static inline constexpr int64_t first_token_scratch(int64_t tokens, int64_t sequences, int64_t head_dim) {
  return 3 * (tokens + sequences * kPadding) + 2 * sequences * padded(head_dim);
}

// An activation [N, D], float32 or bfloat16.
struct Activation {
  int64_t rows, columns;
  DType dtype;
};

// The row-wise kernels work in chunks of this many rows. Sums over rows are formed within each chunk and then over the
// chunks in order, so that no result depends on the thread count. Each chunk has scratch memory: kScratchRows rows,
// padded to whole registers.
constexpr int64_t kChunkRows = 32, kScratchRows = 7;
static inline constexpr int64_t row_chunks(int64_t rows) { return (rows + kChunkRows - 1) / kChunkRows; }
static inline constexpr int64_t row_scratch(int64_t rows, int64_t columns) {  // in floats
  return row_chunks(rows) * kScratchRows * padded(columns);
}

// y = dropout(x). The backward is the same function of d_y.
using DropoutForward = void(Activation, const void* x, void* y, Dropout, float* scratch, int threads) noexcept;

// The mean of one row, and 1 / sqrt(variance + eps).
struct MeanRstd {
  float mean, rstd;
};

// y = LayerNorm(residual + dropout(x)). mean_rstd [N]: of residual + dropout(x), for the backward.
using LayerNormForward = void(Activation, const void* x, const void* residual, const float* weight, const float* bias,
                              float eps, Dropout, void* y, MeanRstd* mean_rstd, float* scratch, int threads) noexcept;
// d_x is not written where the dropout's threshold is 0: it equals d_residual.
using LayerNormBackward = void(Activation, const void* d_y, const void* x, const void* residual, const float* weight,
                               const MeanRstd* mean_rstd, Dropout, void* d_x, void* d_residual, float* d_weight,
                               float* d_bias, float* scratch, int threads) noexcept;

// sums [D] = the sums of x over the rows.
using SumsOfRows = void(Activation, const void* x, float* sums, float* scratch, int threads) noexcept;

// y = GELU(x + bias).
using GeluForward = void(Activation, const void* x, const float* bias, void* y, int threads) noexcept;
using GeluBackward = void(Activation, const void* d_y, const void* x, const float* bias, void* d_x, float* d_bias,
                          float* scratch, int threads) noexcept;

// The word, token type and position ids of N tokens, and the embedding tables [V, D], [types, D] and [positions, D].
struct Embeddings {
  const int64_t* ids[3];
  const void* tables[3];
  DType dtype;
};

// y = dropout(LayerNorm(sum of the tokens' rows of the three tables)). Activation's dtype is y's.
using EmbeddingForward = void(Activation, const Embeddings&, const float* weight, const float* bias, float eps, Dropout,
                              void* y, MeanRstd* mean_rstd, float* scratch, int threads) noexcept;
// d_total: scratch, min(N, kEmbeddingRows) rows. d_tables: the rows of the three tables' gradients, which must hold
// zeros; token n's gradient is added to row ids[n] of each, but in the words' to row word_rows[n].
constexpr int64_t kEmbeddingRows = 64 * kChunkRows;
using EmbeddingBackward = void(Activation, const Embeddings&, const int64_t* word_rows, const void* d_y,
                               const float* weight, const MeanRstd* mean_rstd, Dropout, float* d_total,
                               float* const* d_tables, float* d_weight, float* d_bias, float* scratch,
                               int threads) noexcept;

// The layers of BERT without dropout and gradients: of the same results as the kernels above and a linear layer, which
// here multiplies by packed weights.
struct EncoderProblem {
  DType dtype;  // of activations and products
  int64_t layers, hidden, heads, inner;
  float eps;
  const int32_t* cu_seqlens;  // [S + 1]
  int64_t sequences, tokens, max_seqlen;
  bool first_tokens;  // the last layer gives the rows of the sequences' first tokens alone
};

// The bytes of a layer's packed parameters; 0 where this instruction set does not multiply the dtype. They depend, as
// the packed layer does, on the dtype, the layer's sizes and the instruction set.
using PackedLayerBytes = int64_t(const EncoderProblem&) noexcept;
// parameters [12], float32: weights [outputs, inputs] and biases of the queries, keys and values in one; of the
// attention's output, its layer norm, the inner layer, the output, its layer norm. packed: aligned to 64.
using PackLayer = void(const EncoderProblem&, const float* const* parameters, void* packed, int threads) noexcept;

// x [N, D] to out [N, D], or [S, D] of first tokens. packed: one layer after the other. scratch: encoder_scratch bytes,
// aligned to 64. Returns as `Attention` does.
using EncoderLayers = bool(const EncoderProblem&, const void* packed, const void* x, void* out, void* scratch,
                           int threads) noexcept;
using EncoderScratch = int64_t(const EncoderProblem&, int threads) noexcept;

// The list of the CPU kernels: KERNEL(type, name) for each.
#define MINBERT_KERNELS(KERNEL)                                       \
  KERNEL(Gram, gram)                                                  \
  KERNEL(Combine, combine)                                            \
  KERNEL(DropoutMask, dropout_mask)                                   \
  KERNEL(AttentionDropoutMask, attention_dropout_mask)                \
  KERNEL(SurgeryWeights, surgery_weights)                             \
  KERNEL(TaskWeights, task_weights)                                   \
  KERNEL(CombineAdamW, combine_adamw)                                 \
  KERNEL(SmartInit, smart_init)                                       \
  KERNEL(SmartAscend, smart_ascend)                                   \
  KERNEL(Attention, attention)                                        \
  KERNEL(AttentionBackward, attention_backward)                       \
  KERNEL(AttentionScratch, attention_scratch)                         \
  KERNEL(FirstTokenAttention, first_token_attention)                  \
  KERNEL(FirstTokenAttentionBackward, first_token_attention_backward) \
  KERNEL(DropoutForward, dropout_forward)                             \
  KERNEL(LayerNormForward, layer_norm_forward)                        \
  KERNEL(LayerNormBackward, layer_norm_backward)                      \
  KERNEL(SumsOfRows, sums_of_rows)                                    \
  KERNEL(GeluForward, gelu_forward)                                   \
  KERNEL(GeluBackward, gelu_backward)                                 \
  KERNEL(EmbeddingForward, embedding_forward)                         \
  KERNEL(EmbeddingBackward, embedding_backward)                       \
  KERNEL(PackedLayerBytes, packed_layer_bytes)                        \
  KERNEL(PackLayer, pack_layer)                                       \
  KERNEL(EncoderScratch, encoder_scratch)                             \
  KERNEL(EncoderLayers, encoder_layers)

// The CPU kernels of one instruction set.
struct Kernels {
#define MINBERT_FIELD(Type, name) Type* name;
  MINBERT_KERNELS(MINBERT_FIELD)
#undef MINBERT_FIELD
};

enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2, avx512bf16 = 3 };

struct CpuFeatures {
  bool avx2, avx512, avx512_bf16, amx_bf16;
};

CpuFeatures cpu_features() noexcept;
bool supports(Isa) noexcept;               // compiled in, and supported by this processor
Isa best_isa() noexcept;                   // the widest supported one
const Kernels& kernels(Isa isa) noexcept;  // isa must be supported

// The CUDA kernels, on a stream of the caller's current device. TaskGradients and AdamWState are host arrays of device
// addresses; every other pointer, of seeds and scales too, is a device address. `seed` is NormalStart's. Each function
// returns null, or CUDA's error message.
const char* cuda_dropout_mask(uint8_t* keep, int64_t rows, int64_t columns, const int64_t* seed, uint32_t threshold,
                              uint32_t stream_id, void* stream) noexcept;
const char* cuda_smart_init(const NormalStart&, void* stream) noexcept;
const char* cuda_smart_ascend(const Ascent&, void* stream) noexcept;
const char* cuda_gram(const TaskGradients&, double* partials, double* gram, void* stream) noexcept;
const char* cuda_surgery_weights(const SurgeryProblem&, const SurgeryResult&, void* stream) noexcept;
const char* cuda_task_weights(const WeightingProblem&, void* stream) noexcept;
const char* cuda_combine(const TaskGradients&, const double* weights, void* const* out, void* stream) noexcept;
const char* cuda_combine_adamw(const TaskGradients&, const double* weights, AdamWState, AdamWStep, Gate,
                               void* stream) noexcept;

}  // namespace minbert
