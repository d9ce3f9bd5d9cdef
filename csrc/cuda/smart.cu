// SMART's perturbations on a CUDA device: the normal start, and one projected step of gradient ascent, in one launch
// each.
//
// Memory is the bound of both. For 2700 x 768 bfloat16, smart_init reads and writes 8.3 MB (2.5 us at 3.35 TB/s) and
// smart_ascend 16.6 MB (5.0 us from memory, less from the L2 cache, which holds the inputs after the passes before).
#include <type_traits>

#include "box_muller.h"
#include "cuda/launch.h"
#include "cuda/vector_access.h"
#include "kernels.h"
#include "philox.h"
#include "smart_ascent.h"

namespace minbert {
namespace {

constexpr int kWarp = 32, kRowsOfBlock = 4;  // one warp per row, so that all of SMART's rows run at once
constexpr unsigned kAllLanes = 0xFFFFFFFF;

inline int64_t blocks_of_rows(int64_t rows) { return (rows + kRowsOfBlock - 1) / kRowsOfBlock; }
inline __device__ int64_t row_of_warp() {
  return static_cast<int64_t>(blockIdx.x) * kRowsOfBlock + threadIdx.x / kWarp;
}
inline __device__ int lane() { return threadIdx.x % kWarp; }

// The normal start ---------------------------------------------------------------------------------------------------

template <class Access>
__global__ void __launch_bounds__(kWarp* kRowsOfBlock) smart_init_kernel(NormalStart start) {
  using Element = typename Access::Element;
  constexpr int kWidth = Access::kWidth, kStep = kWidth < 4 ? 4 : kWidth;  // a counter gives four columns
  const int64_t row = row_of_warp();
  if (row >= start.rows) return;
  const Element* const x = static_cast<const Element*>(start.x) + row * start.columns;
  Element* const out = static_cast<Element*>(start.out) + row * start.columns;
  const float sigma = start.sigma * unit_of(start.scale);
  const int64_t seed = start.seed[0];
  const uint32_t number = static_cast<uint32_t>(start.seed[1]) + static_cast<uint32_t>(row);
  for (int64_t column = lane() * kStep; column < start.columns; column += kWarp * kStep) {
    const auto inside = [&](int part) { return kWidth == kStep || column + part < start.columns; };
    typename Access::Raw raw[kStep / kWidth];  // loaded first: the latency overlaps with the noise
    for (int part = 0; part < kStep; part += kWidth)
      if (inside(part)) raw[part / kWidth] = Access::read(x + column + part);
    float z[kStep];
    for (int i = 0; i < kStep; i += 4) {
      const uint32_t group = static_cast<uint32_t>(column + i) / 4;
      normals(philox({{group, number, 1, start.stream_id}}, seed), z + i);
    }
    for (int part = 0; part < kStep; part += kWidth) {
      if (!inside(part)) continue;
      Floats<kWidth> v = Access::widened(raw[part / kWidth]);
      for (int i = 0; i < kWidth; ++i) v.at[i] += sigma * z[part + i];
      Access::write(out + column + part, v);
    }
  }
}

// Norms --------------------------------------------------------------------------------------------------------------

// A non-finite element makes the norm NaN or Inf. The order of the sums depends on the shapes alone.
struct InfinityNorm {
  using Total = int32_t;  // the bits of an absolute value, which are ordered like the values, with NaN last

  static __device__ Total of(float v) { return __float_as_int(v) & 0x7FFFFFFF; }
  static __device__ Total plus(Total a, Total b) { return a > b ? a : b; }
  static __device__ Total over_warp(Total total) { return __reduce_max_sync(kAllLanes, total); }
  static __device__ float norm(Total total) { return __int_as_float(total); }
};

struct L2Norm {
  using Total = double;  // in which the squares of all float32 numbers are normal

  static __device__ Total of(float v) { return static_cast<double>(v) * v; }
  static __device__ Total plus(Total a, Total b) { return a + b; }
  static __device__ Total over_warp(Total total) {
    for (int step = kWarp / 2; step > 0; step /= 2) total += __shfl_xor_sync(kAllLanes, total, step);
    return total;
  }
  static __device__ float norm(Total total) { return static_cast<float>(sqrt(total)); }
};

// Groups of elements -------------------------------------------------------------------------------------------------
// A group gives access to its elements by index (`for_each` visits the indices of the calling thread) and sums over its
// threads.

// A token, processed by one warp: its three inputs are read at once and stay in registers.
template <class Element, int packs>
class TokenInRegisters {
 public:
  using Access = Packs<Element>;
  using Index = int;  // of one of the lane's packs

  __device__ TokenInRegisters(const Ascent& a, int64_t row)
      : first_(row * a.columns + lane() * Access::kWidth), end_((row + 1) * a.columns) {
    read(grad_, a.grad);
    read(perturbed_, a.perturbed);
    read(x_, a.x);
  }

  template <class F>
  __device__ void for_each(const F& f) const {
#pragma unroll
    for (Index index = 0; index < packs; ++index) f(index);
  }

  __device__ auto grad(Index index) const { return widened_again(grad_[index]); }
  __device__ auto perturbed(Index index) const { return widened_again(perturbed_[index]); }
  __device__ auto x(Index index) const { return widened_again(x_[index]); }
  __device__ void write(void* out, Index index, const Floats<Access::kWidth>& v) const {
    if (element(index) < end_) Access::write(static_cast<Element*>(out) + element(index), v);
  }

  template <class Norm>
  __device__ typename Norm::Total total(typename Norm::Total of_thread) const {
    return Norm::over_warp(of_thread);
  }

 private:
  __device__ int64_t element(Index index) const { return first_ + index * (kWarp * Access::kWidth); }

  // Prevents the compiler from keeping the float32 numbers of a pass for the next: they take up to twice the registers.
  static __device__ auto widened_again(uint4 raw) {
    asm volatile("" : "+r"(raw.x), "+r"(raw.y), "+r"(raw.z), "+r"(raw.w));
    return Access::widened(raw);
  }

  // Elements beyond the row become 0, which changes no norm.
  __device__ void read(uint4 (&to)[packs], const void* from) {
#pragma unroll
    for (Index index = 0; index < packs; ++index)
      to[index] = element(index) < end_ ? Access::read(static_cast<const Element*>(from) + element(index)) : uint4{};
  }

  const int64_t first_, end_;
  uint4 grad_[packs], perturbed_[packs], x_[packs];
};

// Any range of elements, processed by one block, which reads it in each pass: from the L2 cache after the first.
constexpr int kThreadsOfGroup = 512;

template <class A>
class RangeInMemory {
 public:
  using Access = A;
  using Element = typename Access::Element;
  using Index = int64_t;  // of an element

  __device__ RangeInMemory(const Ascent& a, int64_t first_row, int64_t end_row)
      : a_(a), begin_(first_row * a.columns), end_(end_row * a.columns) {}

  template <class F>
  __device__ void for_each(const F& f) const {
#pragma unroll 2
    for (Index index = begin_ + threadIdx.x * Access::kWidth; index < end_; index += kThreadsOfGroup * Access::kWidth)
      f(index);
  }

  __device__ auto grad(Index index) const { return at(a_.grad, index); }
  __device__ auto perturbed(Index index) const { return at(a_.perturbed, index); }
  __device__ auto x(Index index) const { return at(a_.x, index); }
  __device__ void write(void* out, Index index, const Floats<Access::kWidth>& v) const {
    Access::write(static_cast<Element*>(out) + index, v);
  }

  template <class Norm>
  __device__ typename Norm::Total total(typename Norm::Total of_thread) const {
    __shared__ typename Norm::Total of_warps[kThreadsOfGroup / kWarp];
    __syncthreads();  // all threads have read the previous total
    const auto of_warp = Norm::over_warp(of_thread);
    if (lane() == 0) of_warps[threadIdx.x / kWarp] = of_warp;
    __syncthreads();
    auto total = of_warps[0];
    for (int warp = 1; warp < kThreadsOfGroup / kWarp; ++warp) total = Norm::plus(total, of_warps[warp]);
    return total;
  }

 private:
  static __device__ auto at(const void* tensor, Index index) {
    return Access::widened(Access::read(static_cast<const Element*>(tensor) + index));
  }

  const Ascent& a_;
  const int64_t begin_, end_;
};

// The ascent ---------------------------------------------------------------------------------------------------------

// The norm of values(index) over all indices of a group.
template <class Norm, class Group, class Values>
__device__ float norm_of(const Group& group, const Values& values) {
  typename Norm::Total total = 0;
  group.for_each([&](typename Group::Index index) {
    const auto v = values(index);
    for (int i = 0; i < Group::Access::kWidth; ++i) total = Norm::plus(total, Norm::of(v.at[i]));
  });
  return Norm::norm(group.template total<Norm>(total));
}

template <bool infinity, class Group>
__device__ void ascend(const Ascent& a, const Group& group) {
  using Norm = std::conditional_t<infinity, InfinityNorm, L2Norm>;
  using Index = typename Group::Index;
  constexpr int kWidth = Group::Access::kWidth;
  const float unit = unit_of(a.scale), eta = a.eta * unit, epsilon = a.epsilon * unit;

  const float gradient_norm = norm_of<Norm>(group, [&](Index index) { return group.grad(index); });
  const bool steps = eta != 0 && has_direction(gradient_norm);
  const Rescaling step = steps ? Rescaling(gradient_norm, eta) : Rescaling();
  const auto stepped = [&](Index index) {
    auto v = group.perturbed(index);
    const auto grad = group.grad(index);
    for (int i = 0; i < kWidth; ++i) v.at[i] = steps ? v.at[i] + step(grad.at[i]) : v.at[i];
    return v;
  };

  if (infinity && a.onto_ball) {
    group.for_each([&](Index index) {
      const auto centre = group.x(index);
      auto v = stepped(index);
      for (int i = 0; i < kWidth; ++i) v.at[i] = clamped(v.at[i], centre.at[i] - epsilon, centre.at[i] + epsilon);
      group.write(a.out, index, v);
    });
    return;
  }
  const float distance = norm_of<Norm>(group, [&](Index index) {
    const auto centre = group.x(index);
    auto v = stepped(index);
    for (int i = 0; i < kWidth; ++i) v.at[i] -= centre.at[i];
    return v;
  });
  const bool rescales = a.onto_ball ? distance > epsilon : has_direction(distance);
  const Rescaling onto = rescales ? Rescaling(distance, epsilon) : Rescaling();
  group.for_each([&](Index index) {
    const auto centre = group.x(index);
    auto v = stepped(index);
    for (int i = 0; i < kWidth; ++i) v.at[i] = rescales ? centre.at[i] + onto(v.at[i] - centre.at[i]) : v.at[i];
    group.write(a.out, index, v);
  });
}

// Limits the registers, so that 2700 rows of 768 halves run in one wave on the 132 multiprocessors of an H100.
constexpr int blocks_at_once(int packs) { return packs < 3 ? 8 : packs == 3 ? 6 : packs < 6 ? 5 : 3; }

template <class Element, int packs, bool infinity>
__global__ void __launch_bounds__(kWarp* kRowsOfBlock, blocks_at_once(packs)) ascend_tokens_kernel(Ascent a) {
  const int64_t row = row_of_warp();
  if (row < a.tokens) ascend<infinity>(a, TokenInRegisters<Element, packs>(a, row));
}

template <class Access, bool infinity>
__global__ void __launch_bounds__(kThreadsOfGroup, 2) ascend_groups_kernel(Ascent a) {
  const int64_t group = blockIdx.x;
  const int64_t first = a.cu_seqlens ? a.cu_seqlens[group] : group;
  const int64_t end = a.cu_seqlens ? a.cu_seqlens[group + 1] : group + 1;
  ascend<infinity>(a, RangeInMemory<Access>(a, first, end));
}

// The kernel with the fewest registers that hold a token of `columns` columns, or null where none does.
constexpr int kLongestToken = 1024;

template <class Element, bool infinity, int packs = 2>
auto tokens_kernel(int64_t columns) -> void (*)(Ascent) {
  constexpr int kColumns = packs * kWarp * Packs<Element>::kWidth;
  if constexpr (kColumns > kLongestToken) {
    return nullptr;
  } else {
    constexpr int kWider = packs < 4 ? packs + 1 : packs + 2;  // 768 columns fill 3 packs of halves, 6 of float32
    return columns <= kColumns ? ascend_tokens_kernel<Element, packs, infinity>
                               : tokens_kernel<Element, infinity, kWider>(columns);
  }
}

template <class Element, bool infinity>
const char* launch_ascent(const Ascent& a, void* stream) {
  const bool packed = in_packs<Element>(a.columns, a.perturbed, a.x, a.grad, a.out);
  const auto of_tokens = tokens_kernel<Element, infinity>(a.columns);
  if (packed && !a.cu_seqlens && of_tokens)
    return launch(of_tokens, blocks_of_rows(a.tokens), kWarp * kRowsOfBlock, stream, a);
  const auto of_groups =
      packed ? ascend_groups_kernel<Packs<Element>, infinity> : ascend_groups_kernel<Singles<Element>, infinity>;
  return launch(of_groups, a.groups, kThreadsOfGroup, stream, a);
}

template <class Element>
const char* launch_start(const NormalStart& start, void* stream) {
  const bool packed = in_packs<Element>(start.columns, start.x, start.out);
  return launch(packed ? smart_init_kernel<Packs<Element>> : smart_init_kernel<Singles<Element>>,
                blocks_of_rows(start.rows), kWarp * kRowsOfBlock, stream, start);
}

// Calls f with a value of the C++ type of a dtype.
template <class F>
const char* with_element(DType dtype, const F& f) {
  if (dtype == DType::bfloat16) return f(BFloat16());
  if (dtype == DType::float16) return f(Float16());
  return f(float());
}

}  // namespace

const char* cuda_smart_init(const NormalStart& start, void* stream) noexcept {
  return with_element(start.dtype, [&](auto element) { return launch_start<decltype(element)>(start, stream); });
}

const char* cuda_smart_ascend(const Ascent& a, void* stream) noexcept {
  return with_element(a.dtype, [&](auto element) {
    using Element = decltype(element);
    return a.infinity_norm ? launch_ascent<Element, true>(a, stream) : launch_ascent<Element, false>(a, stream);
  });
}

}  // namespace minbert
