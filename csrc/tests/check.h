// Common parts of the C++ tests: a check that ends the program, pseudo-random numbers, and tensors in buffers of their
// exact size.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "kernels.h"
#include "philox.h"

namespace minbert {

void test_cuda_on_host();
void test_quadratic_programs();
void test_adamw(Isa isa);
void test_attention(Isa isa);
void test_rowwise(Isa isa);
void test_smart(Isa isa);
void test_weightings(Isa isa);

namespace {

#define CHECK(condition, ...)                               \
  do {                                                      \
    if (!(condition)) {                                     \
      std::fprintf(stderr, "%s:%d: ", __FILE__, __LINE__);  \
      std::fprintf(stderr, __VA_ARGS__);                    \
      std::fprintf(stderr, " (%s is false)\n", #condition); \
      std::exit(1);                                         \
    }                                                       \
  } while (false)

[[maybe_unused]] const int kThreadCounts[] = {1, 3};
[[maybe_unused]] const char* const kIsaNames[] = {"portable", "avx2", "avx512", "avx512bf16"};

inline double number(uint64_t i) {  // in [-1, 1), different for every i
  const Words4 words = philox({{static_cast<uint32_t>(i), 0, 0, 0}}, 7);
  return words.word[0] / 2147483648.0 - 1;
}

// Whether dropout keeps the element of word `word` of counter (first, row, third, stream_id).
[[maybe_unused]] inline bool keeps(const Dropout& dropout, int64_t first, int64_t row, int64_t third, int64_t word) {
  const Words4 words = philox({{static_cast<uint32_t>(first), static_cast<uint32_t>(dropout.first_row + row),
                                static_cast<uint32_t>(third), dropout.stream_id}},
                              dropout.seed);
  return words.word[word] >= dropout.threshold;
}

inline int64_t width(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

// One task's gradient for one tensor, `shift` elements past an aligned address.
class Buffer {
 public:
  Buffer(int64_t size, DType dtype, int64_t shift)
      : dtype_(dtype), shift_(shift), bytes_((size + shift) * width(dtype)) {}

  int64_t size() const { return static_cast<int64_t>(bytes_.size()) / width(dtype_) - shift_; }
  void* data() { return bytes_.data() + shift_ * width(dtype_); }

  double get(int64_t i) {
    char* at = static_cast<char*>(data()) + i * width(dtype_);
    if (dtype_ == DType::float64) return read<double>(at);
    if (dtype_ == DType::float32) return read<float>(at);
    const uint32_t bits = static_cast<uint32_t>(read<uint16_t>(at)) << 16;
    return read<float>(&bits);
  }

  void set(int64_t i, double value) {  // truncates to bfloat16
    char* at = static_cast<char*>(data()) + i * width(dtype_);
    if (dtype_ == DType::float64) return write(at, value);
    if (dtype_ == DType::float32) return write(at, static_cast<float>(value));
    const float single = static_cast<float>(value);
    write(at, static_cast<uint16_t>(read<uint32_t>(&single) >> 16));
  }

 private:
  template <class T>
  static T read(const void* from) {
    T value;
    std::memcpy(&value, from, sizeof(T));
    return value;
  }
  template <class T>
  static void write(void* to, T value) {
    std::memcpy(to, &value, sizeof(T));
  }

  DType dtype_;
  int64_t shift_;
  std::vector<char> bytes_;
};

struct Problem {
  int64_t tasks;
  std::vector<int64_t> sizes;
  std::vector<DType> dtypes;
  std::vector<Buffer> rows;
  std::vector<const void*> data;
  std::vector<int64_t> first_chunk{0};

  Problem(int64_t tasks, std::vector<int64_t> sizes, int64_t shift) : tasks(tasks), sizes(sizes) {
    const int64_t tensors = static_cast<int64_t>(sizes.size());
    for (int64_t k = 0; k < tensors; ++k) {
      dtypes.push_back(static_cast<DType>(k % 3));
      first_chunk.push_back(first_chunk.back() + (sizes[k] + kChunk - 1) / kChunk);
    }
    for (int64_t t = 0; t < tasks; ++t)
      for (int64_t k = 0; k < tensors; ++k) {
        rows.emplace_back(sizes[k], dtypes[k], shift);
        for (int64_t i = 0; i < sizes[k]; ++i) rows.back().set(i, number(i * 64 + t * 8 + k));
      }
    for (auto& row : rows) data.push_back(row.data());
    for (int64_t k = 0; k < tensors; ++k)
      if (k % 2 && tasks > 1) data[(k % tasks) * tensors + k] = nullptr;
  }

  TaskGradients view() const {
    return {tasks, static_cast<int64_t>(sizes.size()), data.data(), dtypes.data(), sizes.data(), first_chunk.data()};
  }
};

// K tensors of the dtypes of a problem's state, filled with numbers that differ between parts.
struct Tensors {
  std::vector<Buffer> buffers;
  std::vector<void*> addresses;

  Tensors(const Problem& problem, int64_t shift, int part, bool copies = false) {
    for (size_t k = 0; k < problem.sizes.size(); ++k) {
      const DType of_state = problem.dtypes[k] == DType::float64 ? DType::float64 : DType::float32;
      buffers.emplace_back(problem.sizes[k], copies ? DType::bfloat16 : of_state, shift);
      for (int64_t i = 0; i < problem.sizes[k]; ++i) {
        const double value = number(i * 64 + 40 + part);
        buffers.back().set(i, part == 2 ? value * value : value);
      }
    }
    for (auto& buffer : buffers) addresses.push_back(buffer.data());
  }
};

// The parameters of a problem, those of float32 split in bfloat16 and int16 (adamw.h).
struct SplitParams {
  std::vector<Buffer> high, low;
  std::vector<void*> addresses, low_bits;

  SplitParams(const Problem& problem, int64_t shift, Tensors& whole) {
    for (size_t k = 0; k < problem.sizes.size(); ++k) {
      high.emplace_back(problem.sizes[k], DType::bfloat16, shift);
      low.emplace_back(problem.sizes[k], DType::bfloat16, shift);
      for (int64_t i = 0; is_split(problem, k) && i < problem.sizes[k]; ++i) {
        uint32_t bits;
        std::memcpy(&bits, static_cast<float*>(whole.addresses[k]) + i, sizeof(bits));
        halves(high, k)[i] = static_cast<uint16_t>((bits + 0x8000) >> 16);
        halves(low, k)[i] = static_cast<uint16_t>(bits);
      }
    }
    for (size_t k = 0; k < problem.sizes.size(); ++k) {
      addresses.push_back(is_split(problem, k) ? high[k].data() : whole.addresses[k]);
      low_bits.push_back(is_split(problem, k) ? low[k].data() : nullptr);
    }
  }

  // Whether these are the parameters `whole` to the bit, rounded to nearest.
  bool equal(const Problem& problem, Tensors& whole) {
    const SplitParams expected(problem, 0, whole);
    for (size_t k = 0; k < problem.sizes.size(); ++k)
      for (int64_t i = 0; is_split(problem, k) && i < problem.sizes[k]; ++i)
        if (halves(high, k)[i] != halves(expected.high, k)[i] || halves(low, k)[i] != halves(expected.low, k)[i])
          return false;
    return true;
  }

 private:
  static bool is_split(const Problem& problem, size_t k) { return problem.dtypes[k] != DType::float64; }
  template <class Buffers>
  static uint16_t* halves(Buffers& buffers, size_t k) {
    return static_cast<uint16_t*>(const_cast<Buffer&>(buffers[k]).data());
  }
};

// Some tensors of a problem, from `first` up to `end`.
struct SomeTensors {
  std::vector<const void*> data;
  std::vector<int64_t> first_chunk{0};
  TaskGradients view;

  SomeTensors(const Problem& problem, int64_t first, int64_t end) {
    const int64_t tensors = static_cast<int64_t>(problem.sizes.size());
    for (int64_t t = 0; t < problem.tasks; ++t)
      data.insert(data.end(), problem.data.begin() + t * tensors + first, problem.data.begin() + t * tensors + end);
    for (int64_t k = first; k < end; ++k)
      first_chunk.push_back(problem.first_chunk[k + 1] - problem.first_chunk[first]);
    view = {problem.tasks,     end - first, data.data(), problem.dtypes.data() + first, problem.sizes.data() + first,
            first_chunk.data()};
  }
};

// The update of K tensors: their Gram matrices, and their parameters and moments after an AdamW step.
struct UpdateKernels {
  std::function<void(const TaskGradients&, double* partials, double* gram)> gram;
  std::function<void(const TaskGradients&, const double* weights, void* const* out)> combine;
  std::function<void(const TaskGradients&, const double* weights, AdamWState, AdamWStep)> combine_adamw;
};

// Each part of a model has the Gram matrix, the weighted sum and the AdamW step that its tensors have alone, to the
// bit. A part may have no tensors.
[[maybe_unused]] void check_model_parts(int64_t tasks, const UpdateKernels& kernels) {
  Problem problem(tasks, {1, 7, 33, 1025, 0, 2049, kChunk + 13, 5}, 3);
  const std::vector<int64_t> first_tensor = {0, 2, 2, 5, 8};
  const int64_t tensors = 8, parts = 4, entries = tasks * tasks;
  TaskGradients g = problem.view();
  g.model_parts = parts;
  g.first_tensor = first_tensor.data();
  std::vector<double> partials(problem.first_chunk.back() * kChunkParts * entries, NAN);
  std::vector<double> gram(parts * entries, NAN), alone(entries, NAN), weights;
  for (int64_t i = 0; i < parts * tasks; ++i) weights.push_back(number(i));
  const AdamWStep step{0.99, 0.9, 0.999, 1e-6, 0.01};
  const auto tensors_of = [&](int part) { return Tensors(problem, 3, part); };
  Tensors sums[] = {tensors_of(4), tensors_of(4)};
  for (auto& tensors_of_sums : sums)
    for (int64_t k = 0; k < tensors; ++k) {  // of the gradients' dtype
      tensors_of_sums.buffers[k] = Buffer(problem.sizes[k], problem.dtypes[k], 3);
      tensors_of_sums.addresses[k] = tensors_of_sums.buffers[k].data();
    }
  Tensors state[2][3] = {{tensors_of(0), tensors_of(1), tensors_of(2)}, {tensors_of(0), tensors_of(1), tensors_of(2)}};
  const auto from = [&](Tensors* of_state, int64_t k) {
    return AdamWState{of_state[0].addresses.data() + k, of_state[1].addresses.data() + k,
                      of_state[2].addresses.data() + k};
  };
  kernels.gram(g, partials.data(), gram.data());
  kernels.combine(g, weights.data(), sums[0].addresses.data());
  kernels.combine_adamw(g, weights.data(), from(state[0], 0), step);
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = first_tensor[part], end = first_tensor[part + 1];
    const SomeTensors some(problem, first, end);
    std::fill(alone.begin(), alone.end(), 0);
    if (end > first) {
      kernels.gram(some.view, partials.data(), alone.data());
      kernels.combine(some.view, &weights[part * tasks], sums[1].addresses.data() + first);
      kernels.combine_adamw(some.view, &weights[part * tasks], from(state[1], first), step);
    }
    CHECK(std::memcmp(&gram[part * entries], alone.data(), entries * sizeof(double)) == 0,
          "part %d of the model has another Gram matrix than its tensors alone", static_cast<int>(part));
  }
  for (int64_t k = 0; k < tensors; ++k)
    for (int64_t i = 0; i < problem.sizes[k]; ++i) {
      CHECK(sums[0].buffers[k].get(i) == sums[1].buffers[k].get(i), "the sums of tensor %d differ",
            static_cast<int>(k));
      for (int of_state = 0; of_state < 3; ++of_state)
        CHECK(state[0][of_state].buffers[k].get(i) == state[1][of_state].buffers[k].get(i),
              "the updates of tensor %d differ", static_cast<int>(k));
    }
}

}  // namespace
}  // namespace minbert
