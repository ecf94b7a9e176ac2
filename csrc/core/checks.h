// checks.h -- turns every bad argument into a sentence.
//
// Every message has the same parts: op and argument, what was wanted, what came.
// TORCH_CHECK_VALUE reaches Python as ValueError, TORCH_CHECK_TYPE as TypeError.
#pragma once
#include <ATen/core/Tensor.h>

#include <cmath>

#include "core/dtype.h"

namespace grpo_engine {

// Throws unless `t` has the named layout, e.g. require_shape("op", "x", x, {-1, D}, "[T, D]").
// -1 in `want` accepts any size on that axis.
inline void require_shape(const char* op, const char* name, const at::Tensor& t, at::IntArrayRef want, const char* layout) {
  bool ok = t.dim() == static_cast<int64_t>(want.size());
  for (int64_t i = 0; ok && i < t.dim(); ++i) ok = want[i] == -1 || t.size(i) == want[i];
  TORCH_CHECK_VALUE(ok, op, ": ", name, " must be ", layout, " = ", want, ", got ", t.sizes());
}

inline void require_dtype(const char* op, const char* name, const at::Tensor& t, at::ScalarType want) {
  TORCH_CHECK_TYPE(t.scalar_type() == want, op, ": ", name, " must be ", want, ", got ", t.scalar_type());
}

inline void require_contiguous(const char* op, const char* name, const at::Tensor& t) {
  TORCH_CHECK_VALUE(t.is_contiguous(), op, ": ", name, " must be contiguous, got sizes ", t.sizes(), " with strides ",
                    t.strides());
}

// [T, X, E] whose rows t are contiguous. Rows may have any stride, as in a slice of a fused projection.
inline void require_row_contiguous(const char* op, const char* name, const at::Tensor& t) {
  // not numel(): a tensor of symbolic shape (torch.compile) has none
  const bool empty = t.size(0) == 0 || t.size(1) == 0 || t.size(2) == 0;
  const bool ok = empty || ((t.size(2) == 1 || t.stride(2) == 1) && (t.size(1) == 1 || t.stride(1) == t.size(2)));
  TORCH_CHECK_VALUE(ok, op, ": ", name, " must be contiguous in its last two axes, got sizes ", t.sizes(), " with strides ",
                    t.strides());
}

inline void require_same_device(const char* op, const char* name, const at::Tensor& t, const at::Tensor& like) {
  TORCH_CHECK_VALUE(t.device() == like.device(), op, ": ", name, " must be on ", like.device(),
                    " as the first argument, got ", t.device());
}

// Floating tensor: float32, bfloat16 or float64.
inline void require_float(const char* op, const char* name, const at::Tensor& t) {
  TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16 || t.scalar_type() == at::kDouble, op,
                   ": ", name, " must be Float, BFloat16 or Double, got ", t.scalar_type());
}

inline void require_positive(const char* op, const char* name, double value) {
  TORCH_CHECK_VALUE(std::isfinite(value) && value > 0, op, ": ", name, " must be finite and > 0, got ", value);
}

// All requirements of the kernels for a tensor that they read whole.
inline void require_tensor(const char* op, const char* name, const at::Tensor& t, at::IntArrayRef want, const char* layout,
                           at::ScalarType dtype, const at::Tensor& like) {
  require_shape(op, name, t, want, layout);
  require_dtype(op, name, t, dtype);
  require_contiguous(op, name, t);
  require_same_device(op, name, t, like);
}

// The kernels' name of a dtype that require_float accepts.
inline DType dtype_of(const at::Tensor& t) {
  if (t.scalar_type() == at::kBFloat16) return DType::bf16;
  return t.scalar_type() == at::kDouble ? DType::f64 : DType::f32;
}

// Options of a tensor like t in arithmetic type: float64 for float64, else float32.
inline at::TensorOptions arithmetic(const at::Tensor& t) {
  return t.options().dtype(t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

}  // namespace grpo_engine
