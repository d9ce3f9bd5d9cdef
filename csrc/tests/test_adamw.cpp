// combine_adamw against a plain loop in float64, with averages of the parameters and copies of some; and with split
// parameters against whole ones, to the bit.
#include "check.h"

namespace minbert {
namespace {

void test_split_params(Isa isa) {
  const AdamWStep step{0.99, 0.9, 0.999, 1e-6, 0.01, 0.75};
  const double weights[] = {1, 0.7, -0.4};
  for (const int64_t tasks : {1, 3})
    for (const int64_t shift : {0, 3})
      for (const int threads : kThreadCounts) {
        Problem problem(tasks, {1, 7, 33, 1025, 0, 2049, kChunk + 13}, shift);
        const auto tensors_of = [&](int part) { return Tensors(problem, shift, part); };
        Tensors whole[] = {tensors_of(0), tensors_of(1), tensors_of(2), tensors_of(3)};
        Tensors other[] = {tensors_of(0), tensors_of(1), tensors_of(2), tensors_of(3)};
        SplitParams split(problem, shift, other[0]);
        const auto update = [&](Tensors* state, void* const* params, void* const* low_bits) {
          kernels(isa).combine_adamw(problem.view(), weights,
                                     {params, state[1].addresses.data(), state[2].addresses.data(),
                                      state[3].addresses.data(), nullptr, low_bits},
                                     step, {}, threads);
        };
        update(whole, whole[0].addresses.data(), nullptr);
        update(other, split.addresses.data(), split.low_bits.data());
        CHECK(split.equal(problem, whole[0]), "%s: split parameters are updated otherwise",
              kIsaNames[static_cast<int>(isa)]);
        for (int part = 1; part < 4; ++part)
          for (size_t k = 0; k < problem.sizes.size(); ++k)
            for (int64_t i = 0; i < problem.sizes[k]; ++i)
              CHECK(whole[part].buffers[k].get(i) == other[part].buffers[k].get(i),
                    "%s: moments or averages of split parameters differ", kIsaNames[static_cast<int>(isa)]);
      }
}

}  // namespace

void test_adamw(Isa isa) {
  test_split_params(isa);
  const AdamWStep step{0.99, 0.9, 0.999, 1e-6, 0.01, 0.75};
  for (const int64_t tasks : {1, 2, 3, 5})
    for (const int64_t shift : {0, 3})
      for (const int threads : kThreadCounts) {
        Problem problem(tasks, {1, 7, 33, 1025, 0, 2049, kChunk + 13}, shift);
        const int64_t tensors = static_cast<int64_t>(problem.sizes.size());
        const auto tensors_of = [&](int part) { return Tensors(problem, shift, part, part == 4); };
        Tensors state[] = {tensors_of(0), tensors_of(1), tensors_of(2), tensors_of(3)}, copies = tensors_of(4);
        Tensors old[] = {tensors_of(0), tensors_of(1), tensors_of(2), tensors_of(3)}, old_copies = tensors_of(4);
        std::vector<double> weights(tasks);
        for (int64_t t = 0; t < tasks; ++t) weights[t] = 1.0 - 0.3 * t;
        for (int64_t k = 3; k < tensors; k += 4) copies.addresses[k] = nullptr;
        const auto update = [&](Gate gate) {
          kernels(isa).combine_adamw(problem.view(), weights.data(),
                                     {state[0].addresses.data(), state[1].addresses.data(), state[2].addresses.data(),
                                      state[3].addresses.data(), copies.addresses.data()},
                                     step, gate, threads);
        };
        const double closed = 0, open = 1;
        update({&closed});
        for (int part = 0; part < 4; ++part)
          for (int64_t k = 0; k < tensors; ++k)
            for (int64_t i = 0; i < problem.sizes[k]; ++i)
              CHECK(state[part].buffers[k].get(i) == old[part].buffers[k].get(i),
                    "a closed gate lets an update through");
        update({&open});
        for (int64_t k = 0; k < tensors; ++k) {
          const double unit = problem.dtypes[k] == DType::float64 ? 1e-14 : 2e-6;
          for (int64_t i = 0; i < problem.sizes[k]; ++i) {
            double grad = 0;
            for (int64_t t = 0; t < tasks; ++t)
              if (problem.data[t * tensors + k]) grad += weights[t] * problem.rows[t * tensors + k].get(i);
            const double mean = step.beta1 * old[1].buffers[k].get(i) + (1 - step.beta1) * grad;
            const double square = step.beta2 * old[2].buffers[k].get(i) + (1 - step.beta2) * grad * grad;
            const double param =
                step.keep * old[0].buffers[k].get(i) - step.step_size * mean / (std::sqrt(square) + step.eps);
            const double average = step.momentum * old[3].buffers[k].get(i) + (1 - step.momentum) * param;
            const double expected[] = {param, mean, square, average};
            for (int part = 0; part < 4; ++part)
              CHECK(std::abs(state[part].buffers[k].get(i) - expected[part]) <= unit * (2 + std::abs(expected[part])),
                    "%s: combine_adamw gives %g, expected %g", kIsaNames[static_cast<int>(isa)],
                    state[part].buffers[k].get(i), expected[part]);
            const double copied = copies.buffers[k].get(i);
            const double wanted = copies.addresses[k] ? state[0].buffers[k].get(i) : old_copies.buffers[k].get(i);
            CHECK(std::abs(copied - wanted) <= std::abs(wanted) / 256, "%s: the copy of %g is %g",
                  kIsaNames[static_cast<int>(isa)], wanted, copied);
          }
        }
      }
}

}  // namespace minbert
