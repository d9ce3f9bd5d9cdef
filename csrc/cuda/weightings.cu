// The weights of the tasks by a rule of the literature, on a CUDA device: a block for each part of the model, a thread
// for each task. No kernel waits for the host.
#include "cuda/launch.h"
//
#include "weightings.h"

namespace minbert {
namespace {

__global__ void task_weights_kernel(WeightingProblem problem) {
  double* const scratch = problem.scratch + blockIdx.x * weighting_scratch(problem.tasks);
  task_weights(problem, blockIdx.x, Scratch{scratch}, threadIdx.x, blockDim.x, [] { __syncthreads(); });
}

}  // namespace

const char* cuda_task_weights(const WeightingProblem& problem, void* stream) noexcept {
  return launch(task_weights_kernel, problem.parts, static_cast<int>(problem.tasks), stream, problem);
}

}  // namespace minbert
