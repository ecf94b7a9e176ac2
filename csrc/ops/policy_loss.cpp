#include "ops/policy_loss.h"

#include <ATen/Functions.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string_view>
#include <tuple>

#include "core/checks.h"
#include "core/cuda_call.h"
#include "core/parallel.h"

namespace grpo_engine {
namespace {

constexpr const char* kOp = "policy_loss";

using Three = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using OptionalTensor = std::optional<at::Tensor>;

// The index of `value` among the allowed names.
int parse(const char* argument, std::string_view value, std::initializer_list<std::string_view> names) {
  int i = 0;
  for (std::string_view name : names) {
    if (name == value) return i;
    ++i;
  }
  std::string allowed;
  for (std::string_view name : names) allowed += (allowed.empty() ? "" : ", ") + std::string(name);
  TORCH_CHECK_VALUE(false, kOp, ": ", argument, " must be one of ", allowed, ", got ", value);
}

void require_optional(const char* name, const OptionalTensor& t, at::ScalarType dtype, const at::Tensor& logprob) {
  if (t) require_tensor(kOp, name, *t, {logprob.size(0)}, "[R]", dtype, logprob);
}

struct Contract {
  PolicyLossArgs args;
  Three out;
};

Contract check(const at::Tensor& logprob, const at::Tensor& advantage, const at::Tensor& cu_seqlens,
               const OptionalTensor& old_logprob, const OptionalTensor& ref_logprob, const OptionalTensor& mask,
               std::string_view ratio, std::string_view objective, double clip_low, double clip_high,
               std::optional<double> dual_clip, std::string_view kl, double kl_coef, bool kl_ratio,
               std::string_view aggregation, double denominator) {
  require_shape(kOp, "logprob", logprob, {-1}, "[R]");
  TORCH_CHECK_TYPE(logprob.scalar_type() == at::kFloat || logprob.scalar_type() == at::kDouble, kOp,
                   ": logprob must be Float or Double, got ", logprob.scalar_type());
  require_contiguous(kOp, "logprob", logprob);
  const at::ScalarType dtype = logprob.scalar_type();
  require_tensor(kOp, "advantage", advantage, {logprob.size(0)}, "[R]", dtype, logprob);
  require_optional("old_logprob", old_logprob, dtype, logprob);
  require_optional("ref_logprob", ref_logprob, dtype, logprob);
  require_optional("mask", mask, at::kBool, logprob);
  require_tensor(kOp, "cu_seqlens", cu_seqlens, {-1}, "[N+1]", at::kInt, logprob);
  TORCH_CHECK_VALUE(cu_seqlens.size(0) >= 1, kOp, ": cu_seqlens must be [N+1] with N >= 0, got ", cu_seqlens.sizes());
  TORCH_CHECK_VALUE(clip_low >= 0.0 && clip_low <= 1.0, kOp, ": clip_low must be in [0, 1], got ", clip_low);
  TORCH_CHECK_VALUE(std::isfinite(clip_high) && clip_high >= 0.0, kOp, ": clip_high must be finite and >= 0, got ",
                    clip_high);
  TORCH_CHECK_VALUE(!dual_clip || *dual_clip > 1.0, kOp, ": dual_clip must be > 1 or None, got ", dual_clip.value_or(0.0));
  TORCH_CHECK_VALUE(std::isfinite(kl_coef) && kl_coef >= 0.0, kOp, ": kl_coef must be finite and >= 0, got ", kl_coef);
  TORCH_CHECK_VALUE(kl_coef == 0.0 || ref_logprob, kOp, ": kl_coef = ", kl_coef, " needs ref_logprob, got None");
  require_positive(kOp, "the denominator (num_tokens, or num_sequences times a length)", denominator);

  Contract c{};
  c.args.dtype = dtype_of(logprob);
  c.args.N = cu_seqlens.size(0) - 1;
  c.args.R = logprob.size(0);
  c.args.ratio = static_cast<PolicyRatio>(parse("ratio", ratio, {"token", "sequence"}));
  c.args.objective = static_cast<PolicyObjective>(parse("objective", objective, {"clip", "cispo"}));
  c.args.kl = static_cast<PolicyKl>(parse("kl", kl, {"k1", "k2", "k3"}));
  c.args.sequence_mean = parse("aggregation", aggregation, {"token_mean", "sequence_mean", "constant"}) == 1;
  c.args.clip_low = clip_low;
  c.args.clip_high = clip_high;
  c.args.dual_clip = dual_clip.value_or(std::numeric_limits<double>::infinity());
  c.args.kl_coef = kl_coef;
  c.args.kl_ratio = kl_ratio;
  c.args.weight = 1.0 / denominator;
  c.out = {at::empty({}, logprob.options()), at::empty_like(logprob),
           at::empty({kNumPolicyStats}, logprob.options().dtype(at::kDouble))};
  return c;
}

Three meta(const at::Tensor& logprob, const at::Tensor& advantage, const at::Tensor& cu_seqlens,
           const OptionalTensor& old_logprob, const OptionalTensor& ref_logprob, const OptionalTensor& mask,
           std::string_view ratio, std::string_view objective, double clip_low, double clip_high,
           std::optional<double> dual_clip, std::string_view kl, double kl_coef, bool kl_ratio, std::string_view aggregation,
           double denominator) {
  return check(logprob, advantage, cu_seqlens, old_logprob, ref_logprob, mask, ratio, objective, clip_low, clip_high,
               dual_clip, kl, kl_coef, kl_ratio, aggregation, denominator)
      .out;
}

void check_cu_seqlens(const int32_t* cu, int64_t N, int64_t R) {
  TORCH_CHECK_VALUE(cu[0] == 0 && cu[N] == R, kOp, ": cu_seqlens must run from 0 to R = ", R, ", got ", cu[0], " to ",
                    cu[N]);
  for (int64_t n = 0; n < N; ++n) {
    TORCH_CHECK_VALUE(cu[n] <= cu[n + 1], kOp, ": cu_seqlens must not fall, got ", cu[n], " then ", cu[n + 1],
                      " at sequence ", n);
  }
}

Three forward(const at::Tensor& logprob, const at::Tensor& advantage, const at::Tensor& cu_seqlens,
              const OptionalTensor& old_logprob, const OptionalTensor& ref_logprob, const OptionalTensor& mask,
              std::string_view ratio, std::string_view objective, double clip_low, double clip_high,
              std::optional<double> dual_clip, std::string_view kl, double kl_coef, bool kl_ratio,
              std::string_view aggregation, double denominator) {
  Contract c = check(logprob, advantage, cu_seqlens, old_logprob, ref_logprob, mask, ratio, objective, clip_low, clip_high,
                     dual_clip, kl, kl_coef, kl_ratio, aggregation, denominator);
  auto& [loss, dlogprob, stats] = c.out;
  PolicyLossArgs& args = c.args;
  args.cu_seqlens = cu_seqlens.const_data_ptr<int32_t>();
  if (!on_cuda(cu_seqlens)) check_cu_seqlens(args.cu_seqlens, args.N, args.R);
  args.logprob = logprob.const_data_ptr();
  args.old_logprob = old_logprob ? old_logprob->const_data_ptr() : nullptr;
  args.ref_logprob = ref_logprob ? ref_logprob->const_data_ptr() : nullptr;
  args.advantage = advantage.const_data_ptr();
  args.mask = mask ? mask->const_data_ptr<bool>() : nullptr;
  args.dlogprob = dlogprob.mutable_data_ptr();
  const at::Tensor rows = at::empty({args.N, kNumPolicyStats}, stats.options());
  args.stats = rows.mutable_data_ptr<double>();
  args.total = stats.mutable_data_ptr<double>();
  args.loss = loss.mutable_data_ptr();
  if (cuda_call(logprob, [&](auto stream) { policy_loss_cuda(args, stream); })) return c.out;

  const double mean_length = static_cast<double>(args.R) / (args.N > 0 ? args.N : 1);
  parallel_items(policy_loss_cpu, args, args.N, 10.0 * mean_length);
  double total[kNumPolicyStats] = {};
  for (int64_t n = 0; n < args.N; ++n) {
    for (int k = 0; k < kNumPolicyStats; ++k) {
      const double x = args.stats[n * kNumPolicyStats + k];
      if (k != kStatRatioMax && k != kStatMismatch) total[k] += x;
      else if (total[k] == total[k] && !(x <= total[k])) total[k] = x;  // NaN wins and stays
    }
  }
  std::copy_n(total, kNumPolicyStats, stats.mutable_data_ptr<double>());
  const double sum = total[kStatPolicyLoss] + total[kStatKlLoss];
  if (args.dtype == DType::f64) *loss.mutable_data_ptr<double>() = sum;
  else *loss.mutable_data_ptr<float>() = static_cast<float>(sum);
  return c.out;
}

// The gradient is there already; it waits for that of the loss. In C++, because through Python's autograd the call
// costs more than the arithmetic of a few thousand tokens.
class Differentiable : public torch::autograd::Function<Differentiable> {
 public:
  template <typename... Others>
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx, const at::Tensor& logprob,
                                                const Others&... others) {
    static const auto op =
        c10::Dispatcher::singleton().findSchemaOrThrow("grpo_engine::policy_loss", "").typed<decltype(meta)>();
    at::AutoDispatchBelowADInplaceOrView below;
    auto [loss, dlogprob, stats] = op.call(logprob, others...);
    ctx->save_for_backward({dlogprob});
    ctx->mark_non_differentiable({dlogprob, stats});
    ctx->set_materialize_grads(false);
    return {loss, dlogprob, stats};
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    torch::autograd::variable_list out(kNumInputs);
    if (grads[0].defined()) out[0] = at::mul(grads[0], ctx->get_saved_variables()[0]);
    return out;
  }

 private:
  static constexpr size_t kNumInputs = 16;
};

Three autograd(const at::Tensor& logprob, const at::Tensor& advantage, const at::Tensor& cu_seqlens,
               const OptionalTensor& old_logprob, const OptionalTensor& ref_logprob, const OptionalTensor& mask,
               std::string_view ratio, std::string_view objective, double clip_low, double clip_high,
               std::optional<double> dual_clip, std::string_view kl, double kl_coef, bool kl_ratio,
               std::string_view aggregation, double denominator) {
  const auto out = Differentiable::apply(logprob, advantage, cu_seqlens, old_logprob, ref_logprob, mask, ratio, objective,
                                         clip_low, clip_high, dual_clip, kl, kl_coef, kl_ratio, aggregation, denominator);
  return {out[0], out[1], out[2]};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(grpo_engine, m) {
  m.def(
      "policy_loss(Tensor logprob, Tensor advantage, Tensor cu_seqlens, Tensor? old_logprob,"
      " Tensor? ref_logprob, Tensor? mask, str ratio, str objective, float clip_low,"
      " float clip_high, float? dual_clip, str kl, float kl_coef, bool kl_ratio, str aggregation,"
      " float denominator) -> (Tensor loss, Tensor dlogprob, Tensor stats)");
}
GE_DEVICE_IMPL(m) { m.impl(kOp, &forward); }
TORCH_LIBRARY_IMPL(grpo_engine, Meta, m) { m.impl(kOp, &meta); }
TORCH_LIBRARY_IMPL(grpo_engine, Autograd, m) { m.impl(kOp, &autograd); }

}  // namespace grpo_engine
