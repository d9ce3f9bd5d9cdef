// The order in which the Gram matrix of a part of the model is summed over its chunks: the same on the CPU and on CUDA
// devices, and for any number of threads.
#pragma once

#include <cstdint>

namespace minbert {

// Chunk c of the part is added to lane c % kLanes, in the order of the chunks. Then the lanes are added: within each
// group of kLaneGroup the upper half to the lower half until one sum is left, then group after group. On a CUDA device
// a lane is a thread and a group is a warp.
constexpr int kLanes = 256, kLaneGroup = 32;

static inline double sum_of_lanes(double* lanes) {  // overwrites the lanes
  double total = 0;
  for (double* group = lanes; group < lanes + kLanes; group += kLaneGroup) {
    for (int half = kLaneGroup / 2; half > 0; half /= 2)
      for (int lane = 0; lane < half; ++lane) group[lane] += group[lane + half];
    total += group[0];
  }
  return total;
}

}  // namespace minbert
