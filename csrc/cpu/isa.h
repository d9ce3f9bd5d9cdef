// What every file of this directory starts from. The files are compiled once per instruction set, each time into the
// namespace MINBERT_ISA and with its flags. They call no inline function of the standard library: the linker would keep
// one copy of it for all, perhaps the one that a lesser processor cannot run.
#pragma once

#include <cstdint>
#include <cstring>

#include "launch.h"
#include "parallel.h"

namespace minbert::MINBERT_ISA {

Gram gram;
Combine combine;
DropoutMask dropout_mask;
AttentionDropoutMask attention_dropout_mask;
SurgeryWeights surgery_weights;
CombineAdamW combine_adamw;
SmartInit smart_init;
SmartAscend smart_ascend;
Attention attention;
AttentionBackward attention_backward;
AttentionScratch attention_scratch;
DropoutForward dropout_forward;
LayerNormForward layer_norm_forward;
LayerNormBackward layer_norm_backward;
GeluForward gelu_forward;
GeluBackward gelu_backward;
EmbeddingForward embedding_forward;
EmbeddingBackward embedding_backward;

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Calls body(i) for i in [0, count). `work`, about the bytes that all of it touches, keeps small jobs from waking
// threads that would cost more than they bring.
template <class Body>
void parallel(int threads, int64_t count, int64_t work, const Body& body) {
  constexpr int64_t kWorkOfOneThread = 1 << 17;
  parallel_for(
      static_cast<int>(smaller(threads, 1 + work / kWorkOfOneThread)), count,
      [](const void* context, int64_t i) { (*static_cast<const Body*>(context))(i); }, &body);
}

}  // namespace
}  // namespace minbert::MINBERT_ISA
