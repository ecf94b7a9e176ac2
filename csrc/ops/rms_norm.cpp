#include "ops/rms_norm.h"

#include <ATen/Functions.h>
#include <torch/library.h>

#include <tuple>

#include "core/checks.h"
#include "core/parallel.h"

namespace grpo_engine {
namespace {

constexpr const char* kOp = "rms_norm";

void check(const at::Tensor& x, const at::Tensor& weight) {
  require_shape(kOp, "x", x, {-1, -1}, "[T, D]");
  TORCH_CHECK_VALUE(x.size(1) > 0, kOp, ": x needs D >= 1 columns, got ", x.sizes());
  require_float(kOp, "x", x);
  require_contiguous(kOp, "x", x);
  require_tensor(kOp, "weight", weight, {x.size(1)}, "[D]", x.scalar_type(), x);
}

at::TensorOptions arithmetic(const at::Tensor& x) {
  return x.options().dtype(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

std::tuple<at::Tensor, at::Tensor> forward_meta(const at::Tensor& x, const at::Tensor& weight,
                                                double eps) {
  check(x, weight);
  TORCH_CHECK_VALUE(std::isfinite(eps) && eps >= 0.0, kOp, ": eps must be finite and >= 0, got ",
                    eps);
  return {at::empty_like(x), at::empty({x.size(0)}, arithmetic(x))};
}

std::tuple<at::Tensor, at::Tensor> forward_cpu(const at::Tensor& x, const at::Tensor& weight,
                                               double eps) {
  auto [y, rstd] = forward_meta(x, weight, eps);
  RmsNormArgs args{};
  args.dtype = dtype_of(x);
  args.T = x.size(0);
  args.D = x.size(1);
  args.eps = eps;
  args.x = x.const_data_ptr();
  args.weight = weight.const_data_ptr();
  args.y = y.mutable_data_ptr();
  args.rstd = rstd.mutable_data_ptr();
  parallel_items(rms_norm_forward_cpu, args, args.T, 4.0 * args.D);
  return {y, rstd};
}

std::tuple<at::Tensor, at::Tensor> backward_meta(const at::Tensor& dy, const at::Tensor& x,
                                                 const at::Tensor& weight, const at::Tensor& rstd) {
  check(x, weight);
  require_tensor(kOp, "dy", dy, x.sizes(), "[T, D]", x.scalar_type(), x);
  require_shape(kOp, "rstd", rstd, {x.size(0)}, "[T]");
  return {at::empty_like(x), at::empty({x.size(1)}, arithmetic(x))};
}

std::tuple<at::Tensor, at::Tensor> backward_cpu(const at::Tensor& dy, const at::Tensor& x,
                                                const at::Tensor& weight, const at::Tensor& rstd) {
  auto [dx, dweight] = backward_meta(dy, x, weight, rstd);
  RmsNormArgs args{};
  args.dtype = dtype_of(x);
  args.T = x.size(0);
  args.D = x.size(1);
  args.x = x.const_data_ptr();
  args.weight = weight.const_data_ptr();
  args.dy = dy.const_data_ptr();
  args.rstd = const_cast<void*>(rstd.const_data_ptr());
  args.dx = dx.mutable_data_ptr();
  args.dweight = dweight.mutable_data_ptr();
  parallel_items(rms_norm_backward_input_cpu, args, args.T, 8.0 * args.D);
  const int64_t blocks = (args.D + kRmsNormColumns - 1) / kRmsNormColumns;
  parallel_items(rms_norm_backward_weight_cpu, args, blocks, 3.0 * args.T * kRmsNormColumns);
  return {dx, dweight.to(weight.scalar_type())};
}

std::tuple<at::Tensor, at::Tensor> backward_meta_out(const at::Tensor& dy, const at::Tensor& x,
                                                     const at::Tensor& weight,
                                                     const at::Tensor& rstd) {
  auto [dx, dweight] = backward_meta(dy, x, weight, rstd);
  return {dx, at::empty_like(weight)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(grpo_engine, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor y, Tensor rstd)");
  m.def(
      "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd)"
      " -> (Tensor dx, Tensor dweight)");
}
TORCH_LIBRARY_IMPL(grpo_engine, CPU, m) {
  m.impl("rms_norm", &forward_cpu);
  m.impl("rms_norm_backward", &backward_cpu);
}
TORCH_LIBRARY_IMPL(grpo_engine, Meta, m) {
  m.impl("rms_norm", &forward_meta);
  m.impl("rms_norm_backward", &backward_meta_out);
}

}  // namespace grpo_engine
