#include "ops/rms_norm.h"

#include <ATen/Functions.h>

#include <optional>
#include <tuple>

#include "core/checks.h"
#include "core/cuda_call.h"
#include "core/parallel.h"

namespace grpo_engine {
namespace {

constexpr const char* kOp = "rms_norm";

using Two = std::tuple<at::Tensor, at::Tensor>;
using Three = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using OptionalTensor = std::optional<at::Tensor>;

void check(const at::Tensor& x, const at::Tensor& weight) {
  require_shape(kOp, "x", x, {-1, -1}, "[T, D]");
  TORCH_CHECK_VALUE(x.size(1) > 0, kOp, ": x needs D >= 1 columns, got ", x.sizes());
  require_float(kOp, "x", x);
  require_contiguous(kOp, "x", x);
  require_tensor(kOp, "weight", weight, {x.size(1)}, "[D]", x.scalar_type(), x);
}

void check_forward(const at::Tensor& x, const at::Tensor& weight, double eps) {
  check(x, weight);
  TORCH_CHECK_VALUE(std::isfinite(eps) && eps >= 0.0, kOp, ": eps must be finite and >= 0, got ", eps);
}

Two meta(const at::Tensor& x, const at::Tensor& weight, double eps) {
  check_forward(x, weight, eps);
  return {at::empty_like(x), at::empty({x.size(0)}, arithmetic(x))};
}

Three residual_meta(const at::Tensor& x, const at::Tensor& residual, const at::Tensor& weight, double eps) {
  check_forward(x, weight, eps);
  require_tensor(kOp, "residual", residual, x.sizes(), "[T, D]", x.scalar_type(), x);
  return {at::empty_like(x), at::empty_like(x), at::empty({x.size(0)}, arithmetic(x))};
}

RmsNormArgs common_args(const at::Tensor& x, const at::Tensor& weight) {
  RmsNormArgs args{};
  args.dtype = dtype_of(x);
  args.T = x.size(0);
  args.D = x.size(1);
  args.x = x.const_data_ptr();
  args.weight = weight.const_data_ptr();
  return args;
}

Two forward(const at::Tensor& x, const at::Tensor& weight, double eps) {
  auto [y, rstd] = meta(x, weight, eps);
  RmsNormArgs args = common_args(x, weight);
  args.eps = eps;
  args.y = y.mutable_data_ptr();
  args.rstd = rstd.mutable_data_ptr();
  if (cuda_call(x, [&](auto stream) { rms_norm_forward_cuda(args, stream); })) return {y, rstd};
  parallel_items(rms_norm_forward_cpu, args, args.T, 4.0 * args.D);
  return {y, rstd};
}

Three residual_forward(const at::Tensor& x, const at::Tensor& residual, const at::Tensor& weight, double eps) {
  auto [y, sum, rstd] = residual_meta(x, residual, weight, eps);
  RmsNormArgs args = common_args(x, weight);
  args.eps = eps;
  args.residual = residual.const_data_ptr();
  args.sum = sum.mutable_data_ptr();
  args.y = y.mutable_data_ptr();
  args.rstd = rstd.mutable_data_ptr();
  if (cuda_call(x, [&](auto stream) { rms_norm_forward_cuda(args, stream); })) return {y, sum, rstd};
  parallel_items(rms_norm_forward_cpu, args, args.T, 5.0 * args.D);
  return {y, sum, rstd};
}

void check_backward(const at::Tensor& dy, const OptionalTensor& dsum, const at::Tensor& x, const at::Tensor& weight,
                    const at::Tensor& rstd) {
  check(x, weight);
  require_tensor(kOp, "dy", dy, x.sizes(), "[T, D]", x.scalar_type(), x);
  if (dsum) require_tensor(kOp, "dsum", *dsum, x.sizes(), "[T, D]", x.scalar_type(), x);
  require_tensor(kOp, "rstd", rstd, {x.size(0)}, "[T]", arithmetic(x).dtype().toScalarType(), x);
}

Two backward_meta(const at::Tensor& dy, const OptionalTensor& dsum, const at::Tensor& x, const at::Tensor& weight,
                  const at::Tensor& rstd) {
  check_backward(dy, dsum, x, weight, rstd);
  return {at::empty_like(x), at::empty_like(weight)};
}

Two backward(const at::Tensor& dy, const OptionalTensor& dsum, const at::Tensor& x, const at::Tensor& weight,
             const at::Tensor& rstd) {
  check_backward(dy, dsum, x, weight, rstd);
  RmsNormArgs args = common_args(x, weight);
  const int64_t chunks = rms_norm_chunks(args.T);
  const at::Tensor dx = at::empty_like(x);
  const at::Tensor dweight = chunks > 0 ? at::empty({chunks, args.D}, arithmetic(x)) : at::zeros({1, args.D}, arithmetic(x));
  args.dy = dy.const_data_ptr();
  args.dsum = dsum ? dsum->const_data_ptr() : nullptr;
  args.rstd = const_cast<void*>(rstd.const_data_ptr());
  args.dx = dx.mutable_data_ptr();
  args.dweight = dweight.mutable_data_ptr();
  if (!cuda_call(x, [&](auto stream) { rms_norm_backward_cuda(args, stream); })) {
    parallel_items(rms_norm_backward_cpu, args, chunks, 12.0 * args.D * kRmsNormRows);
    const int64_t blocks = (args.D + kRmsNormColumns - 1) / kRmsNormColumns;
    parallel_items(rms_norm_join_cpu, args, blocks, 1.0 * chunks * kRmsNormColumns);
  }
  // a copy, so that the other chunks' memory is not kept by the gradient
  return {dx, dweight[0].to(weight.scalar_type(), /*non_blocking=*/false, /*copy=*/true)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(grpo_engine, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor y, Tensor rstd)");
  m.def(
      "rms_norm_residual(Tensor x, Tensor residual, Tensor weight, float eps)"
      " -> (Tensor y, Tensor sum, Tensor rstd)");
  m.def(
      "rms_norm_backward(Tensor dy, Tensor? dsum, Tensor x, Tensor weight, Tensor rstd)"
      " -> (Tensor dx, Tensor dweight)");
}
GE_DEVICE_IMPL(m) {
  m.impl("rms_norm", &forward);
  m.impl("rms_norm_residual", &residual_forward);
  m.impl("rms_norm_backward", &backward);
}
TORCH_LIBRARY_IMPL(grpo_engine, Meta, m) {
  m.impl("rms_norm", &meta);
  m.impl("rms_norm_residual", &residual_meta);
  m.impl("rms_norm_backward", &backward_meta);
}

}  // namespace grpo_engine
