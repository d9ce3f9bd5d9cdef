// Vectors of elements that a thread loads and stores at once, and the weighted sum of the tasks' gradients in them.
#pragma once

#include <cstring>
#include <type_traits>

#include "cuda/launch.h"
#include "cuda/multi_tensor.h"

namespace minbert {
namespace {

struct BFloat16 {
  uint16_t bits;
};

template <class Element>
struct ScalarOf {
  using type = float;
};
template <>
struct ScalarOf<double> {
  using type = double;
};

template <class T, int lanes>
struct alignas(lanes * sizeof(T)) Vector {
  T at[lanes];
};

__device__ inline float wide(float x) { return x; }
__device__ inline double wide(double x) { return x; }
__device__ inline float wide(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float result;
  memcpy(&result, &bits, sizeof(result));
  return result;
}

// Rounded to nearest even; NaN stays NaN.
__device__ inline void narrow(float x, float& to) { to = x; }
__device__ inline void narrow(double x, double& to) { to = x; }
__device__ inline void narrow(float x, BFloat16& to) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  to.bits = x == x ? static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16) : uint16_t{0xFFFF};
}
__device__ inline void narrow(double x, BFloat16& to) { narrow(static_cast<float>(x), to); }

// `whole`: the address is aligned and all lanes are in the tensor. Else only the first `count` are; the others are 0.
template <bool whole, int lanes, class T>
__device__ inline Vector<T, lanes> load(const T* from, int count) {
  if constexpr (whole) {
    return *reinterpret_cast<const Vector<T, lanes>*>(from);
  } else {
    Vector<T, lanes> v{};
#pragma unroll
    for (int lane = 0; lane < lanes; ++lane)
      if (lane < count) v.at[lane] = from[lane];
    return v;
  }
}

template <bool whole, int lanes, class T>
__device__ inline void store(T* to, const Vector<T, lanes>& v, int count) {
  if constexpr (whole) {
    *reinterpret_cast<Vector<T, lanes>*>(to) = v;
  } else {
#pragma unroll
    for (int lane = 0; lane < lanes; ++lane)
      if (lane < count) to[lane] = v.at[lane];
  }
}

// Address `i` of a part's tensor, plus the part's first element; null stays null.
template <class T>
__device__ inline T* address(const TaskTable& table, const Part& part, int i) {
  void* const first = table.address[part.tensor * table.addresses_each + i];
  return first ? static_cast<T*>(first) + part.begin : nullptr;
}

// The weighted sum of a part's gradients, with the row of weights [G, T] of its part of the model: of `tasks` tasks, or
// of any number, in groups, where `tasks` is 0.
template <class Element, int tasks>
class WeightedSum {
  using Scalar = typename ScalarOf<Element>::type;
  static constexpr int kGroup = tasks > 0 ? tasks : 4;

 public:
  __device__ WeightedSum(const TaskTable& table, const Part& part, const double* weights)
      : table_(table), part_(part), weights_(weights + table.tensor[part.tensor].model_part * table.tasks) {
    if (tasks > 0) find_group(0, row_, weight_);
  }

  // The sums of the elements from `at` on. Adds the tasks in order.
  template <bool whole, int lanes>
  __device__ Vector<Scalar, lanes> operator()(int at, int count) const {
    Vector<Scalar, lanes> total{};
    if constexpr (tasks > 0) {
      add_group<whole>(row_, weight_, at, count, total);
    } else {
      for (int first = 0; first < table_.tasks; first += kGroup) {
        const Element* row[kGroup];
        Scalar weight[kGroup];
        find_group(first, row, weight);
        add_group<whole>(row, weight, at, count, total);
      }
    }
    return total;
  }

 private:
  // A missing gradient adds zeros, whatever its weight.
  __device__ void find_group(int first, const Element* (&row)[kGroup], Scalar (&weight)[kGroup]) const {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const int task = first + i;
      row[i] = tasks > 0 || task < table_.tasks ? address<const Element>(table_, part_, task) : nullptr;
      weight[i] = row[i] ? static_cast<Scalar>(weights_[task]) : Scalar(0);
    }
  }

  template <bool whole, int lanes>
  __device__ static void add_group(const Element* const (&row)[kGroup], const Scalar (&weight)[kGroup], int at,
                                   int count, Vector<Scalar, lanes>& total) {
    Vector<Element, lanes> read[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i)
      read[i] = row[i] ? load<whole, lanes>(row[i] + at, count) : Vector<Element, lanes>{};
#pragma unroll
    for (int i = 0; i < kGroup; ++i)
#pragma unroll
      for (int lane = 0; lane < lanes; ++lane) total.at[lane] += weight[i] * wide(read[i].at[lane]);
  }

  const TaskTable& table_;
  const Part& part_;
  const double* const weights_;
  const Element* row_[kGroup];
  Scalar weight_[kGroup];
};

// Calls body(whole, at, count) for each of the thread's vectors of a part; `whole` is a std::bool_constant.
template <int lanes, class Body>
__device__ inline void for_each_vector(const Part& part, bool aligned, const Body& body) {
  constexpr int kSweep = kThreads * lanes;
  for (int sweep = 0; sweep * kSweep < part.length; ++sweep) {
    const int at = element_of(sweep, threadIdx.x, lanes);
    if (aligned && (sweep + 1) * kSweep <= part.length)
      body(std::true_type(), at, lanes);
    else if (at < part.length)
      body(std::false_type(), at, part.length - at);
  }
}

// Calls f with the number of tasks as a constant, or with 0 where there is no kernel for the number.
template <class F>
const char* with_tasks(int64_t tasks, const F& f) {
  if (tasks == 1) return f(std::integral_constant<int, 1>());
  if (tasks == 2) return f(std::integral_constant<int, 2>());
  if (tasks == 3) return f(std::integral_constant<int, 3>());
  if (tasks == 4) return f(std::integral_constant<int, 4>());
  return f(std::integral_constant<int, 0>());
}

// Calls f with a value of each dtype's C++ type until one call returns an error.
template <class F>
const char* for_each_dtype(const F& f) {
  if (const char* error = f(DType::float32, float())) return error;
  if (const char* error = f(DType::bfloat16, BFloat16())) return error;
  return f(DType::float64, double());
}

}  // namespace
}  // namespace minbert
