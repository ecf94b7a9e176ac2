// Row arithmetic of group_advantages, for the CPU op and the CUDA kernel.
#pragma once
#include <cmath>
#include <cstdint>

#include "core/dtype.h"
#include "ops/group_advantages.h"

namespace grpo_engine {

// One prompt: r[0..G) -> out[0..G), in double. G is at most a few thousand.
template <typename T>
GE_HOST_DEVICE inline void group_advantages_row(const T* r, T* out, int64_t G, double eps, AdvantageStd std_mode) {
  bool all_equal = true;  // their mean may round away from them, and (r - mean)/eps would show it
  for (int64_t g = 1; g < G; ++g) all_equal = all_equal && r[g] == r[0];
  double mean = 0.0;
  for (int64_t g = 0; g < G; ++g) mean += static_cast<double>(r[g]);
  mean /= static_cast<double>(G);
  double squares = 0.0;
  for (int64_t g = 0; g < G; ++g) {
    const double d = static_cast<double>(r[g]) - mean;
    squares += d * d;
  }
  const double divisor = static_cast<double>(std_mode == AdvantageStd::unbiased ? G - 1 : G);
  const double scale = std_mode == AdvantageStd::none ? 1.0 : sqrt(squares / divisor) + eps;
  for (int64_t g = 0; g < G; ++g) {
    const double centred = static_cast<double>(r[g]) - mean;
    out[g] = all_equal && centred == centred ? T(0) : static_cast<T>(centred / scale);
  }
}

}  // namespace grpo_engine
