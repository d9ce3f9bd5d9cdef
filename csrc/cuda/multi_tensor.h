// Kernels over lists of tensors: the table of tensors that a launch passes by value, and the elements that each block
// of threads visits. Contains no CUDA, so that the tests run it on the host.
#pragma once

#include <initializer_list>

#include "host_device.h"
#include "kernels.h"

namespace minbert {

constexpr int kThreads = 256;  // of a block, which processes one part of a chunk
constexpr int kPart = static_cast<int>(kChunk / kChunkParts);

// A kernel has up to 32764 bytes of parameters, or 4096 with CUDA before 12.1. BERT-base's 199 tensors fit into one
// launch; longer lists take several.
#if defined(__CUDACC__) && CUDART_VERSION >= 12010
constexpr int kTableTensors = 400, kTableAddresses = 3000;
#else
constexpr int kTableTensors = 40, kTableAddresses = 350;
#endif

struct TableTensor {
  int64_t size;         // in elements
  int32_t first_chunk;  // among those of all tensors
  int16_t model_part;   // at most kModelParts - 1
  bool aligned;         // whether all its addresses are multiples of 16
};

// Tensors of one dtype. Each has the addresses of T gradients (null for a missing one) and of a kernel's other tensors.
struct TaskTable {
  int32_t tensors, tasks, addresses_each;
  int32_t first_block[kTableTensors + 1];
  TableTensor tensor[kTableTensors];
  void* address[kTableAddresses];
};

struct Part {
  int tensor, length;  // 0 or less where the chunk ends before the part
  int64_t begin;       // in the tensor
  int64_t number;      // among the parts of all tensors: kChunkParts for each chunk
};

// The part of a block: the parts of all tensors, in order.
static inline MINBERT_HOST_DEVICE Part find_part(const TaskTable& table, int block) {
  int low = 0, high = table.tensors;  // first_block[low] <= block < first_block[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (table.first_block[middle] <= block ? low : high) = middle;
  }
  const TableTensor& tensor = table.tensor[low];
  const int64_t part = block - table.first_block[low], begin = part * kPart, rest = tensor.size - begin;
  return {low, static_cast<int>(rest < kPart ? rest : kPart), begin, tensor.first_chunk * kChunkParts + part};
}

// The first of the `lanes` consecutive elements of a part that a thread processes in a sweep of the block.
static inline MINBERT_HOST_DEVICE int element_of(int sweep, int thread, int lanes) {
  return (sweep * kThreads + thread) * lanes;
}

// Calls launch(table, blocks), which returns null or an error message, for as many tables as the tensors of `dtype`
// need. Each of `others` is null or has one more address for each tensor.
template <class Launch>
static inline const char* for_each_table(const TaskGradients& g, DType dtype,
                                         std::initializer_list<void* const*> others, const Launch& launch) {
  TaskTable table;
  table.tensors = table.first_block[0] = 0;
  table.tasks = static_cast<int32_t>(g.tasks);
  table.addresses_each = table.tasks + static_cast<int32_t>(others.size());
  if (table.addresses_each > kTableAddresses) return "more tasks than a kernel's parameters hold";
  const auto finish = [&]() -> const char* {
    const char* const error = table.tensors > 0 ? launch(table, table.first_block[table.tensors]) : nullptr;
    table.tensors = 0;
    return error;
  };
  int16_t model_part = 0;
  for (int64_t k = 0; k < g.tensors; ++k) {
    while (g.first_tensor && g.first_tensor[model_part + 1] <= k) ++model_part;
    if (g.dtypes[k] != dtype || g.sizes[k] == 0) continue;
    if (table.tensors == kTableTensors || (table.tensors + 1) * table.addresses_each > kTableAddresses)
      if (const char* const error = finish()) return error;
    void** const address = table.address + table.tensors * table.addresses_each;
    int filled = 0;
    uintptr_t bits = 0;
    const auto add = [&](const void* of_tensor) {
      address[filled++] = const_cast<void*>(of_tensor);
      bits |= reinterpret_cast<uintptr_t>(of_tensor);
    };
    for (int64_t task = 0; task < g.tasks; ++task) add(g.data[task * g.tensors + k]);
    for (void* const* const other : others) add(other ? other[k] : nullptr);
    table.tensor[table.tensors] = {g.sizes[k], static_cast<int32_t>(g.first_chunk[k]), model_part, bits % 16 == 0};
    const int64_t blocks = (g.first_chunk[k + 1] - g.first_chunk[k]) * kChunkParts;
    table.first_block[table.tensors + 1] = table.first_block[table.tensors] + static_cast<int32_t>(blocks);
    ++table.tensors;
  }
  return finish();
}

}  // namespace minbert
