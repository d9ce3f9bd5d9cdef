// What a CUDA device is told, walked and added up on the host: which elements the blocks visit, the order of the Gram
// matrix's sums, and the weights that several threads find together.
#include <condition_variable>
#include <mutex>
#include <thread>

#include "check.h"
#include "cuda/task_table.h"
#include "gram_order.h"
#include "pcgrad.h"

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
  for (const int count : slots) CHECK(count == 1, "a part is taken %d times", count);
}

void test_more_tasks_than_fit() {
  const std::vector<const void*> data(kTableAddresses + 1);
  const DType dtype = DType::float32;
  const int64_t size = 1, first_chunk[] = {0, 1};
  const TaskGradients g{kTableAddresses + 1, 1, data.data(), &dtype, &size, first_chunk};
  CHECK(for_each_table(g, dtype, {}, [](const TaskTable&, int) { return "launched"; }) != nullptr, "too many tasks");
}

// The Gram matrix as the kernels of csrc/cuda/surgery.cu add it up.
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

// Small whole numbers have exact sums: then both ways give the same bits, or an element is missing or counted twice.
void test_gram_of_launches(int64_t tasks) {
  for (const bool whole : {true, false}) {
    Problem problem(tasks, {1, 7, 33, 1025, 0, 2049, 2 * kChunk + 13, kPart + 1}, 3);
    double largest = 0;
    for (auto& row : problem.rows)
      for (int64_t i = 0; i < row.size(); ++i) {
        if (whole) row.set(i, std::floor(16 * row.get(i)));
        largest += row.get(i) * row.get(i);
      }
    const std::vector<double> gram = gram_of_launches(problem);
    std::vector<double> partials(problem.first_chunk.back() * tasks * tasks), expected(tasks * tasks);
    kernels(Isa::portable).gram(problem.view(), partials.data(), expected.data(), 1);
    for (int64_t entry = 0; entry < tasks * tasks; ++entry)
      CHECK(std::abs(gram[entry] - expected[entry]) <= (whole ? 0 : 1e-14 * largest), "gram is %.17g, expected %.17g",
            gram[entry], expected[entry]);
  }
}

// Lets threads through when all have come.
class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const int round = round_;
    if (++waiting_ == threads_) {
      waiting_ = 0;
      ++round_;
      all_came_.notify_all();
    }
    all_came_.wait(lock, [&] { return round != round_; });
  }

 private:
  const int threads_;
  int waiting_ = 0, round_ = 0;
  std::mutex mutex_;
  std::condition_variable all_came_;
};

std::vector<double> weights_and_stats(SurgeryProblem problem, int workers) {
  const int64_t tasks = problem.tasks;
  std::vector<double> result(tasks + 4, NAN), scratch((tasks + 3) * tasks, NAN);
  const SurgeryResult to{result.data(), result.data() + tasks, scratch.data()};
  Barrier barrier(workers);
  std::vector<std::thread> threads;
  for (int worker = 0; worker < workers; ++worker)
    threads.emplace_back([&, worker] { surgery_weights(problem, to, worker, workers, [&] { barrier.wait(); }); });
  for (auto& thread : threads) thread.join();
  return result;
}

// Random gradients of few elements, so that many conflict. The bits do not depend on how many threads share the work.
void test_weights_of_many_workers(int64_t tasks, bool mean) {
  std::vector<double> gram(tasks * tasks, 0);
  std::vector<int64_t> orders(tasks * tasks);
  for (int64_t i = 0; i < tasks; ++i)
    for (int64_t j = 0; j < tasks; ++j) {
      for (int64_t e = 0; e < 5; ++e) gram[i * tasks + j] += number(i * 5 + e) * number(j * 5 + e);
      orders[i * tasks + j] = (i * 3 + j) % tasks;
    }
  const double own_square = 0.25;
  const SurgeryProblem problem{tasks, gram.data(), orders.data(), nullptr, &own_square, 0.01, mean};
  const std::vector<double> alone = weights_and_stats(problem, 1);
  for (const int workers : {2, 5})
    CHECK(weights_and_stats(problem, workers) == alone, "%d workers find other weights", workers);
  CHECK(alone[tasks] > 0.01 && alone[tasks + 1] == 0.01 / alone[tasks] && alone[tasks + 2] == 1, "stats");
  if (tasks != 2 || gram[1] >= 0) return;
  const double along[] = {alone[0] * gram[0] + alone[1] * gram[1], alone[0] * gram[2] + alone[1] * gram[3]};
  CHECK(along[0] > -1e-15 && along[1] > -1e-15, "the sum of two conflicts with %g, %g", along[0], along[1]);
}

}  // namespace

void test_launches() {
  for (const int64_t tasks : {1, 2, 3, 4, 5, 9})
    for (const int64_t tensors : {1, 2, 41, 300, 450}) test_every_element_is_visited_once(tasks, tensors);
  test_every_element_is_visited_once(1200, 5);  // two tensors in a launch
  test_more_tasks_than_fit();
  for (const int64_t tasks : {1, 2, 3, 5}) test_gram_of_launches(tasks);
  for (const int64_t tasks : {1, 2, 3, 4, 9})
    for (const bool mean : {false, true}) test_weights_of_many_workers(tasks, mean);
}

}  // namespace minbert
