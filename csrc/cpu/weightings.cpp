// The weights of the tasks by a rule of the literature.
#include "weightings.h"

namespace minbert::MINBERT_ISA {

void task_weights(const WeightingProblem& problem) noexcept {
  const bool finite = are_finite(problem, 0, 1);
  for (int64_t part = 0; part < problem.parts; ++part)
    minbert::task_weights(problem, part, finite, {problem.scratch}, 0, 1, [] {});
}

}  // namespace minbert::MINBERT_ISA
