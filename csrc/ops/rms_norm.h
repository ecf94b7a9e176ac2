// rms_norm -- root-mean-square normalisation of rows, alone or of a sum, forward and backward.
//
//   s = x, or x + residual rounded to the storage type
//   rstd[t] = 1 / sqrt(mean_d s[t,d]^2 + eps)        n = s * rstd        y = n * weight
//   ds = rstd * (dy * weight - n * mean_d(dy * weight * n)) [+ dsum]     dweight = sum_t dy * n
//   dx = dresidual = ds
//
// A pre-norm decoder needs both y and s: the branch reads y, and s is the residual stream. dsum is the gradient that reaches
// s along the residual stream.
// The arithmetic is float32 for float32 and bfloat16. For bfloat16 n is rounded before it is multiplied by weight, as in the
// Hugging Face Qwen2 model. The mean is a lane-wise sum over d, then one tree. So the bits of a row depend on that row
// alone, and y with a residual has the bits of y of the rounded sum. A row of zeros gives zeros. NaN stays in its row.
// dweight adds chunks of kRmsNormRows rows, in order. Zhang and Sennrich 2019, arXiv:1910.07467.
//
//   x, residual, sum, y, dy, dsum, dx [T, D]   weight, dweight [D]
//   rstd [T] float32 (float64 for float64 x)
#pragma once
#include "core/cpu_dispatch.h"
#include "core/cuda_stream.h"
#include "core/dtype.h"

namespace grpo_engine {

struct RmsNormArgs {
  DType dtype;
  int64_t T, D;
  double eps;
  const void* x;  // [T, D]; backward: the sum where there was a residual
  const void* residual;  // [T, D] or null
  const void* weight;  // [D]
  const void* dy;  // [T, D]; backward only
  const void* dsum;  // [T, D] or null: gradient that reaches the sum directly, added to dx; backward only
  void* sum;  // [T, D] x + residual; forward only, null without residual
  void* y;  // [T, D]; forward only
  void* rstd;  // [T]; written by forward, read by backward
  void* dx;  // [T, D]; backward only
  void* dweight;  // [chunks, D] in the arithmetic type, then summed into row 0; backward only
};

inline constexpr int64_t kRmsNormRows = 64;  // rows of one chunk of dweight
inline constexpr int64_t kRmsNormColumns = 64;  // columns of dweight in one work item

static inline int64_t rms_norm_chunks(int64_t rows) { return (rows + kRmsNormRows - 1) / kRmsNormRows; }

GE_CPU_KERNEL(rms_norm_forward, RmsNormArgs)  // items: rows
GE_CPU_KERNEL(rms_norm_backward, RmsNormArgs)  // items: chunks of kRmsNormRows rows; dx, rows of dweight
GE_CPU_KERNEL(rms_norm_join, RmsNormArgs)  // items: blocks of kRmsNormColumns columns of dweight

void rms_norm_forward_cuda(const RmsNormArgs&, CudaStream);
void rms_norm_backward_cuda(const RmsNormArgs&, CudaStream);  // joins dweight too

}  // namespace grpo_engine
