// rms_norm -- root-mean-square normalisation of rows, forward and backward.
//
//   rstd[t] = 1 / sqrt(mean_d x[t,d]^2 + eps)        n = x * rstd        y = n * weight
//   dx = rstd * (dy * weight - n * mean_d(dy * weight * n))        dweight = sum_t dy * n
//
// float32 arithmetic for float32 and bfloat16; for bfloat16 n is rounded before the product with
// weight, as the Hugging Face Qwen2 model does. The mean is a lane-wise sum over d, then one tree:
// the bits of a row depend on that row alone. A row of zeros gives zeros; NaN stays in its row.
// Zhang and Sennrich 2019, arXiv:1910.07467.
//
//   x, y, dy, dx [T, D]   weight, dweight [D]   rstd [T] float32 (float64 for float64 x)
#pragma once
#include "core/cpu_dispatch.h"
#include "core/dtype.h"

namespace grpo_engine {

struct RmsNormArgs {
  DType dtype;
  int64_t T, D;
  double eps;
  const void* x;       // [T, D]
  const void* weight;  // [D]
  const void* residual;  // [T, D] or null
  void* sum;           // [T, D] x + residual; forward only, null without residual
  const void* dy;      // [T, D]; backward only
  const void* dsum;    // [T, D] or null: gradient that reaches the sum directly, added to dx; backward only
  void* y;             // [T, D]; forward only
  void* rstd;          // [T]; written by forward, read by backward
  void* dx;            // [T, D]; backward only
  void* dweight;       // [D] in the arithmetic type; backward only
};

inline constexpr int64_t kRmsNormColumns = 64;  // columns of dweight in one work item

GE_CPU_KERNEL(rms_norm_forward, RmsNormArgs)          // items: rows
GE_CPU_KERNEL(rms_norm_backward_input, RmsNormArgs)   // items: rows
GE_CPU_KERNEL(rms_norm_backward_weight, RmsNormArgs)  // items: blocks of kRmsNormColumns columns

}  // namespace grpo_engine
