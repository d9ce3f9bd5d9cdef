// The order in which a Gram matrix is summed over chunks, for host and device: it depends on no number of threads.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MINBERT_HOST_DEVICE __host__ __device__
#else
#define MINBERT_HOST_DEVICE
#endif

namespace minbert {

// Chunk c is added to lane c % kLanes, chunk after chunk. Then the lanes are added: in groups of kLaneGroup, the upper
// half to the lower until one is left, and group after group. On a device a lane is a thread, and a group a warp.
constexpr int kLanes = 256, kLaneGroup = 32;

// `static`, as in philox.h: every instruction set keeps its own copies.

static inline double sum_of_lanes(double* lanes) {  // overwrites them
  double total = 0;
  for (double* group = lanes; group < lanes + kLanes; group += kLaneGroup) {
    for (int half = kLaneGroup / 2; half > 0; half /= 2)
      for (int lane = 0; lane < half; ++lane) group[lane] += group[lane + half];
    total += group[0];
  }
  return total;
}

}  // namespace minbert
