// group_advantages -- rewards of G responses per prompt -> group-relative advantages.
//
//   unbiased    A[p,g] = (r[p,g] - mean_g r[p,:]) / (std_g r[p,:] + eps),  std divides by G-1
//   population  the same, std divides by G
//   none        A[p,g] =  r[p,g] - mean_g r[p,:]                           (Dr. GRPO)
//
// A zero-variance group (all rewards equal) has A = 0 exactly, in every mode. A NaN or infinite reward makes its own group
// NaN and no other.
// Shao et al. 2024, arXiv:2402.03300, sec. 4.1.2; without std: Liu et al. 2025, arXiv:2503.20783.
//
//   rewards [P, G]  float32 or float64, contiguous      P prompts, G >= 2 responses each
//   returns [P, G]  same dtype, no gradient
#pragma once
#include <cstdint>

#include "core/cuda_stream.h"
#include "core/dtype.h"

namespace grpo_engine {

enum class AdvantageStd : int32_t { unbiased, population, none };

struct GroupAdvantagesArgs {
  DType dtype;  // f32 or f64
  int64_t P, G;
  AdvantageStd std;
  double eps;
  const void* rewards;  // [P, G]
  void* advantages;     // [P, G]
};

void group_advantages_cuda(const GroupAdvantagesArgs&, CudaStream);

}  // namespace grpo_engine
