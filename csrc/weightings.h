// The weights of the tasks by a rule of the literature, for host and device. Each of up to T workers calls
// `task_weights` for one part of the model; `sync` is their barrier. UPGrad has work for all of them, the other rules
// for the first. The operations are the same everywhere; compilers fuse products and sums in different places, so bits
// may differ.
#pragma once

#include "fair_weightings.h"
#include "gram_weightings.h"
#include "loss_weightings.h"

namespace minbert {
namespace {

// Whether all Gram matrices, their traces and all losses are finite: one worker's share of them.
inline MINBERT_HOST_DEVICE bool are_finite(const WeightingProblem& problem, int64_t worker, int64_t workers) {
  const int64_t tasks = problem.tasks, entries = tasks * tasks;
  bool finite = true;
  for (int64_t part = worker; part < problem.parts; part += workers) {
    const double* const gram = problem.gram + part * entries;
    double trace = 0;
    for (int64_t i = 0; i < tasks; ++i) trace += gram[i * (tasks + 1)];
    for (int64_t i = 0; i < entries; ++i) finite = finite && is_finite(gram[i]);
    finite = finite && is_finite(trace);
  }
  for (int64_t i = worker; problem.losses && i < tasks; i += workers) finite = finite && is_finite(problem.losses[i]);
  return finite;
}

inline MINBERT_HOST_DEVICE void run_rule(WeightingRule rule, const WeightingPart& part, Scratch scratch) {
  switch (rule) {
    case WeightingRule::upgrad:
      return;  // each worker has written some rows
    case WeightingRule::dualproj:
      return dualproj(part, scratch);
    case WeightingRule::mgda:
      return mgda(part, scratch);
    case WeightingRule::cagrad:
      return cagrad(part, scratch);
    case WeightingRule::imtl_g:
      return imtl_g(part, scratch);
    case WeightingRule::aligned_mtl:
      return aligned_mtl(part, scratch);
    case WeightingRule::nash_mtl:
      return nash_mtl(part, scratch);
    case WeightingRule::config:
      return config(part, scratch);
    case WeightingRule::gradvac:
      return gradvac(part, scratch);
    case WeightingRule::fairgrad:
      return fairgrad(part, scratch);
    case WeightingRule::random:
      return softmax(part.noise, part.tasks, part.weights);
    case WeightingRule::famo:
      return famo(part, scratch);
    case WeightingRule::uncertainty:
      return uncertainty(part);
    case WeightingRule::dwa:
      return dwa(part, scratch);
    case WeightingRule::gradnorm:
      return gradnorm(part, scratch);
    case WeightingRule::geometric_mean:
      return geometric_mean(part);
  }
}

// A rule's weights where no task has a gradient. They also replace weights that are not finite, which only a matrix
// gives that is no Gram matrix.
inline MINBERT_HOST_DEVICE double plain_weight(WeightingRule rule, int64_t tasks) {
  const bool of_sum =
      rule == WeightingRule::nash_mtl || rule == WeightingRule::config || rule == WeightingRule::gradvac;
  return of_sum ? 1 : 1 / static_cast<double>(tasks);
}

// finite: `are_finite` of all workers' shares.
template <class Sync>
inline MINBERT_HOST_DEVICE void task_weights(const WeightingProblem& problem, int64_t part, bool finite,
                                             Scratch scratch, int64_t worker, int64_t workers, const Sync& sync) {
  const int64_t tasks = problem.tasks, entries = tasks * tasks;
  const WeightingRule rule = problem.rule;
  const double* const gram = problem.gram + part * entries;
  double *const weights = problem.weights + part * tasks, *const scaled = scratch.take(entries),
                *const rows = scratch.take(entries);
  double trace = 0;
  for (int64_t i = 0; i < tasks; ++i) trace += gram[i * (tasks + 1)];
  for (int64_t i = worker; i < entries; i += workers) scaled[i] = trace > 0 ? gram[i] / trace : 0;
  sync();
  const double plain = finite ? plain_weight(rule, tasks) : 1;
  if (!finite || (!(trace > 0) && !problem.losses)) {
    for (int64_t i = worker; i < tasks; i += workers) weights[i] = plain;
    return;
  }

  const WeightingPart of{tasks,
                         gram,
                         trace,
                         scaled,
                         problem.options,
                         problem.losses,
                         problem.noise ? problem.noise + part * tasks : nullptr,
                         problem.orders ? problem.orders + part * entries : nullptr,
                         problem.state ? problem.state + part * problem.state_size : nullptr,
                         weights};
  if (rule == WeightingRule::upgrad) {
    const Scratch own{scratch.next + worker * rule_scratch(tasks)};
    for (int64_t i = worker; i < tasks; i += workers) upgrad_row(of, i, rows + i * tasks, own);
    sync();
    for (int64_t j = worker; j < tasks; j += workers) {
      weights[j] = 0;
      for (int64_t i = 0; i < tasks; ++i) weights[j] += rows[i * tasks + j];
    }
    sync();
  }
  if (worker != 0) return;
  run_rule(rule, of, scratch);
  for (int64_t i = 0; i < tasks; ++i) finite = finite && is_finite(weights[i]);
  for (int64_t i = 0; i < tasks && !finite; ++i) weights[i] = plain;
}

}  // namespace
}  // namespace minbert
