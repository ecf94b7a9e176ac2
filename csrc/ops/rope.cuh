// rope.cuh -- the angle of a pair of elements, for the CPU's table and the CUDA kernel.
#pragma once
#include <math.h>

#include "core/dtype.h"

namespace grpo_engine {

// f_i of a head of width E.
GE_HOST_DEVICE inline float rope_frequency(double theta, int64_t i, int64_t E) {
  const float exponent = static_cast<float>(2 * i) / static_cast<float>(E);
  return 1.f / static_cast<float>(pow(theta, static_cast<double>(exponent)));
}

// position * f_i, rounded to float32.
GE_HOST_DEVICE inline double rope_angle(int64_t position, float frequency) {
  const float angle = static_cast<float>(position) * frequency;
  return static_cast<double>(angle);
}

}  // namespace grpo_engine
