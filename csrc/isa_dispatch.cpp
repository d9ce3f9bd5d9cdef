// Detects the instruction sets of this processor and selects the kernels compiled for one of them.
#include <initializer_list>

#include "kernels.h"

namespace minbert {

namespace portable {
extern const Kernels kernels;
}
#ifdef MINBERT_X86
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#ifdef MINBERT_AVX512BF16
namespace avx512bf16 {
extern const Kernels kernels;
}
#endif
#endif

CpuFeatures cpu_features() noexcept {
  CpuFeatures found{};
#ifdef MINBERT_X86
  found.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  found.avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#ifdef MINBERT_AVX512BF16
  found.avx512_bf16 = found.avx512 && __builtin_cpu_supports("avx512bf16");
#endif
#ifdef MINBERT_AMX
  found.amx_bf16 = found.avx512 && __builtin_cpu_supports("amx-bf16");
#endif
#endif
  return found;
}

bool supports(Isa isa) noexcept {
  const CpuFeatures found = cpu_features();
  return isa == Isa::portable || (isa == Isa::avx2 && found.avx2) || (isa == Isa::avx512 && found.avx512) ||
         (isa == Isa::avx512bf16 && found.avx512_bf16);
}

Isa best_isa() noexcept {
  for (const Isa isa : {Isa::avx512bf16, Isa::avx512, Isa::avx2})
    if (supports(isa)) return isa;
  return Isa::portable;
}

const Kernels& kernels(Isa isa) noexcept {
#ifdef MINBERT_AVX512BF16
  if (isa == Isa::avx512bf16) return avx512bf16::kernels;
#endif
#ifdef MINBERT_X86
  if (isa == Isa::avx512) return avx512::kernels;
  if (isa == Isa::avx2) return avx2::kernels;
#endif
  (void)isa;
  return portable::kernels;
}

}  // namespace minbert
