// linear_call.h -- a matmul on the device of a tensor, by our kernels or by torch's library.
#pragma once
#include <ATen/Context.h>
#include <ATen/Functions.h>

#include "core/cuda_call.h"
#include "ops/linear.h"

namespace grpo_engine {

inline void gemm_on(const at::Tensor& t, const GemmArgs& args) {
  if (!cuda_call(t, [&](auto stream) { gemm_cuda(args, stream); })) gemm(args);
}

// Whether a matmul of t goes to torch's library: on CUDA, for a caller that needs no batch invariance. A CPU always has it.
inline bool by_library(const at::Tensor& t, bool batch_invariant) { return !batch_invariant && on_cuda(t); }

// While an object lives, cuBLAS adds the parts of a bfloat16 matmul in float32, whatever torch's own switch says.
class Float32Sums {
 public:
  Float32Sums() : before_(at::globalContext().allowBF16ReductionCuBLAS()) {
    at::globalContext().setAllowBF16ReductionCuBLAS(/*allow_reduced_precision=*/false);
  }
  ~Float32Sums() {
    using Option = at::CuBLASReductionOption;
    at::globalContext().setAllowBF16ReductionCuBLAS(before_ == Option::AllowReducedPrecisionWithSplitK,
                                                    before_ != Option::DisallowReducedPrecisionDisallowSplitK);
  }
  Float32Sums(const Float32Sums&) = delete;

 private:
  at::CuBLASReductionOption before_;
};

// c = a b + plus by torch's library, cuBLAS on CUDA. plus is c itself, a row, or nothing. a and b have one dtype. c and plus
// have the same, or Float for BFloat16. Sums are float32, in an order that may change with the shape. torch's switch for
// TF32 holds for float32.
inline void library_matmul(const at::Tensor& a, const at::Tensor& b, at::Tensor c, const at::Tensor& plus = {}) {
  const Float32Sums float32_sums;
  const at::ScalarType dtype = c.scalar_type();
  if (a.scalar_type() != dtype && a.is_cuda()) {
    plus.defined() ? at::addmm_out(c, plus, a, b, dtype) : at::mm_out(c, a, b, dtype);
    return;
  }
  const at::Tensor left = a.to(dtype), right = b.to(dtype);  // torch's CPU matmul has no wider result
  plus.defined() ? at::addmm_out(c, plus, left, right) : at::mm_out(c, left, right);
}

}  // namespace grpo_engine
