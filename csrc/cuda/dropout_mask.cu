// Dropout masks on a CUDA device, one thread per counter.
#include "cuda/launch.h"
#include "kernels.h"
#include "philox.h"

namespace minbert {
namespace {

__global__ void dropout_mask_kernel(uint8_t* keep, int64_t rows, int64_t columns, const int64_t* seed,
                                    uint32_t threshold, uint32_t stream_id) {
  const int64_t groups = (columns + 3) / 4, stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < rows * groups; i += stride) {
    const int64_t row = i / groups, group = i % groups;
    const uint32_t number = static_cast<uint32_t>(seed[1]) + static_cast<uint32_t>(row);
    const Words4 words = philox({{static_cast<uint32_t>(group), number, 0, stream_id}}, seed[0]);
    for (int64_t word = 0; word < 4 && 4 * group + word < columns; ++word)
      keep[row * columns + 4 * group + word] = words.word[word] >= threshold;
  }
}

}  // namespace

const char* cuda_dropout_mask(uint8_t* keep, int64_t rows, int64_t columns, const int64_t* seed, uint32_t threshold,
                              uint32_t stream_id, void* stream) noexcept {
  constexpr int64_t kThreads = 256, kMaxBlocks = 1 << 16;
  const int64_t blocks = (rows * ((columns + 3) / 4) + kThreads - 1) / kThreads;
  if (blocks == 0) return nullptr;
  return launch(dropout_mask_kernel, blocks < kMaxBlocks ? blocks : kMaxBlocks, kThreads, stream, keep, rows, columns,
                seed, threshold, stream_id);
}

}  // namespace minbert
