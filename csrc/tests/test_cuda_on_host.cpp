// The CUDA kernels of surgery and AdamW, run on the host: the elements that the blocks visit, the order of the Gram
// matrix's sums, the weights that several threads compute together, and all results against the CPU kernels'.
#include <condition_variable>
#include <mutex>
#include <thread>

#include "check.h"
#include "cuda/adamw.cu"
#include "cuda/surgery.cu"

namespace minbert {
namespace {

// Every element of every tensor is visited once, whatever the vectors' width, and every part of every chunk.
void test_every_element_is_visited_once(int64_t tasks, int64_t tensors) {
  const int64_t kSizes[] = {1, 0, 7, 1023, 1024, 4097, kPart, kPart + 1, 300, kChunk - 1, 2, 5000};
  std::vector<int64_t> sizes, first_chunk = {0};
  std::vector<DType> dtypes;
  std::vector<const void*> data(tasks * tensors);
  std::vector<void*> others(tensors);
  std::vector<std::vector<uint8_t>> visits;
  for (int64_t k = 0; k < tensors; ++k) {
    sizes.push_back(k == 40 ? 2 * kChunk + 5 : kSizes[k % 12] / (tensors > 12 ? 1 + k % 3 : 1));
    dtypes.push_back(static_cast<DType>(k % 7 % 3));
    first_chunk.push_back(first_chunk.back() + (sizes[k] + kChunk - 1) / kChunk);
    visits.emplace_back(sizes[k], 0);
    others[k] = visits[k].data();
    // addresses that are only compared: task, tensor and, for a few, a misalignment
    for (int64_t t = 0; t < tasks; ++t)
      if ((t + k) % 3 || tasks == 1)
        data[t * tensors + k] = reinterpret_cast<const void*>((t * tensors + k + 1) * 64 + (k % 5 == 0) * 4);
  }
  const TaskGradients g{tasks, tensors, data.data(), dtypes.data(), sizes.data(), first_chunk.data()};
  std::vector<int> slots(first_chunk.back() * kChunkParts, 0);
  for (const DType dtype : {DType::float32, DType::bfloat16, DType::float64}) {
    const int lanes = static_cast<int>(16 / width(dtype));
    const char* const error =
        for_each_table(g, dtype, {others.data(), nullptr}, [&](const TaskTable& table, int blocks) {
          for (int block = 0; block < blocks; ++block) {
            const Part part = find_part(table, block);
            void* const* const address = table.address + part.tensor * table.addresses_each;
            int64_t k = 0;
            while (others[k] != address[tasks] || sizes[k] == 0) ++k;
            CHECK(dtypes[k] == dtype && table.tensor[part.tensor].size == sizes[k], "tensor %d", static_cast<int>(k));
            for (int64_t t = 0; t < tasks; ++t)
              CHECK(address[t] == data[t * tensors + k], "gradient of tensor %d", static_cast<int>(k));
            CHECK(address[tasks + 1] == nullptr, "an address that is not given");
            CHECK(part.number / kChunkParts == first_chunk[k] + part.begin / kChunk, "part %d", block);
            ++slots[part.number];
            for (int sweep = 0; sweep * kThreads * lanes < part.length; ++sweep)
              for (int thread = 0; thread < kThreads; ++thread)
                for (int at = element_of(sweep, thread, lanes), lane = 0; lane < lanes && at + lane < part.length;
                     ++lane)
                  ++visits[k][part.begin + at + lane];
          }
          return static_cast<const char*>(nullptr);
        });
    CHECK(error == nullptr, "%s", error);
  }
  for (const auto& of_tensor : visits)
    for (const int count : of_tensor) CHECK(count == 1, "an element is visited %d times", count);
  for (const int count : slots) CHECK(count == 1, "a part is processed %d times", count);
}

void test_more_tasks_than_fit() {
  const std::vector<const void*> data(kTableAddresses + 1);
  const DType dtype = DType::float32;
  const int64_t size = 1, first_chunk[] = {0, 1};
  const TaskGradients g{kTableAddresses + 1, 1, data.data(), &dtype, &size, first_chunk};
  CHECK(for_each_table(g, dtype, {}, [](const TaskTable&, int) { return "launched"; }) != nullptr, "too many tasks");
}

#ifdef __SANITIZE_THREAD__
constexpr bool kRunsKernels = false;  // ThreadSanitizer does not support threads that switch stacks
#else
constexpr bool kRunsKernels = true;
#endif

// The Gram matrix, summed in the order of the kernels of csrc/cuda/surgery.cu.
std::vector<double> gram_of_launches(Problem& problem) {
  const TaskGradients g = problem.view();
  const int64_t tasks = g.tasks, entries = tasks * tasks, chunks = g.first_chunk[g.tensors];
  std::vector<double> partials(chunks * kChunkParts * entries, NAN), gram(entries, NAN);
  std::vector<void*> index(g.tensors);
  for (int64_t k = 0; k < g.tensors; ++k) index[k] = reinterpret_cast<void*>(16 * k);
  for (const DType dtype : {DType::float32, DType::bfloat16, DType::float64}) {
    const int lanes = static_cast<int>(16 / width(dtype));
    for_each_table(g, dtype, {index.data()}, [&](const TaskTable& table, int blocks) {
      for (int block = 0; block < blocks; ++block) {
        const Part part = find_part(table, block);
        void* const* const address = table.address + part.tensor * table.addresses_each;
        const int64_t k = static_cast<int64_t>(reinterpret_cast<uintptr_t>(address[tasks]) / 16);
        for (int64_t i = 0; i < tasks; ++i)
          for (int64_t j = i; j < tasks; ++j) {
            double sums[kThreads] = {};
            for (int thread = 0; thread < kThreads; ++thread)
              for (int sweep = 0; sweep * kThreads * lanes < part.length; ++sweep)
                for (int at = element_of(sweep, thread, lanes), lane = 0; lane < lanes && at + lane < part.length;
                     ++lane)
                  sums[thread] = std::fma(problem.rows[i * g.tensors + k].get(part.begin + at + lane),
                                          problem.rows[j * g.tensors + k].get(part.begin + at + lane), sums[thread]);
            partials[part.number * entries + i * tasks + j] = address[i] && address[j] ? sum_of_lanes(sums) : 0;
          }
      }
      return static_cast<const char*>(nullptr);
    });
  }
  for (int64_t i = 0; i < tasks; ++i)
    for (int64_t j = i; j < tasks; ++j) {
      double sums[kLanes] = {};
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        double sum = 0;
        for (int64_t part = 0; part < kChunkParts; ++part)
          sum += partials[(chunk * kChunkParts + part) * entries + i * tasks + j];
        sums[chunk % kLanes] += sum;
      }
      gram[i * tasks + j] = gram[j * tasks + i] = sum_of_lanes(sums);
    }
  return gram;
}

// Sums of small whole numbers are exact: both ways give the same bits unless an element is missing or counted twice.
void test_gram_of_launches(int64_t tasks) {
  for (const bool whole : {true, false}) {
    Problem problem(tasks, {1, 3000, 0, kChunk + 13, kPart + 1}, whole ? 3 : 0);
    double largest = 0;
    for (auto& row : problem.rows)
      for (int64_t i = 0; i < row.size(); ++i) {
        if (whole) row.set(i, std::floor(16 * row.get(i)));
        largest += row.get(i) * row.get(i);
      }
    const std::vector<double> gram = gram_of_launches(problem);
    std::vector<double> partials(problem.first_chunk.back() * kChunkParts * tasks * tasks, NAN),
        expected(tasks * tasks);
    if (kRunsKernels) {
      CHECK(cuda_gram(problem.view(), partials.data(), expected.data(), nullptr) == nullptr, "gram");
      CHECK(std::memcmp(gram.data(), expected.data(), gram.size() * sizeof(double)) == 0,
            "the kernels' Gram matrix of %d tasks has other bits", static_cast<int>(tasks));
    }
    kernels(Isa::portable).gram(problem.view(), partials.data(), expected.data(), 1);
    for (int64_t entry = 0; entry < tasks * tasks; ++entry)
      CHECK(std::abs(gram[entry] - expected[entry]) <= (whole ? 0 : 1e-14 * largest), "gram is %.17g, expected %.17g",
            gram[entry], expected[entry]);
  }
}

// A number in each of many parts of a model.
void test_more_model_parts_than_a_launch_takes() {
  const int64_t parts = kTableParts + 3;
  const Problem problem(1, std::vector<int64_t>(parts, 1), 0);
  std::vector<int64_t> first_tensor(parts + 1);
  for (int64_t part = 0; part <= parts; ++part) first_tensor[part] = part;
  TaskGradients g = problem.view();
  g.model_parts = parts;
  g.first_tensor = first_tensor.data();
  std::vector<double> partials(parts * kChunkParts, NAN), gram(parts, NAN);
  CHECK(cuda_gram(g, partials.data(), gram.data(), nullptr) == nullptr, "gram");
  for (int64_t part = 0; part < parts; ++part) {
    const double value = const_cast<Buffer&>(problem.rows[part]).get(0);
    CHECK(gram[part] == value * value, "part %d", static_cast<int>(part));
  }
}

void test_absent_gradients_are_orthogonal_to_infinity() {
  Problem problem(2, {5}, 0);
  problem.rows[0].set(2, INFINITY);
  problem.data[1] = nullptr;
  std::vector<double> partials(kChunkParts * 4, NAN), gram(4, NAN);
  CHECK(cuda_gram(problem.view(), partials.data(), gram.data(), nullptr) == nullptr, "gram");
  CHECK(std::isinf(gram[0]) && gram[1] == 0 && gram[2] == 0 && gram[3] == 0, "an absent gradient is not orthogonal");
}

// Blocks threads until all of them wait.
class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const int round = round_;
    if (++waiting_ == threads_) {
      waiting_ = 0;
      ++round_;
      all_wait_.notify_all();
    }
    all_wait_.wait(lock, [&] { return round != round_; });
  }

 private:
  const int threads_;
  int waiting_ = 0, round_ = 0;
  std::mutex mutex_;
  std::condition_variable all_wait_;
};

std::vector<double> weights_and_stats(SurgeryProblem problem, int workers) {
  const int64_t tasks = problem.tasks, rows = problem.parts * tasks;
  std::vector<double> result(rows + 4, NAN), scratch((tasks + 3) * rows, NAN);
  const SurgeryResult to{result.data(), result.data() + rows, scratch.data()};
  Barrier barrier(workers);
  std::vector<std::thread> threads;
  for (int worker = 0; worker < workers; ++worker)
    threads.emplace_back([&, worker] { surgery_weights(problem, to, worker, workers, [&] { barrier.wait(); }); });
  for (auto& thread : threads) thread.join();
  return result;
}

// Random gradients of few elements, so that many conflict. The bits do not depend on the number of threads, and those
// of a part not on the other parts, but for clipping.
void test_weights_of_many_workers(int64_t parts, int64_t tasks, bool mean) {
  const int64_t entries = tasks * tasks, rows = parts * tasks;
  std::vector<double> gram(parts * entries, 0);
  std::vector<int64_t> orders(parts * entries);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t j = 0; j < tasks; ++j) {
      const int64_t other = row / tasks * tasks + j;
      for (int64_t e = 0; e < 5; ++e) gram[row * tasks + j] += number(row * 5 + e) * number(other * 5 + e);
      orders[row * tasks + j] = (row * 3 + j) % tasks;
    }
  const double own_square = 0.25;
  SurgeryProblem problem{parts, tasks, gram.data(), orders.data(), nullptr, &own_square, 0, mean};
  const std::vector<double> unclipped = weights_and_stats(problem, 1);
  double square = own_square;
  for (int64_t part = 0; part < parts; ++part) {
    const SurgeryProblem of_part{1, tasks, &gram[part * entries], &orders[part * entries], nullptr, nullptr, 0, mean};
    const std::vector<double> found = weights_and_stats(of_part, 2);
    CHECK(std::memcmp(found.data(), &unclipped[part * tasks], tasks * sizeof(double)) == 0, "weights of a part");
    square += found[tasks] * found[tasks];
  }
  CHECK(std::abs(unclipped[rows] - std::sqrt(square)) <= 1e-14 * std::sqrt(square), "the norm of all parts");
  problem.max_norm = 0.01;
  const std::vector<double> alone = weights_and_stats(problem, 1);
  for (const int workers : {2, 5})
    CHECK(weights_and_stats(problem, workers) == alone, "%d workers compute other weights", workers);
  if (kRunsKernels) {
    std::vector<double> result(rows + 4, NAN), scratch((tasks + 3) * rows, NAN);
    const char* const error =
        cuda_surgery_weights(problem, {result.data(), result.data() + rows, scratch.data()}, nullptr);
    CHECK(error == nullptr && result == alone, "the kernel computes other weights");
  }
  CHECK(alone[rows] > 0.01 && alone[rows + 1] == 0.01 / alone[rows] && alone[rows + 2] == 1, "stats");
  if (tasks != 2 || gram[1] >= 0) return;
  const double along[] = {alone[0] * gram[0] + alone[1] * gram[1], alone[0] * gram[2] + alone[1] * gram[3]};
  CHECK(along[0] > -1e-15 && along[1] > -1e-15, "the sum of two conflicts with %g, %g", along[0], along[1]);
}

void check_close(std::vector<Buffer>& results, std::vector<Buffer>& expected, const Problem& problem, double unit) {
  for (size_t k = 0; k < results.size(); ++k)
    for (int64_t i = 0; i < results[k].size(); ++i) {
      const double result = results[k].get(i), wanted = expected[k].get(i);
      const double of_dtype = problem.dtypes[k] == DType::float64 && unit < 1e-3 ? 1e-14 : unit;
      CHECK(std::abs(result - wanted) <= of_dtype * (1 + std::abs(wanted)),
            "element %d of tensor %d is %g, expected %g", static_cast<int>(i), static_cast<int>(k), result, wanted);
    }
}

// combine and combine_adamw as on the CPU, at any alignment.
void test_kernels_agree_with_the_cpu(int64_t tasks, int64_t shift) {
  const Kernels& cpu = kernels(Isa::portable);
  Problem problem(tasks, {1, 7, 33, 1025, 0, 2049, kChunk + 13, kPart, 3 * kThreads * 8}, shift);
  std::vector<double> weights(tasks);
  for (int64_t t = 0; t < tasks; ++t) weights[t] = 1.0 - 0.3 * t;

  Problem sums(1, problem.sizes, shift), expected_sums(1, problem.sizes, shift);
  std::vector<void*> out, expected_out;
  for (size_t k = 0; k < problem.sizes.size(); ++k) {
    out.push_back(sums.rows[k].data());
    expected_out.push_back(expected_sums.rows[k].data());
    for (int64_t i = 0; i < problem.sizes[k]; ++i) sums.rows[k].set(i, NAN);
  }
  cpu.combine(problem.view(), weights.data(), expected_out.data(), 1);
  CHECK(cuda_combine(problem.view(), weights.data(), out.data(), nullptr) == nullptr, "combine");
  for (size_t k = 0; k < problem.sizes.size(); ++k)
    for (int64_t i = 0; i < problem.sizes[k]; ++i) {
      const double result = sums.rows[k].get(i), wanted = expected_sums.rows[k].get(i);
      const double unit = problem.dtypes[k] == DType::bfloat16  ? 8e-3
                          : problem.dtypes[k] == DType::float32 ? 1e-6
                                                                : 1e-14;
      CHECK(std::abs(result - wanted) <= unit * (1 + std::abs(wanted)), "combine gives %g, expected %g", result,
            wanted);
    }

  const AdamWStep step{0.99, 0.9, 0.999, 1e-6, 0.01, 0.75};
  const double closed = 0, open = 1;
  for (const bool with_more : {false, true}) {
    Tensors mine[] = {
        {problem, shift, 0}, {problem, shift, 1}, {problem, shift, 2}, {problem, shift, 3}, {problem, shift, 4, true}};
    Tensors other[] = {
        {problem, shift, 0}, {problem, shift, 1}, {problem, shift, 2}, {problem, shift, 3}, {problem, shift, 4, true}};
    const auto state = [&](Tensors* tensors) {
      tensors[4].addresses[1] = nullptr;
      return AdamWState{tensors[0].addresses.data(), tensors[1].addresses.data(), tensors[2].addresses.data(),
                        with_more ? tensors[3].addresses.data() : nullptr,
                        with_more ? tensors[4].addresses.data() : nullptr};
    };
    cuda_combine_adamw(problem.view(), weights.data(), state(mine), step, {&closed}, nullptr);
    for (int part = 0; part < 5; ++part) check_close(mine[part].buffers, other[part].buffers, problem, 0);
    cpu.combine_adamw(problem.view(), weights.data(), state(other), step, {}, 1);
    const char* const error = cuda_combine_adamw(problem.view(), weights.data(), state(mine), step, {&open}, nullptr);
    CHECK(error == nullptr, "combine_adamw");
    for (int part = 0; part < 5; ++part)
      check_close(mine[part].buffers, other[part].buffers, problem, part < 4 ? 2e-6 : 8e-3);
  }

  Tensors whole[] = {{problem, shift, 0}, {problem, shift, 1}, {problem, shift, 2}};
  Tensors other[] = {{problem, shift, 0}, {problem, shift, 1}, {problem, shift, 2}};
  SplitParams split(problem, shift, other[0]);
  const auto update = [&](Tensors* state, void* const* params, void* const* low_bits) {
    const AdamWState of_tensors{params,  state[1].addresses.data(), state[2].addresses.data(), nullptr, nullptr,
                                low_bits};
    CHECK(cuda_combine_adamw(problem.view(), weights.data(), of_tensors, step, {}, nullptr) == nullptr, "split");
  };
  update(whole, whole[0].addresses.data(), nullptr);
  update(other, split.addresses.data(), split.low_bits.data());
  CHECK(split.equal(problem, whole[0]), "split parameters are updated otherwise");
  for (int part = 1; part < 3; ++part) check_close(other[part].buffers, whole[part].buffers, problem, 0);
}

}  // namespace

void test_cuda_on_host() {
  for (const int64_t tasks : {1, 2, 3, 4, 5, 9})
    for (const int64_t tensors : {1, 2, 41, 300, 450}) test_every_element_is_visited_once(tasks, tensors);
  test_every_element_is_visited_once(150, 5);  // two tensors in a launch
  test_more_tasks_than_fit();
  for (const int64_t tasks : {1, 2, 3, 4, 7}) test_gram_of_launches(tasks);
  if (kRunsKernels) {
    test_absent_gradients_are_orthogonal_to_infinity();
    for (const int64_t tasks : {1, 2, 3, 4, 5, 9})
      for (const int64_t shift : {0, 3}) test_kernels_agree_with_the_cpu(tasks, shift);
    for (const int64_t tasks : {1, 3, 5})
      check_model_parts(tasks, {[](const TaskGradients& g, double* partials, double* gram) {
                                  CHECK(!cuda_gram(g, partials, gram, nullptr), "gram");
                                },
                                [](const TaskGradients& g, const double* weights, void* const* out) {
                                  CHECK(!cuda_combine(g, weights, out, nullptr), "combine");
                                },
                                [](const TaskGradients& g, const double* weights, AdamWState state, AdamWStep step) {
                                  CHECK(!cuda_combine_adamw(g, weights, state, step, {}, nullptr), "combine_adamw");
                                }});
    test_more_model_parts_than_a_launch_takes();
  }
  for (const int64_t tasks : {1, 2, 3, 4, 9})
    for (const bool mean : {false, true})
      for (const int64_t parts : {1, 3}) test_weights_of_many_workers(parts, tasks, mean);
}

}  // namespace minbert
