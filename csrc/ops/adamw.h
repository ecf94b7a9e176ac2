// adamw -- clips the gradients of all parameters by their global norm and takes one AdamW step, in place.
//
//   norm = sqrt(sum of g^2 over all parameters)       g = g * min(1, clip_norm / (norm + 1e-6))
//   m = m + (1 - beta1) (g - m)                       v = beta2 v + (1 - beta2) g^2
//   p = p (1 - lr weight_decay) - lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)
//
// The arithmetic of an element is float32 (float64 for float64). The norm adds squares lane by lane inside a block of
// kAdamwBlock elements, then blocks in order in float64. The number of threads changes no bit. Where the norm is not finite,
// nothing is written. On CUDA one tree adds a block's squares and another the blocks. The norm stays on the device, where
// the step reads it. Loshchilov and Hutter 2019, arXiv:1711.05101.
//
// A bfloat16 weight rounds a step of a small learning rate away. So it may come with `low`, the other 16 bits of a float32
// master weight (adamw.cuh). The step is then that of the float32 weight, bit for bit, and writes both halves. m and v are
// float32, the gradient is of either type. Both halves take the four bytes of a float32; a master beside its bfloat16 takes
// six. Mixed precision: Micikevicius et al. 2018, arXiv:1710.03740.
//
//   param, grad, m, v: contiguous, of one size and dtype per parameter; with low: bfloat16, either, float32, float32
#pragma once
#include "core/cpu_dispatch.h"
#include "core/cuda_stream.h"
#include "core/dtype.h"

namespace grpo_engine {

inline constexpr int64_t kAdamwBlock = 4096;  // elements of one work item

// At most kAdamwBlock elements of one parameter.
struct AdamwBlock {
  DType dtype, grad_dtype;
  int64_t count;
  void *param, *m, *v;
  int16_t* low;  // of a bfloat16 param with a float32 master, or null
  const void* grad;
  double squares;  // sum of g^2; written by adamw_squares
  double rate, root;  // lr / (1 - beta1^step), 1 / sqrt(1 - beta2^step)
};

struct AdamwArgs {
  AdamwBlock* block;
  double scale;  // of the gradients
  double decay;  // lr * weight_decay
  double beta1, beta2, eps;
};

GE_CPU_KERNEL(adamw_squares, AdamwArgs)  // items: blocks
GE_CPU_KERNEL(adamw_update, AdamwArgs)  // items: blocks

// CUDA: one parameter.
struct AdamwParam {
  DType dtype, grad_dtype;
  int64_t count, first_block;  // elements; blocks of kAdamwBlock in the parameters before
  void *param, *m, *v;
  int16_t* low;  // as in AdamwBlock
  const void* grad;
  float* step;
  double rate, root;  // as in AdamwBlock; written by the kernels
};

struct AdamwCudaArgs {
  AdamwParam* params;  // [P], on the device
  bool has_low;  // all params, or none
  int64_t P, num_blocks;
  double* squares;  // [num_blocks], scratch
  double* norm;  // [1], the result
  double lr, decay, beta1, beta2, eps, clip_norm;
};

void adamw_cuda(const AdamwCudaArgs&, CudaStream);

}  // namespace grpo_engine
