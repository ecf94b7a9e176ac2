// rms_norm -- root-mean-square normalisation of rows, alone or of a sum, forward and backward.
//
//   s = x, or x + residual rounded to the storage type
//   rstd[t] = 1 / sqrt(mean_d s[t,d]^2 + eps)        n = s * rstd        y = n * weight
//   ds = rstd * (dy * weight - n * mean_d(dy * weight * n)) [+ dsum]     dweight = sum_t dy * n
//   dx = dresidual = ds
//
// A pre-norm decoder needs both y and s: the branch reads y, the stream goes on with s. dsum is the
// gradient that comes back along the stream.
// float32 arithmetic for float32 and bfloat16; for bfloat16 n is rounded before the product with
// weight, as the Hugging Face Qwen2 model does. The mean is a lane-wise sum over d, then one tree:
// the bits of a row depend on that row alone, and those of y with a residual are those of y of the
// rounded sum. A row of zeros gives zeros; NaN stays in its row. dweight adds chunks of
// kRmsNormRows rows, in order. Zhang and Sennrich 2019, arXiv:1910.07467.
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
  const void* x;         // [T, D]; backward: the sum where there was a residual
  const void* residual;  // [T, D] or null
  const void* weight;    // [D]
  const void* dy;        // [T, D]; backward only
  const void* dsum;      // [T, D] or null: gradient that reaches the sum directly, added to dx; backward only
  void* sum;             // [T, D] x + residual; forward only, null without residual
  void* y;               // [T, D]; forward only
  void* rstd;            // [T]; written by forward, read by backward
  void* dx;              // [T, D]; backward only
  void* dweight;         // [chunks, D] in the arithmetic type, then summed into row 0; backward only
};

inline constexpr int64_t kRmsNormRows = 64;     // rows of one chunk of dweight
inline constexpr int64_t kRmsNormColumns = 64;  // columns of dweight in one work item

static inline int64_t rms_norm_chunks(int64_t rows) { return (rows + kRmsNormRows - 1) / kRmsNormRows; }

GE_CPU_KERNEL(rms_norm_forward, RmsNormArgs)   // items: rows
GE_CPU_KERNEL(rms_norm_backward, RmsNormArgs)  // items: chunks of kRmsNormRows rows; dx, rows of dweight
GE_CPU_KERNEL(rms_norm_join, RmsNormArgs)      // items: blocks of kRmsNormColumns columns of dweight

void rms_norm_forward_cuda(const RmsNormArgs&, CudaStream);
void rms_norm_backward_cuda(const RmsNormArgs&, CudaStream);  // joins dweight too

}  // namespace grpo_engine
