// Gradient surgery on a CUDA device: the Gram matrix of the task gradients, their weights, and their weighted sum.
// No kernel waits for the host, and the order of every sum is fixed, so that results are equal to the bit.
#include "cuda/weighted_sum.h"
#include "gram_summation.h"
#include "pcgrad.h"

namespace minbert {
namespace {

static_assert(kLanes == kThreads && kLaneGroup == 32, "a lane is a thread, a group a warp");

// Gram -------------------------------------------------------------------------------------------------------------
//
// Memory is the bound where float64 runs at half the rate of float32 or more. T <= 4 gradients are read once:
// 3 x 110M float32 are 1.32 GB, 394 us at the 3.35 TB/s of an H100, 438 us at the 3.0 that a copy reaches. Products of
// float32 are exact in float64. On GPUs with 1/64 of that rate (sm_86, sm_89) the kernel takes about 1.5 times as long
// as the memory traffic.

constexpr int kTile = 3;  // tasks of a tile, where there are more than 4 tasks

// The blocks per multiprocessor that the registers allow. At 3 x float32 they have 98 KB of loads in flight; 25 KB hide
// the latency. A vector of bfloat16 takes sixteen registers as float64.
template <class Element, int tasks>
constexpr int kBlocks = sizeof(Element) > 2 ? (tasks > 4 ? 3 : 4) : (tasks > 3 ? 2 : 3);

// sum_of_lanes over the threads of a block, for `count` numbers each. The first `count` threads return the sums.
template <int count>
__device__ double sums_of_block(const double (&mine)[count]) {
  constexpr int kGroups = kThreads / kLaneGroup;
  __shared__ double sums[kGroups][count];
#pragma unroll
  for (int i = 0; i < count; ++i) {
    double sum = mine[i];
#pragma unroll
    for (int half = kLaneGroup / 2; half > 0; half /= 2) sum += __shfl_down_sync(~0u, sum, half);
    if (threadIdx.x % kLaneGroup == 0) sums[threadIdx.x / kLaneGroup][i] = sum;
  }
  __syncthreads();
  double total = 0;
  if (threadIdx.x < count)
    for (int group = 0; group < kGroups; ++group) total += sums[group][threadIdx.x];
  return total;
}

// The inner products of `lefts` gradients with `rights` others, or among themselves where `same`: then only j >= i.
template <int lefts, int rights, bool same, class Element>
struct Tile {
  static constexpr int kRows = same ? lefts : lefts + rights, kVector = 16 / sizeof(Element);
  // The number of sweeps in flight: up to 8 loads, and up to 32 elements, which float64 doubles in width.
  static constexpr int kLoads = kVector == 8 ? 4 : 8, kDepth = kRows < kLoads ? kLoads / kRows : 1;

  static constexpr int kEntries = same ? lefts * (lefts + 1) / 2 : lefts * rights;
  static constexpr MINBERT_HOST_DEVICE int entry(int i, int j) {
    return same ? i * lefts - i * (i + 1) / 2 + j : i * rights + j;
  }

  const Element* row[kRows];
  double total[kEntries];

  template <bool whole, int sweeps>
  __device__ void add(int sweep, int length) {
    Vector<Element, kVector> read[sweeps][kRows];
#pragma unroll
    for (int k = 0; k < sweeps; ++k)
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int at = element_of(sweep + k, threadIdx.x, kVector);
        read[k][i] = row[i] ? load<whole, kVector>(row[i] + at, length - at) : Vector<Element, kVector>{};
      }
#pragma unroll
    for (int k = 0; k < sweeps; ++k)
#pragma unroll
      for (int lane = 0; lane < kVector; ++lane) {
        double x[kRows];
#pragma unroll
        for (int i = 0; i < kRows; ++i) x[i] = wide(read[k][i].at[lane]);
#pragma unroll
        for (int i = 0; i < lefts; ++i)
#pragma unroll
          for (int j = same ? i : 0; j < rights; ++j)
            total[entry(i, j)] = fma(x[i], x[same ? j : lefts + j], total[entry(i, j)]);
      }
  }

  // Computes the tile's part of the Gram matrix: rows from task `left` and columns from task `right` on.
  __device__ void run(const TaskTable& table, const Part& part, int left, int right, double* partials) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int task = i < lefts ? left + i : right + i - lefts;
      row[i] = task < table.tasks ? address<const Element>(table, part, task) : nullptr;
    }
#pragma unroll
    for (int i = 0; i < kEntries; ++i) total[i] = 0;
    constexpr int kSweep = kThreads * kVector;
    int sweep = 0;
    if (table.tensor[part.tensor].aligned)
      for (; (sweep + kDepth) * kSweep <= part.length; sweep += kDepth) add<true, kDepth>(sweep, part.length);
    for (; sweep * kSweep < part.length; ++sweep) add<false, 1>(sweep, part.length);
    const double sum = sums_of_block(total);
    const int thread = static_cast<int>(threadIdx.x);
    double* const entries = partials + part.number * table.tasks * table.tasks;
#pragma unroll
    for (int i = 0; i < lefts; ++i)
#pragma unroll
      for (int j = same ? i : 0; j < rights; ++j)
        if (thread == entry(i, j) && left + i < table.tasks && right + j < table.tasks)
          // an absent gradient is orthogonal to all others, even to one with Inf or NaN
          entries[(left + i) * table.tasks + right + j] = row[i] && row[same ? j : lefts + j] ? sum : 0;
  }
};

template <class Element, int tasks>
__global__ void __launch_bounds__(kThreads, (kBlocks<Element, tasks>))
    gram_kernel(const __grid_constant__ TaskTable table, double* partials) {
  Tile<tasks, tasks, true, Element>().run(table, find_part(table, blockIdx.x), 0, 0, partials);
}

// Neighbouring blocks process the pairs of tiles of one part, so that its gradients are read from memory once.
template <class Element>
__global__ void __launch_bounds__(kThreads, (kBlocks<Element, 2 * kTile>))
    gram_of_many_kernel(const __grid_constant__ TaskTable table, double* partials) {
  const int tiles = (table.tasks + kTile - 1) / kTile, pairs = tiles * (tiles + 1) / 2;
  const Part part = find_part(table, blockIdx.x / pairs);
  int left = 0, pair = blockIdx.x % pairs;
  for (; pair >= tiles - left; ++left) pair -= tiles - left;
  const int right = left + pair;
  if (left == right)
    Tile<kTile, kTile, true, Element>().run(table, part, left * kTile, right * kTile, partials);
  else
    Tile<kTile, kTile, false, Element>().run(table, part, left * kTile, right * kTile, partials);
}

// Parts of the model, each of which has the chunks from first_chunk[p] up to first_chunk[p + 1].
constexpr int kTableParts = 400;
struct PartTable {
  int32_t first_chunk[kTableParts + 1];
};

// One block per entry of a part's matrix. A chunk's sum is the sum of its parts, in order.
__global__ void __launch_bounds__(kThreads)
    gram_of_chunks_kernel(const __grid_constant__ PartTable table, const double* partials, int tasks, double* grams) {
  const int entries = tasks * tasks, model_part = blockIdx.x / entries, entry = blockIdx.x % entries;
  const int i = entry / tasks, j = entry % tasks;
  if (j < i) return;
  double* const gram = grams + int64_t{model_part} * entries;
  double mine[1] = {0};
  const int64_t first = table.first_chunk[model_part], end = table.first_chunk[model_part + 1];
  for (int64_t chunk = first + threadIdx.x; chunk < end; chunk += kThreads) {
    const double* const part = partials + chunk * kChunkParts * entries + entry;
    double sum = 0;
#pragma unroll
    for (int k = 0; k < kChunkParts; ++k) sum += part[k * entries];
    mine[0] += sum;
  }
  const double total = sums_of_block(mine);
  if (threadIdx.x == 0) gram[i * tasks + j] = gram[j * tasks + i] = total;
}

// Weights ----------------------------------------------------------------------------------------------------------

__global__ void surgery_weights_kernel(SurgeryProblem problem, SurgeryResult result) {
  surgery_weights(problem, result, threadIdx.x, blockDim.x, [] { __syncthreads(); });
}

// Combine ----------------------------------------------------------------------------------------------------------
//
// The kernel reads T gradients and writes one: 3 x 110M float32 are 1.76 GB, 525 us at 3.35 TB/s.

template <class Element, int tasks>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(const __grid_constant__ TaskTable table, const double* weights) {
  constexpr int kVector = 16 / sizeof(Element);
  const Part part = find_part(table, blockIdx.x);
  const WeightedSum<Element, tasks> weighted_sum(table, part, weights);
  Element* const out = address<Element>(table, part, table.tasks);
  for_each_vector<kVector>(part, table.tensor[part.tensor].aligned, [&](auto whole, int at, int count) {
    const auto sum = weighted_sum.template operator()<whole, kVector>(at, count);
    Vector<Element, kVector> result;
#pragma unroll
    for (int lane = 0; lane < kVector; ++lane) narrow(sum.at[lane], result.at[lane]);
    store<whole>(out + at, result, count);
  });
}

}  // namespace

const char* cuda_gram(const TaskGradients& g, double* partials, double* gram, void* stream) noexcept {
  const char* const error = for_each_dtype([&](DType dtype, auto element) {
    using Element = decltype(element);
    return for_each_table(g, dtype, {}, [&](const TaskTable& table, int64_t blocks) {
      return with_tasks(g.tasks, [&](auto tasks) {
        if constexpr (tasks > 0) {
          return launch(gram_kernel<Element, tasks>, blocks, kThreads, stream, table, partials);
        } else {
          const int tiles = (table.tasks + kTile - 1) / kTile, pairs = tiles * (tiles + 1) / 2;
          return launch(gram_of_many_kernel<Element>, blocks * pairs, kThreads, stream, table, partials);
        }
      });
    });
  });
  if (error) return error;
  const double* const found = partials;
  const int tasks = static_cast<int>(g.tasks);
  for (int64_t first = 0; first < g.model_parts; first += kTableParts) {
    PartTable table;
    const int64_t parts = g.model_parts - first < kTableParts ? g.model_parts - first : kTableParts;
    for (int64_t part = 0; part <= parts; ++part) {
      const int64_t tensor = g.first_tensor ? g.first_tensor[first + part] : part * g.tensors;
      table.first_chunk[part] = static_cast<int32_t>(g.first_chunk[tensor]);
    }
    const int64_t entries = g.tasks * g.tasks;
    double* const grams = gram + first * entries;
    const char* const error =
        launch(gram_of_chunks_kernel, parts * entries, kThreads, stream, table, found, tasks, grams);
    if (error) return error;
  }
  return nullptr;
}

const char* cuda_surgery_weights(const SurgeryProblem& problem, const SurgeryResult& result, void* stream) noexcept {
  const int64_t rows = problem.parts * problem.tasks;
  const int threads = rows < 32 ? 32 : rows < kThreads ? static_cast<int>(rows) : kThreads;
  return launch(surgery_weights_kernel, 1, threads, stream, problem, result);
}

const char* cuda_combine(const TaskGradients& g, const double* weights, void* const* out, void* stream) noexcept {
  return for_each_dtype([&](DType dtype, auto element) {
    using Element = decltype(element);
    return for_each_table(g, dtype, {out}, [&](const TaskTable& table, int64_t blocks) {
      return with_tasks(g.tasks, [&](auto tasks) {
        return launch(combine_kernel<Element, tasks>, blocks, kThreads, stream, table, weights);
      });
    });
  });
}

}  // namespace minbert
