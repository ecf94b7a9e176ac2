#include "ops/adamw.h"

#include <ATen/Functions.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "core/checks.h"
#include "core/cuda_call.h"
#include "core/parallel.h"

namespace grpo_engine {
namespace {

constexpr const char* kOp = "adamw";

void require_unit(const char* name, double value) {
  TORCH_CHECK_VALUE(value >= 0.0 && value < 1.0, kOp, ": ", name, " must be in [0, 1), got ", value);
}

at::Tensor meta(at::TensorList params, at::TensorList grads, at::TensorList m, at::TensorList v, at::TensorList steps,
                at::TensorList low, double lr, double beta1, double beta2, double eps, double weight_decay,
                double clip_norm) {
  const size_t P = params.size();
  TORCH_CHECK_VALUE(P > 0 && grads.size() == P && m.size() == P && v.size() == P && steps.size() == P, kOp,
                    ": params, grads, exp_avg, exp_avg_sq and steps must be of one length >= 1, got ", P, ", ", grads.size(),
                    ", ", m.size(), ", ", v.size(), ", ", steps.size());
  TORCH_CHECK_VALUE(low.empty() || low.size() == P, kOp, ": master_low must be empty or of the length of params, ", P,
                    ", got ", low.size());
  for (size_t i = 0; i < P; ++i) {
    const at::Tensor& p = params[i];
    require_float(kOp, "params", p);
    require_contiguous(kOp, "params", p);
    require_same_device(kOp, "params", p, params[0]);
    constexpr const char* shape = "the shape of its parameter";
    auto grad_dtype = p.scalar_type(), moment_dtype = p.scalar_type();
    if (!low.empty()) {
      require_dtype(kOp, "params with master_low", p, at::kBFloat16);
      require_tensor(kOp, "master_low", low[i], p.sizes(), shape, at::kShort, p);
      moment_dtype = at::kFloat;
      if (grads[i].scalar_type() == at::kFloat) grad_dtype = at::kFloat;
    }
    require_tensor(kOp, "grads", grads[i], p.sizes(), shape, grad_dtype, p);
    for (const auto& [name, t] : {std::pair{"exp_avg", &m[i]}, {"exp_avg_sq", &v[i]}}) {
      require_tensor(kOp, name, *t, p.sizes(), shape, moment_dtype, p);
    }
    require_tensor(kOp, "steps", steps[i], {}, "[]", at::kFloat, p);
  }
  TORCH_CHECK_VALUE(std::isfinite(lr) && lr >= 0.0, kOp, ": lr must be finite and >= 0, got ", lr);
  require_unit("beta1", beta1);
  require_unit("beta2", beta2);
  require_positive(kOp, "eps", eps);
  TORCH_CHECK_VALUE(std::isfinite(weight_decay) && weight_decay >= 0.0, kOp, ": weight_decay must be finite and >= 0, got ",
                    weight_decay);
  TORCH_CHECK_VALUE(clip_norm > 0.0, kOp, ": clip_norm must be > 0, got ", clip_norm);
  return at::empty({}, params[0].options().dtype(at::kDouble));
}

int16_t* low_of(at::TensorList low, size_t i) { return low.empty() ? nullptr : low[i].data_ptr<int16_t>(); }

void adamw_on_cuda(at::TensorList params, at::TensorList grads, at::TensorList m, at::TensorList v, at::TensorList steps,
                   at::TensorList low, AdamwCudaArgs args) {
  std::vector<AdamwParam> table;
  for (size_t i = 0; i < params.size(); ++i) {
    table.push_back({dtype_of(params[i]), dtype_of(grads[i]), params[i].numel(), args.num_blocks, params[i].data_ptr(),
                     m[i].data_ptr(), v[i].data_ptr(), low_of(low, i), grads[i].const_data_ptr(), steps[i].data_ptr<float>(),
                     0.0, 0.0});
    args.num_blocks += (params[i].numel() + kAdamwBlock - 1) / kAdamwBlock;
  }
  const auto bytes = static_cast<int64_t>(table.size() * sizeof(AdamwParam));
  at::Tensor host = at::empty({bytes}, at::kByte);
  std::memcpy(host.mutable_data_ptr(), table.data(), static_cast<size_t>(bytes));
  // from pageable memory: it is read before the call returns, and nothing waits for the device
  const at::Tensor on_device = host.to(params[0].device(), at::kByte, /*non_blocking=*/true);
  const at::Tensor squares = at::empty({args.num_blocks}, params[0].options().dtype(at::kDouble));
  args.params = static_cast<AdamwParam*>(on_device.mutable_data_ptr());
  args.P = static_cast<int64_t>(table.size());
  args.squares = squares.mutable_data_ptr<double>();
  cuda_call(params[0], [&](auto stream) { adamw_cuda(args, stream); });
}

at::Tensor adamw(at::TensorList params, at::TensorList grads, at::TensorList m, at::TensorList v, at::TensorList steps,
                 at::TensorList low, double lr, double beta1, double beta2, double eps, double weight_decay,
                 double clip_norm) {
  at::Tensor norm = meta(params, grads, m, v, steps, low, lr, beta1, beta2, eps, weight_decay, clip_norm);
  if (on_cuda(params[0])) {
    adamw_on_cuda(params, grads, m, v, steps, low,
                  {nullptr, !low.empty(), 0, 0, nullptr, norm.mutable_data_ptr<double>(), lr, lr * weight_decay, beta1,
                   beta2, eps, clip_norm});
    return norm;
  }
  std::vector<AdamwBlock> blocks;
  for (size_t i = 0; i < params.size(); ++i) {
    const int64_t count = params[i].numel();
    const double step = steps[i].item<float>() + 1.0;
    const double rate = lr / (1.0 - std::pow(beta1, step)), root = 1.0 / std::sqrt(1.0 - std::pow(beta2, step));
    auto at = [](const at::Tensor& t, int64_t first) {
      return static_cast<char*>(t.data_ptr()) + first * static_cast<int64_t>(t.element_size());
    };
    int16_t* const bits = low_of(low, i);
    for (int64_t first = 0; first < count; first += kAdamwBlock) {
      blocks.push_back({dtype_of(params[i]), dtype_of(grads[i]), std::min(kAdamwBlock, count - first), at(params[i], first),
                        at(m[i], first), at(v[i], first), bits ? bits + first : nullptr, at(grads[i], first), 0.0, rate,
                        root});
    }
  }
  AdamwArgs args{blocks.data(), 1.0, lr * weight_decay, beta1, beta2, eps};
  const auto items = static_cast<int64_t>(blocks.size());
  parallel_items(adamw_squares_cpu, args, items, 1.0 * kAdamwBlock);
  double squares = 0.0;
  for (const AdamwBlock& b : blocks) squares += b.squares;
  const double total = std::sqrt(squares);
  norm.fill_(total);
  if (!std::isfinite(total)) return norm;
  args.scale = std::min(1.0, clip_norm / (total + 1e-6));
  parallel_items(adamw_update_cpu, args, items, 30.0 * kAdamwBlock);
  for (const at::Tensor& step : steps) *step.data_ptr<float>() += 1.f;
  return norm;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(grpo_engine, m) {
  m.def(
      "adamw(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq,"
      " Tensor(d!)[] steps, Tensor(e!)[] master_low, float lr, float beta1, float beta2, float eps, float weight_decay,"
      " float clip_norm) -> Tensor");
}
GE_DEVICE_IMPL(m) { m.impl("adamw", &adamw); }
TORCH_LIBRARY_IMPL(grpo_engine, Meta, m) { m.impl("adamw", &meta); }

}  // namespace grpo_engine
