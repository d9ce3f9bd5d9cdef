// The weights of the tasks by a rule of the literature.
#include "weightings.h"

namespace minbert::MINBERT_ISA {

void task_weights(const WeightingProblem& problem) noexcept {
  for (int64_t part = 0; part < problem.parts; ++part)
    minbert::task_weights(problem, part, {problem.scratch}, 0, 1, [] {});
}

}  // namespace minbert::MINBERT_ISA
