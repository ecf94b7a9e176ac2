#include "ops/swiglu.h"

#include <ATen/Functions.h>

#include "core/checks.h"
#include "core/cuda_call.h"
#include "core/parallel.h"

namespace grpo_engine {
namespace {

constexpr const char* kOp = "swiglu";
constexpr double kCost = 30.0;  // operations an element, the exponential included

at::Tensor forward_meta(const at::Tensor& gate_up) {
  require_shape(kOp, "gate_up", gate_up, {-1, -1}, "[T, 2F]");
  TORCH_CHECK_VALUE(gate_up.size(1) % 2 == 0, kOp, ": gate_up needs an even number of columns, got ", gate_up.sizes());
  require_float(kOp, "gate_up", gate_up);
  require_contiguous(kOp, "gate_up", gate_up);
  return at::empty({gate_up.size(0), gate_up.size(1) / 2}, gate_up.options());
}

at::Tensor forward(const at::Tensor& gate_up) {
  at::Tensor y = forward_meta(gate_up);
  SwigluArgs args{};
  args.dtype = dtype_of(gate_up);
  args.T = y.size(0);
  args.F = y.size(1);
  args.gate_up = gate_up.const_data_ptr();
  args.y = y.mutable_data_ptr();
  if (cuda_call(gate_up, [&](auto stream) { swiglu_forward_cuda(args, stream); })) return y;
  parallel_items(swiglu_forward_cpu, args, args.T, kCost * args.F);
  return y;
}

at::Tensor backward_meta(const at::Tensor& dy, const at::Tensor& gate_up) {
  const at::Tensor y = forward_meta(gate_up);
  require_tensor(kOp, "dy", dy, y.sizes(), "[T, F]", gate_up.scalar_type(), gate_up);
  return at::empty_like(gate_up);
}

at::Tensor backward(const at::Tensor& dy, const at::Tensor& gate_up) {
  at::Tensor dgate_up = backward_meta(dy, gate_up);
  SwigluArgs args{};
  args.dtype = dtype_of(gate_up);
  args.T = dy.size(0);
  args.F = dy.size(1);
  args.gate_up = gate_up.const_data_ptr();
  args.dy = dy.const_data_ptr();
  args.dgate_up = dgate_up.mutable_data_ptr();
  if (cuda_call(gate_up, [&](auto stream) { swiglu_backward_cuda(args, stream); })) return dgate_up;
  parallel_items(swiglu_backward_cpu, args, args.T, kCost * args.F);
  return dgate_up;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(grpo_engine, m) {
  m.def("swiglu(Tensor gate_up) -> Tensor");
  m.def("swiglu_backward(Tensor dy, Tensor gate_up) -> Tensor");
}
GE_DEVICE_IMPL(m) {
  m.impl("swiglu", &forward);
  m.impl("swiglu_backward", &backward);
}
TORCH_LIBRARY_IMPL(grpo_engine, Meta, m) {
  m.impl("swiglu", &forward_meta);
  m.impl("swiglu_backward", &backward_meta);
}

}  // namespace grpo_engine
