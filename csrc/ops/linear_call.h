// linear_call.h -- a product on the device of a tensor.
#pragma once
#include "core/cuda_call.h"
#include "ops/linear.h"

namespace grpo_engine {

inline void gemm_on(const at::Tensor& t, const GemmArgs& args) {
  if (!cuda_call(t, [&](auto stream) { gemm_cuda(args, stream); })) gemm(args);
}

}  // namespace grpo_engine
