#include "ops/gather_logprob.h"

#include <ATen/Functions.h>

#include <algorithm>
#include <limits>
#include <tuple>

#include "core/checks.h"
#include "core/cuda_call.h"
#include "core/parallel.h"

namespace grpo_engine {
namespace {

constexpr const char* kOp = "gather_logprob";
constexpr double kCost = 40.0;  // operations a logit

using Three = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

at::ScalarType arithmetic(const at::Tensor& logits) {
  return logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

void check(const at::Tensor& logits, const at::Tensor& target, double temperature) {
  require_shape(kOp, "logits", logits, {-1, -1}, "[T, V]");
  require_float(kOp, "logits", logits);
  require_contiguous(kOp, "logits", logits);
  TORCH_CHECK_VALUE(logits.size(1) > 0, kOp, ": logits needs V >= 1 columns, got ", logits.sizes());
  require_tensor(kOp, "target", target, {logits.size(0)}, "[T]", at::kLong, logits);
  require_positive(kOp, "temperature", temperature);
}

GatherLogprobArgs arguments(const at::Tensor& logits, const at::Tensor& target, double temperature) {
  GatherLogprobArgs args{};
  args.dtype = dtype_of(logits);
  args.T = logits.size(0);
  args.V = logits.size(1);
  // float32 as in sample_token, whose temperatures are float32: the log-probs must agree in every bit
  constexpr float kFloatMax = std::numeric_limits<float>::max();
  args.inv_temperature =
      arithmetic(logits) == at::kDouble ? 1.0 / temperature : std::min(1.f / static_cast<float>(temperature), kFloatMax);
  args.logits = logits.const_data_ptr();
  args.target = target.const_data_ptr<int64_t>();
  return args;
}

Three forward_meta(const at::Tensor& logits, const at::Tensor& target, double temperature) {
  check(logits, target, temperature);
  const int64_t T = logits.size(0);
  const auto out = logits.options().dtype(arithmetic(logits));
  return {at::empty({T}, out), at::empty({T}, out), at::empty({T, 3}, out.dtype(at::kDouble))};
}

Three forward(const at::Tensor& logits, const at::Tensor& target, double temperature) {
  auto [logprob, entropy, saved] = forward_meta(logits, target, temperature);
  GatherLogprobArgs args = arguments(logits, target, temperature);
  for (int64_t t = 0; t < args.T && !on_cuda(target); ++t) {
    TORCH_CHECK_VALUE(args.target[t] >= 0 && args.target[t] < args.V, kOp, ": target must be in [0, V) = [0, ", args.V,
                      "), got ", args.target[t], " at row ", t);
  }
  args.logprob = logprob.mutable_data_ptr();
  args.entropy = entropy.mutable_data_ptr();
  args.saved = saved.mutable_data_ptr<double>();
  if (on_cuda(logits)) {
    const at::Tensor blocks = at::empty({args.T, (args.V + kGatherBlock - 1) / kGatherBlock, 3}, logprob.options());
    args.blocks = blocks.mutable_data_ptr();
    cuda_call(logits, [&](auto stream) { gather_logprob_forward_cuda(args, stream); });
    return {logprob, entropy, saved};
  }
  parallel_items(gather_logprob_forward_cpu, args, args.T, kCost * args.V);
  return {logprob, entropy, saved};
}

at::Tensor backward_meta(const at::Tensor& g_logprob, const at::Tensor& g_entropy, const at::Tensor& logits,
                         const at::Tensor& target, const at::Tensor& saved, double temperature) {
  check(logits, target, temperature);
  const int64_t T = logits.size(0);
  require_tensor(kOp, "g_logprob", g_logprob, {T}, "[T]", arithmetic(logits), logits);
  require_tensor(kOp, "g_entropy", g_entropy, {T}, "[T]", arithmetic(logits), logits);
  require_tensor(kOp, "saved", saved, {T, 3}, "[T, 3]", at::kDouble, logits);
  return at::empty_like(logits);
}

at::Tensor backward(const at::Tensor& g_logprob, const at::Tensor& g_entropy, const at::Tensor& logits,
                    const at::Tensor& target, const at::Tensor& saved, double temperature) {
  at::Tensor dlogits = backward_meta(g_logprob, g_entropy, logits, target, saved, temperature);
  GatherLogprobArgs args = arguments(logits, target, temperature);
  args.g_logprob = g_logprob.const_data_ptr();
  args.g_entropy = g_entropy.const_data_ptr();
  args.saved = const_cast<double*>(saved.const_data_ptr<double>());
  args.dlogits = dlogits.mutable_data_ptr();
  if (cuda_call(logits, [&](auto stream) { gather_logprob_backward_cuda(args, stream); })) return dlogits;
  parallel_items(gather_logprob_backward_cpu, args, args.T, kCost * args.V);
  return dlogits;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(grpo_engine, m) {
  m.def(
      "gather_logprob(Tensor logits, Tensor target, float temperature)"
      " -> (Tensor logprob, Tensor entropy, Tensor saved)");
  m.def(
      "gather_logprob_backward(Tensor g_logprob, Tensor g_entropy, Tensor logits, Tensor target,"
      " Tensor saved, float temperature) -> Tensor");
}
GE_DEVICE_IMPL(m) {
  m.impl("gather_logprob", &forward);
  m.impl("gather_logprob_backward", &backward);
}
TORCH_LIBRARY_IMPL(grpo_engine, Meta, m) {
  m.impl("gather_logprob", &forward_meta);
  m.impl("gather_logprob_backward", &backward_meta);
}

}  // namespace grpo_engine
