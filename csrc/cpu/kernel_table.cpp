// The table of this instruction set's kernels.
#include "kernels.h"

namespace minbert::MINBERT_ISA {

#define MINBERT_DECLARE(Type, name) Type name;
MINBERT_KERNELS(MINBERT_DECLARE)

#define MINBERT_NAME(Type, name) name,
extern const Kernels kernels;
const Kernels kernels = {MINBERT_KERNELS(MINBERT_NAME)};

}  // namespace minbert::MINBERT_ISA
