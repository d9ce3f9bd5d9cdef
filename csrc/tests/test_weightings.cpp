// task_weights: small linear algebra, the optimality conditions of the quadratic programs, what each rule promises,
// over random and degenerate gradients, and the CUDA kernel on the host.
#include "check.h"
#include "cuda/weightings.cu"
#include "random_gradients.h"

namespace minbert {
namespace {

constexpr int kRules = static_cast<int>(WeightingRule::geometric_mean) + 1;
// A call of task_weights, with scratch memory of the exact size.
struct Call {
  WeightingRule rule;
  int64_t tasks, parts = 1;
  Matrix gram, options{0, 0}, losses{}, noise{}, state{};
  std::vector<int64_t> orders{};

  Matrix run(Isa isa) {
    return run(1, [isa](const WeightingProblem& problem) { kernels(isa).task_weights(problem); });
  }
  Matrix run_on_device() {
    return run(parts, [](const WeightingProblem& problem) {
      CHECK(cuda_task_weights(problem, nullptr) == nullptr, "launch");
    });
  }

 private:
  template <class Kernel>
  Matrix run(int64_t blocks, const Kernel& kernel) {
    Matrix weights(parts * tasks, NAN), scratch(blocks * weighting_scratch(tasks), NAN);
    const int64_t state_size = static_cast<int64_t>(state.size()) / parts;
    kernel({rule,
            parts,
            tasks,
            state_size,
            gram.data(),
            losses.empty() ? nullptr : losses.data(),
            noise.data(),
            orders.data(),
            state.data(),
            weights.data(),
            scratch.data(),
            {options[0], options[1]}});
    return weights;
  }
};

int64_t state_size(WeightingRule rule, int64_t tasks) {
  switch (rule) {
    case WeightingRule::nash_mtl:
      return 1 + tasks;
    case WeightingRule::gradvac:
      return tasks * tasks;
    case WeightingRule::famo:
    case WeightingRule::gradnorm:
      return 1 + 4 * tasks;
    case WeightingRule::uncertainty:
    case WeightingRule::dwa:
      return 1 + 3 * tasks;
    default:
      return 0;
  }
}

Matrix usual_options(WeightingRule rule) {
  switch (rule) {
    case WeightingRule::upgrad:
    case WeightingRule::dualproj:
      return {1e-4, 0};
    case WeightingRule::cagrad:
      return {0.4, 0};
    case WeightingRule::nash_mtl:
      return {1, 1};
    case WeightingRule::gradvac:
      return {0.5, 0};
    case WeightingRule::fairgrad:
      return {1, 0};
    case WeightingRule::famo:
      return {0.025, 0.001};
    case WeightingRule::uncertainty:
      return {0.01, 0};
    case WeightingRule::dwa:
      return {2, 2};
    case WeightingRule::gradnorm:
      return {1.5, 0.025};
    default:
      return {0, 0};
  }
}

Call call_of(WeightingRule rule, int64_t tasks, const Matrix& gram, int64_t parts = 1) {
  Call call{rule, tasks, parts, gram, usual_options(rule)};
  if (rule >= WeightingRule::famo)
    for (int64_t i = 0; i < tasks; ++i) call.losses.push_back(std::exp(normal()));
  for (int64_t i = 0; i < parts * tasks; ++i) call.noise.push_back(normal());
  for (int64_t i = 0; i < parts * tasks * tasks; ++i) call.orders.push_back((i / tasks * 3 + i) % tasks);
  call.state.assign(parts * state_size(rule, tasks), 0);
  return call;
}

Matrix weights_of(Isa isa, WeightingRule rule, int64_t tasks, const Matrix& gram, const Matrix& options) {
  Call call = call_of(rule, tasks, gram);
  call.options = options;
  return call.run(isa);
}

// Rules ---------------------------------------------------------------------------------------------------------------

struct Case {
  Isa isa;
  int64_t tasks, dimensions;
  int kind;
  Matrix gram;

  Matrix weights(WeightingRule rule, const Matrix& options) const {
    return weights_of(isa, rule, tasks, gram, options);
  }
  bool scaled() const { return kind == 1 || kind == 5; }
  bool independent() const { return kind == 0 && dimensions >= 2 * tasks; }
};

void check(bool holds, const Case& of, const char* what, double value) {
  CHECK(holds, "%s, %d tasks in %d dimensions, kind %d: %s is %g", kIsaNames[static_cast<int>(of.isa)],
        static_cast<int>(of.tasks), static_cast<int>(of.dimensions), of.kind, what, value);
}

// The program min v' (G / trace + eps I) v with v >= least, for `weights` = least + x.
void check_dual_cone(const Case& of) {
  const int64_t n = of.tasks;
  Matrix weights = of.weights(WeightingRule::dualproj, {1e-4, 0}), a = of.gram, sum(n);
  for (int64_t i = 0; i < n * n; ++i) a[i] = a[i] / trace(of.gram, n) + (i % (n + 1) ? 0 : 1e-4);
  const Matrix b = product(a, Matrix(n, 1.0 / n));
  for (auto& weight : weights) weight -= 1.0 / n;
  check_optimal({n, a.data(), b.data(), false}, weights.data(), of.scaled());
  const Matrix upgrad = of.weights(WeightingRule::upgrad, {1e-4, 0}), along = product(a, upgrad);
  for (int64_t i = 0; i < n; ++i) check(along[i] >= -1e-13, of, "the inner product with UPGrad's update", along[i]);
}

void check_cagrad(const Case& of, double c) {
  const int64_t n = of.tasks;
  Matrix weights = of.weights(WeightingRule::cagrad, {c, 0}), a = of.gram, mean(n, 1.0 / n);
  for (auto& entry : a) entry /= trace(of.gram, n);
  double sum = 0;
  for (auto& weight : weights) sum += weight -= 1.0 / n;
  const Matrix of_mean = product(a, mean);
  const double radius = c * std::sqrt(std::max(0.0, dot_of(mean, of_mean)));
  if (radius <= 1e-6)  // the mean gradient is nothing but rounding
    return check(std::abs(sum + 1) <= 1e-14 || std::abs(sum) <= 0.01, of, "the weight of CAGrad's worst gradient", sum);
  if (sum < 0) {  // all weights 0: the programme's minimum has a norm below 1e-4
    Matrix b = of_mean, x(n), memory(quadratic_program_numbers(n));
    for (auto& entry : b) entry *= 1e-4 / radius;
    minimise(QuadraticProgram{n, a.data(), b.data(), true}, x.data(), {memory.data()});
    return check(dot_of(x, product(a, x)) <= 1.0001e-8, of, "the square of CAGrad's norm", dot_of(x, product(a, x)));
  }
  for (auto& weight : weights) weight /= sum;
  const Matrix of_worst = product(a, weights);
  const double norm = std::sqrt(dot_of(weights, of_worst));
  check(std::abs(radius / norm - sum) <= 1e-9 * sum, of, "CAGrad's radius over the norm", radius / norm - sum);
  Matrix slope(n);
  for (int64_t i = 0; i < n; ++i) slope[i] = of_mean[i] + radius * of_worst[i] / norm;
  const double level = dot_of(slope, weights);
  for (int64_t i = 0; i < n; ++i) {
    check(slope[i] >= level - 1e-10 * radius / c, of, "CAGrad's gain by another weight", slope[i] - level);
    check(weights[i] * (slope[i] - level) <= 1e-10 * radius / c, of, "CAGrad's slack", slope[i] - level);
  }
}

// G w = w^-p, tasks of zero gradient without weight. `tolerance` is relative to the sums' terms.
void check_fair(const Case& of, const Matrix& gram, const Matrix& w, double power, double tolerance) {
  for (int64_t i = 0; i < of.tasks; ++i) {
    if (of.gram[i * (of.tasks + 1)] == 0) {
      check(w[i] == 0, of, "the weight of a gradient of 0", w[i]);
      continue;
    }
    check(w[i] > 0, of, "a fair weight", w[i]);
    double total = 0, size = 0;
    for (int64_t j = 0; j < of.tasks; ++j) {
      const double term = gram[i * of.tasks + j] * w[j] + (i == j ? 1e-14 * gram[i * of.tasks + i] * w[i] : 0);
      total += term;
      size += std::abs(term);
    }
    const double wanted = std::pow(w[i], -power);
    check(std::abs(total - wanted) <= tolerance * (size + wanted), of, "the residual of a fair weight",
          (total - wanted) / (size + wanted));
  }
}

void check_fair_rules(const Case& of) {
  const double tolerance = of.independent() ? 1e-14 : 1e-9;
  Matrix scaled = of.gram;
  const double norm = std::sqrt(dot_of(of.gram, of.gram));
  for (auto& entry : scaled) entry /= norm;
  check_fair(of, scaled, of.weights(WeightingRule::nash_mtl, {0, 1}), 1, tolerance);
  const Matrix short_ones = of.weights(WeightingRule::nash_mtl, {0.5, 1});
  double rounding = 0;
  for (int64_t i = 0; i < of.tasks * of.tasks; ++i)
    rounding += 100 * kEps * std::abs(of.gram[i] * short_ones[i / of.tasks] * short_ones[i % of.tasks]);
  const double square = dot_of(short_ones, product(of.gram, short_ones));
  check(square <= 0.25 + rounding, of, "the square of Nash's norm", square);
  for (const double alpha : {0.1, 0.5, 1.0, 2.0, 10.0})
    check_fair(of, of.gram, of.weights(WeightingRule::fairgrad, {alpha, 0}), 1 / alpha, tolerance);
}

// Rules with a pseudo-inverse, of independent gradients.
void check_of_independent(const Case& of) {
  const int64_t n = of.tasks;
  Matrix memory(spectrum_numbers(n));
  Scratch scratch{memory.data()};
  const Spectrum spectrum = eigenvalues(of.gram.data(), n, scratch);
  double least = spectrum.values[0];
  for (int64_t k = 1; k < n; ++k) least = std::min(least, spectrum.values[k]);
  const Matrix aligned = of.weights(WeightingRule::aligned_mtl, {0, 0});
  const double square = dot_of(aligned, product(of.gram, aligned)) * n / least;
  check(std::abs(square - 1) <= 1e-10, of, "the square of Aligned-MTL's norm", square);
  for (const WeightingRule rule : {WeightingRule::imtl_g, WeightingRule::config}) {
    const Matrix weights = of.weights(rule, {0, 0}), along = product(of.gram, weights);
    double sum = 0, length = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double ratio = along[i] / std::sqrt(of.gram[i * (n + 1)]) / (along[0] / std::sqrt(of.gram[0]));
      check(std::abs(ratio - 1) <= 1e-9, of, "the ratio of two projections", ratio);
      sum += weights[i];
      length += along[i];
    }
    if (rule == WeightingRule::imtl_g) {
      check(std::abs(sum - 1) <= 1e-10 * n, of, "the sum of IMTL-G's weights", sum);
    } else {
      const double found = dot_of(weights, along);  // |u|^2, where u is as long as the projections together
      check(std::abs(length / found - 1) <= 1e-9, of, "ConFIG's length", length / found);
    }
  }
}

// GradVac towards cosines of 0 that do not change is PCGrad.
void check_gradvac(const Case& of) {
  Call call = call_of(WeightingRule::gradvac, of.tasks, of.gram);
  call.options = {0, 0};
  const Matrix weights = call.run(of.isa);
  Matrix expected(of.tasks), stats(4), scratch((of.tasks + 3) * of.tasks);
  kernels(of.isa).surgery_weights({1, of.tasks, of.gram.data(), call.orders.data(), nullptr, nullptr, 0, false},
                                  {expected.data(), stats.data(), scratch.data()});
  double size = 0;
  for (int64_t i = 0; i < of.tasks; ++i) size += std::abs(expected[i]) * std::sqrt(of.gram[i * (of.tasks + 1)]);
  for (int64_t i = 0; i < of.tasks; ++i) expected[i] -= weights[i];
  const double distance = std::sqrt(std::max(0.0, dot_of(expected, product(of.gram, expected))));
  check(distance <= 1e-7 * size, of, "GradVac's distance to PCGrad", distance / size);
}

void check_all_rules(const Case& of) {
  for (int rule = 0; rule < kRules; ++rule) {
    Call call = call_of(static_cast<WeightingRule>(rule), of.tasks, of.gram);
    for (int repetition = 0; repetition < 3; ++repetition) {
      const Matrix state = call.state, weights = call.run(of.isa);
      for (const double weight : weights) check(std::isfinite(weight), of, "a weight", weight);
      for (const double number : call.state) check(std::isfinite(number), of, "a number of the state", number);
      const Matrix after = call.state;
      call.state = state;
      CHECK(call.run(of.isa) == weights && call.state == after, "rule %d has other bits", rule);
    }
  }
}

// Whatever comes, the kernels end, with weights that are finite.
void test_matrices_that_are_no_gram_matrices(Isa isa) {
  const double numbers[] = {0, 1, -1, 1e300, -1e300, 1e-300, 5e-324, 1e17, -1e-17, INFINITY, NAN};
  for (int64_t round = 0; round < 3000; ++round) {
    const int64_t tasks = 1 + below(6), known = round % 2 ? 9 : 11;
    Matrix gram(tasks * tasks);
    bool finite = true;
    for (auto& entry : gram) entry = numbers[below(known)];
    for (const double entry : gram) finite = finite && std::isfinite(entry);
    finite = finite && std::isfinite(trace(gram, tasks));
    for (int rule = 0; rule < kRules; ++rule) {
      Call call = call_of(static_cast<WeightingRule>(rule), tasks, gram);
      for (const double weight : call.run(isa))
        CHECK(finite ? std::isfinite(weight) : weight == 1, "rule %d gives a weight of %g", rule, weight);
      CHECK(finite || call.state == Matrix(call.state.size(), 0), "rule %d changes its state", rule);
    }
  }
}

void test_parts(Isa isa) {
  for (const int64_t tasks : {1, 3, 8, 16}) {
    const Matrix parts[] = {gram_of(tasks, 2 * tasks, 0), Matrix(tasks * tasks), gram_of(tasks, 5, 5),
                            gram_of(tasks, 3, 1)};
    Matrix all;
    for (const auto& gram : parts) all.insert(all.end(), gram.begin(), gram.end());
    for (int rule = 0; rule < kRules; ++rule) {
      Call together = call_of(static_cast<WeightingRule>(rule), tasks, all, 4), on_device = together;
      for (int repetition = 0; repetition < 2; ++repetition) {
        Matrix expected, states;
        for (int64_t part = 0; part < 4; ++part) {
          const auto share = [&](const auto& values) {
            const auto first = values.begin() + part * values.size() / 4;
            return std::decay_t<decltype(values)>(first, first + values.size() / 4);
          };
          Call alone{together.rule,
                     tasks,
                     1,
                     parts[part],
                     together.options,
                     together.losses,
                     share(together.noise),
                     share(together.state),
                     share(together.orders)};
          const Matrix weights = alone.run(isa);
          expected.insert(expected.end(), weights.begin(), weights.end());
          states.insert(states.end(), alone.state.begin(), alone.state.end());
        }
        CHECK(together.run(isa) == expected && together.state == states, "rule %d of parts has other bits", rule);
#ifndef __SANITIZE_THREAD__  // it does not support threads that switch stacks
        const Matrix found = on_device.run_on_device();
        for (size_t i = 0; i < found.size(); ++i)
          CHECK(std::abs(found[i] - expected[i]) <= 1e-6 * (1 + std::abs(expected[i])),
                "rule %d on a device gives %.17g, expected %.17g", rule, found[i], expected[i]);
        on_device.state = together.state;
#endif
      }
    }
  }
}

void test_gradients(Isa isa) {
  for (int64_t tasks = 1; tasks <= 16; ++tasks)
    for (const int64_t dimensions : {int64_t{1}, int64_t{2}, tasks / 2 + 1, tasks, 2 * tasks})
      for (int kind = 0; kind <= 5; ++kind) {
        const Case of{isa, tasks, dimensions, kind, gram_of(tasks, dimensions, kind)};
        check_all_rules(of);
        if (trace(of.gram, tasks) == 0) continue;
        check_dual_cone(of);
        for (const double c : {0.0, 0.1, 0.5, 0.9, 3.0}) check_cagrad(of, c);
        check_fair_rules(of);
        check_gradvac(of);
        if (of.independent()) check_of_independent(of);
      }
}

}  // namespace

void test_weightings(Isa isa) {
  test_gradients(isa);
  test_parts(isa);
  test_matrices_that_are_no_gram_matrices(isa);
}

}  // namespace minbert
