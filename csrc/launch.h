// Every entry point of the native kernels, on one page.
//
// Plain C++17: pointers, sizes, a dtype and a thread count. The caller owns all memory and has validated all arguments;
// a kernel allocates nothing and throws nothing. Shapes: T tasks, K tensors, N packed tokens, S sequences, H heads.
#pragma once

#include <cstdint>

namespace minbert {

// Raised whenever an entry point's arguments change, so that a binary left over from an older checkout is refused.
constexpr int kInterface = 6;

enum class DType : int32_t { float32 = 0, bfloat16 = 1, float64 = 2, float16 = 3 };  // float16: on GPUs alone

// Gradient surgery works in chunks of this many elements of one tensor. They do not depend on the thread count: nor do,
// therefore, the results. On a CUDA device a block of threads takes one of a chunk's kChunkParts.
constexpr int64_t kChunk = 1 << 16, kChunkParts = 4;

// One gradient per task over K dense tensors.
struct TaskGradients {
  int64_t tasks, tensors;
  const void* const* data;     // [T, K]; a null pointer stands for zeros
  const DType* dtypes;         // [K]
  const int64_t* sizes;        // [K], elements
  const int64_t* first_chunk;  // [K + 1]: the chunks of tensor k are first_chunk[k] up to first_chunk[k + 1]
};

// Four random words of Philox4x32-10 belong to one (seed, counter); a word below `threshold` drops its element.
struct Dropout {
  int64_t seed;
  uint32_t threshold, stream_id;
  float scale = 1;         // what is kept is multiplied by it: 1 / (1 - p)
  uint32_t first_row = 0;  // of a larger activation: which of its rows is row 0 here; counters number rows modulo 2^32
};

// gram [T, T]: entry (i, j) is the sum of g_i g_j in float64, chunks in the order of csrc/gram_order.h. partials:
// scratch, [chunks, T, T], on a CUDA device [chunks, kChunkParts, T, T].
using Gram = void(const TaskGradients&, double* partials, double* gram, int threads) noexcept;

// From a Gram matrix to one weight for each task: PCGrad's along `orders`, else the given `weights`, else plain ones.
struct SurgeryProblem {
  int64_t tasks;
  const double* gram;        // [T, T]
  const int64_t* orders;     // [T, T]: in row i the tasks in the order in which task i walks them; or null
  const double* weights;     // [T], or null
  const double* own_square;  // a scalar: the squared norm of what has no task gradients; null stands for 0
  double max_norm;           // of all gradients; 0 does not clip
  bool mean;                 // of the task gradients rather than their sum
};
struct SurgeryResult {
  double* weights;  // [T], clipped
  double* stats;    // [4]: the norm before clipping, the clip scale, whether the norm is finite, the projected share
  double* scratch;  // [T + 3, T]
};
using SurgeryWeights = void(const SurgeryProblem&, const SurgeryResult&) noexcept;

// out[k] = sum over t of weights[t] g_t[k], for K tensors of which none is missing in every task. An out[k] may be
// one of the g_t[k] itself; it may not overlap one otherwise. Accumulates in float32 (float64 for float64).
using Combine = void(const TaskGradients&, const double* weights, void* const* out, int threads) noexcept;

// AdamW's parameters and moments [K], each laid out like its gradients: float64 for float64, float32 for other
// gradients.
struct AdamWState {
  void *const *params, *const *exp_avgs, *const *exp_avg_sqs;
  void* const* averages = nullptr;  // of the parameters over the steps; none are kept where it is null
  void* const* copies = nullptr;    // [K]: bfloat16 copies of the parameters; none where it, or one of them, is null
};

// An update is made unless the scalar behind `flag`, a float64 or a bool, is 0.
struct Gate {
  const void* flag = nullptr;
  bool is_bool = false;
};

// One step's scalars (reference.adamw_): param = keep param - step_size exp_avg / (sqrt(exp_avg_sq) + eps).
struct AdamWStep {
  double keep, beta1, beta2, eps, step_size;
  double momentum = 0;  // average = momentum average + (1 - momentum) param
};

// One AdamW step, in place, with the gradient sum over t of weights[t] g_t, which is never stored. No tensor is missing
// in every task.
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
// (row, column) reads the words of counter (column / 4, row, 1, stream_id) as reference.normal states. `out` may not overlap
// x. sigma is in units of `scale`, one number, or of 1 where that is null; it is read where the kernel runs, as the
// seed.
struct NormalStart {
  const void* x;
  void* out;
  DType dtype;
  int64_t rows, columns;
  float sigma;
  const float* scale;
  const int64_t* seed;  // [2]: the seed, and Dropout's first_row, of which the low 32 bits count
  uint32_t stream_id;
};
using SmartInit = void(const NormalStart&, int threads) noexcept;

// perturbed, x, grad and out: [N, columns] of one of the dtypes above; out overlaps none of the others. A group is a
// token where cu_seqlens is null and else one of the S sequences; `groups` is N or S. reference.smart_ascend states the
// rest.
struct Ascent {
  const void *perturbed, *x, *grad;
  void* out;
  DType dtype;
  const int32_t* cu_seqlens;
  int64_t groups, tokens, columns;
  float eta, epsilon;  // in units of `scale`, as above
  const float* scale;
  bool infinity_norm, onto_ball;  // else the L2 norm; else rescaled to the norm epsilon
};
using SmartAscend = void(const Ascent&, int threads) noexcept;

// Attention within each sequence of a packed stream. Tensors are float32 or bfloat16, with the elements of a head next
// to each other; other strides are in elements and may be anything.
struct AttentionProblem {
  DType dtype;
  const int32_t* cu_seqlens;  // [S + 1]
  int64_t sequences, tokens, max_seqlen, heads;
  int64_t head_dim;  // a multiple of 8
  float scale;       // of the scores
  Dropout dropout;   // threshold 0 drops nothing
  float keep_scale;  // of the probabilities that dropout keeps
};
struct QueriesKeysValues {
  const void* data;  // [N, 3, H, d]
  int64_t token_stride, part_stride, head_stride;
};
struct HeadRows {
  const void* data;  // [N, H, d]
  int64_t token_stride, head_stride;
};

// out [N, H, d], contiguous. scratch: attention_scratch bytes, aligned to 64. Returns false, having written nothing,
// where cu_seqlens does not rise from 0 to `tokens` in steps of 1 to `max_seqlen`.
using Attention = bool(const AttentionProblem&, QueriesKeysValues, void* out, void* scratch, int threads) noexcept;

// grad_qkv [N, 3, H, d], contiguous. Nothing of the forward is needed: scores and masks are computed again.
using AttentionBackward = bool(const AttentionProblem&, HeadRows grad_out, QueriesKeysValues, void* grad_qkv,
                               void* scratch, int threads) noexcept;

using AttentionScratch = int64_t(const AttentionProblem&, bool backward, int threads) noexcept;

// An activation [N, D], float32 or bfloat16; D elements follow each other, and row after row.
struct Activation {
  int64_t rows, columns;
  DType dtype;
};

// The row-wise kernels work in chunks of this many rows. What is summed over rows is summed within each chunk and then
// over the chunks in their order, so that no result depends on the thread count. Each chunk has scratch memory of its
// own: kScratchRows rows, padded to whole registers.
constexpr int64_t kChunkRows = 32, kScratchRows = 7, kPadding = 32;
static inline constexpr int64_t padded(int64_t columns) { return (columns + kPadding - 1) / kPadding * kPadding; }
static inline constexpr int64_t row_chunks(int64_t rows) { return (rows + kChunkRows - 1) / kChunkRows; }
static inline constexpr int64_t row_scratch(int64_t rows, int64_t columns) {  // in floats
  return row_chunks(rows) * kScratchRows * padded(columns);
}

// y = dropout(x). Its own backward.
using DropoutForward = void(Activation, const void* x, void* y, Dropout, float* scratch, int threads) noexcept;

// Of one row: its mean, and 1 / sqrt(variance + eps).
struct Moments {
  float mean, rstd;
};

// y = LayerNorm(residual + dropout(x)); moments [N] are those of residual + dropout(x), for the backward.
using LayerNormForward = void(Activation, const void* x, const void* residual, const float* weight, const float* bias,
                              float eps, Dropout, void* y, Moments* moments, float* scratch, int threads) noexcept;
// d_x is not written when the dropout's threshold is 0: it equals d_residual then.
using LayerNormBackward = void(Activation, const void* d_y, const void* x, const void* residual, const float* weight,
                               const Moments* moments, Dropout, void* d_x, void* d_residual, float* d_weight,
                               float* d_bias, float* scratch, int threads) noexcept;

// y = GELU(x + bias).
using GeluForward = void(Activation, const void* x, const float* bias, void* y, int threads) noexcept;
using GeluBackward = void(Activation, const void* d_y, const void* x, const float* bias, void* d_x, float* d_bias,
                          float* scratch, int threads) noexcept;

// The words, token types and positions of N tokens, and their tables [V, D], [types, D] and [positions, D].
struct Embeddings {
  const int64_t* ids[3];
  const void* tables[3];
  DType dtype;
};

// y = dropout(LayerNorm(sum of the tokens' three rows)). Of Activation, the dtype is y's.
using EmbeddingForward = void(Activation, const Embeddings&, const float* weight, const float* bias, float eps, Dropout,
                              void* y, Moments* moments, float* scratch, int threads) noexcept;
// d_total is scratch for kEmbeddingRows rows, or N if that is less. d_tables, shaped like the three tables, must hold
// zeros.
constexpr int64_t kEmbeddingRows = 64 * kChunkRows;
using EmbeddingBackward = void(Activation, const Embeddings&, const void* d_y, const float* weight,
                               const Moments* moments, Dropout, float* d_total, float* const* d_tables, float* d_weight,
                               float* d_bias, float* scratch, int threads) noexcept;

// The CPU kernels of one instruction set.
struct Kernels {
  Gram* gram;
  Combine* combine;
  DropoutMask* dropout_mask;
  AttentionDropoutMask* attention_dropout_mask;
  SurgeryWeights* surgery_weights;
  CombineAdamW* combine_adamw;
  SmartInit* smart_init;
  SmartAscend* smart_ascend;
  Attention* attention;
  AttentionBackward* attention_backward;
  AttentionScratch* attention_scratch;
  DropoutForward* dropout_forward;
  LayerNormForward* layer_norm_forward;
  LayerNormBackward* layer_norm_backward;
  GeluForward* gelu_forward;
  GeluBackward* gelu_backward;
  EmbeddingForward* embedding_forward;
  EmbeddingBackward* embedding_backward;
};

enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2 };

struct CpuFeatures {
  bool avx2, avx512, avx512_bf16, amx_bf16;
};

CpuFeatures cpu_features() noexcept;
bool supports(Isa) noexcept;               // compiled in, and this processor runs it
Isa best_isa() noexcept;                   // the widest supported one
const Kernels& kernels(Isa isa) noexcept;  // isa must be supported

// CUDA, on a stream of the caller's current device: TaskGradients and AdamWState are arrays on the host of addresses on
// the device, everything else behind a pointer, seeds and scales too, is read on the device. `seed` is NormalStart's.
// Each returns null, or what went wrong.
const char* cuda_dropout_mask(uint8_t* keep, int64_t rows, int64_t columns, const int64_t* seed, uint32_t threshold,
                              uint32_t stream_id, void* stream) noexcept;
const char* cuda_smart_init(const NormalStart&, void* stream) noexcept;
const char* cuda_smart_ascend(const Ascent&, void* stream) noexcept;
const char* cuda_gram(const TaskGradients&, double* partials, double* gram, void* stream) noexcept;
const char* cuda_surgery_weights(const SurgeryProblem&, const SurgeryResult&, void* stream) noexcept;
const char* cuda_combine(const TaskGradients&, const double* weights, void* const* out, void* stream) noexcept;
const char* cuda_combine_adamw(const TaskGradients&, const double* weights, AdamWState, AdamWStep, Gate,
                               void* stream) noexcept;

}  // namespace minbert
