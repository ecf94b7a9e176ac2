// swiglu -- gated activation of the feed-forward block, forward and backward.
//
//   y = silu(gate) * up,  silu(g) = g / (1 + exp(-g))          gate_up = [gate | up], one fused row
//   dgate = dy * up * s * (1 + g * (1 - s)),  dup = dy * g * s,  s = 1 / (1 + exp(-g))
//
// The arithmetic is float32. For bfloat16 silu(gate) is rounded before it is multiplied by up, as in the Hugging Face Qwen2
// model. The op is element-wise, so a row depends on itself alone. Shazeer 2020, arXiv:2002.05202.
//
//   gate_up, dgate_up [T, 2F]   y, dy [T, F]
#pragma once
#include "core/cpu_dispatch.h"
#include "core/cuda_stream.h"
#include "core/dtype.h"

namespace grpo_engine {

struct SwigluArgs {
  DType dtype;
  int64_t T, F;
  const void* gate_up;  // [T, 2F]
  const void* dy;       // [T, F]; backward only
  void* y;              // [T, F]; backward writes it again where it is not null
  void* dgate_up;       // [T, 2F]; backward only
};

GE_CPU_KERNEL(swiglu_forward, SwigluArgs)   // items: rows
GE_CPU_KERNEL(swiglu_backward, SwigluArgs)  // items: rows

void swiglu_forward_cuda(const SwigluArgs&, CudaStream);
void swiglu_backward_cuda(const SwigluArgs&, CudaStream);

}  // namespace grpo_engine
