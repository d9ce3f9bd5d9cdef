// The weights of the tasks by a rule of the literature, on a CUDA device: a block for each part of the model, a thread
// for each task. No kernel waits for the host.
#include "cuda/launch.h"
//
#include "weightings.h"

namespace minbert {
namespace {

__global__ void task_weights_kernel(WeightingProblem problem) {
  Scratch scratch{problem.scratch + blockIdx.x * weighting_scratch(problem.tasks)};
  double* const shares = scratch.take(problem.tasks);
  shares[threadIdx.x] = are_finite(problem, threadIdx.x, blockDim.x);
  __syncthreads();
  bool finite = true;
  for (int64_t i = 0; i < problem.tasks; ++i) finite = finite && shares[i] == 1;
  task_weights(problem, blockIdx.x, finite, scratch, threadIdx.x, blockDim.x, [] { __syncthreads(); });
}

}  // namespace

const char* cuda_task_weights(const WeightingProblem& problem, void* stream) noexcept {
  return launch(task_weights_kernel, problem.parts, static_cast<int>(problem.tasks), stream, problem);
}

}  // namespace minbert
