// combine_adamw against a plain loop in float64, with averages of the parameters and copies of some.
#include "check.h"

namespace minbert {

void test_adamw(Isa isa) {
  const AdamWStep step{0.99, 0.9, 0.999, 1e-6, 0.01, 0.75};
  for (const int64_t tasks : {1, 2, 3, 5})
    for (const int64_t shift : {0, 3})
      for (const int threads : kThreadCounts) {
        Problem problem(tasks, {1, 7, 33, 1025, 0, 2049, kChunk + 13}, shift);
        const int64_t tensors = static_cast<int64_t>(problem.sizes.size());
        std::vector<Buffer> state[4];  // parameters, both moments, averages
        std::vector<void*> addresses[4];
        std::vector<double> weights(tasks);
        for (int64_t t = 0; t < tasks; ++t) weights[t] = 1.0 - 0.3 * t;
        for (int part = 0; part < 4; ++part) {
          for (int64_t k = 0; k < tensors; ++k) {
            const DType dtype = problem.dtypes[k] == DType::float64 ? DType::float64 : DType::float32;
            state[part].emplace_back(problem.sizes[k], dtype, shift);
            for (int64_t i = 0; i < problem.sizes[k]; ++i) {
              const double value = number(i * 64 + 40 + part);
              state[part].back().set(i, part == 2 ? value * value : value);
            }
          }
          for (auto& buffer : state[part]) addresses[part].push_back(buffer.data());
        }
        std::vector<Buffer> old[4] = {state[0], state[1], state[2], state[3]}, copies;
        std::vector<void*> copy_addresses;
        for (int64_t k = 0; k < tensors; ++k) copies.emplace_back(problem.sizes[k], DType::bfloat16, shift);
        for (int64_t k = 0; k < tensors; ++k) copy_addresses.push_back(k % 4 == 3 ? nullptr : copies[k].data());
        const auto update = [&](Gate gate) {
          kernels(isa).combine_adamw(problem.view(), weights.data(),
                                     {addresses[0].data(), addresses[1].data(), addresses[2].data(),
                                      addresses[3].data(), copy_addresses.data()},
                                     step, gate, threads);
        };
        const double closed = 0, open = 1;
        update({&closed});
        for (int part = 0; part < 4; ++part)
          for (int64_t k = 0; k < tensors; ++k)
            for (int64_t i = 0; i < problem.sizes[k]; ++i)
              CHECK(state[part][k].get(i) == old[part][k].get(i), "a closed gate lets an update through");
        update({&open});
        for (int64_t k = 0; k < tensors; ++k) {
          const double unit = problem.dtypes[k] == DType::float64 ? 1e-14 : 2e-6;
          for (int64_t i = 0; i < problem.sizes[k]; ++i) {
            double grad = 0;
            for (int64_t t = 0; t < tasks; ++t)
              if (problem.data[t * tensors + k]) grad += weights[t] * problem.rows[t * tensors + k].get(i);
            const double mean = step.beta1 * old[1][k].get(i) + (1 - step.beta1) * grad;
            const double square = step.beta2 * old[2][k].get(i) + (1 - step.beta2) * grad * grad;
            const double param = step.keep * old[0][k].get(i) - step.step_size * mean / (std::sqrt(square) + step.eps);
            const double average = step.momentum * old[3][k].get(i) + (1 - step.momentum) * param;
            const double expected[] = {param, mean, square, average};
            for (int part = 0; part < 4; ++part)
              CHECK(std::abs(state[part][k].get(i) - expected[part]) <= unit * (2 + std::abs(expected[part])),
                    "%s: combine_adamw gives %g, expected %g", kIsaNames[static_cast<int>(isa)], state[part][k].get(i),
                    expected[part]);
            const double copied = copies[k].get(i), wanted = copy_addresses[k] ? state[0][k].get(i) : 0;
            CHECK(std::abs(copied - wanted) <= std::abs(wanted) / 256, "%s: the copy of %g is %g",
                  kIsaNames[static_cast<int>(isa)], wanted, copied);
          }
        }
      }
}

}  // namespace minbert
