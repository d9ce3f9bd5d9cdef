// Parallel loops. Every file of this directory is compiled once per instruction set, with its flags and into the
// namespace MINBERT_ISA, and calls no inline function of the standard library: the linker would keep a single copy for
// all instruction sets, possibly one that the processor cannot run.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "parallel_for.h"

namespace minbert::MINBERT_ISA {
namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Calls body(i) for i in [0, count). `work`, roughly the bytes that the whole loop reads and writes, limits the number
// of threads, so that small loops start none.
template <class Body>
void parallel(int threads, int64_t count, int64_t work, const Body& body) {
  constexpr int64_t kWorkPerThread = 1 << 17;
  parallel_for(
      static_cast<int>(smaller(threads, 1 + work / kWorkPerThread)), count,
      [](const void* context, int64_t i) { (*static_cast<const Body*>(context))(i); }, &body);
}

}  // namespace
}  // namespace minbert::MINBERT_ISA
