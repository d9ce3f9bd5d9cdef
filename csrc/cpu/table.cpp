// The table of this instruction set's kernels.
#include "cpu/isa.h"

namespace minbert::MINBERT_ISA {

extern const Kernels kernels;
const Kernels kernels = {gram,
                         combine,
                         dropout_mask,
                         attention_dropout_mask,
                         surgery_weights,
                         combine_adamw,
                         smart_init,
                         smart_ascend,
                         attention,
                         attention_backward,
                         attention_scratch,
                         dropout_forward,
                         layer_norm_forward,
                         layer_norm_backward,
                         gelu_forward,
                         gelu_backward,
                         embedding_forward,
                         embedding_backward};

}  // namespace minbert::MINBERT_ISA
