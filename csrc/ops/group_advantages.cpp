#include "ops/group_advantages.h"

#include <ATen/Functions.h>

#include <string_view>

#include "core/checks.h"
#include "core/cuda_call.h"
#include "ops/group_advantages.cuh"

namespace grpo_engine {
namespace {

constexpr const char* kOp = "group_advantages";

AdvantageStd parse_std(std::string_view name) {
  if (name == "unbiased") return AdvantageStd::unbiased;
  if (name == "population") return AdvantageStd::population;
  TORCH_CHECK_VALUE(name == "none", kOp, ": std must be unbiased, population or none, got ", name);
  return AdvantageStd::none;
}

GroupAdvantagesArgs check(const at::Tensor& rewards, std::string_view std_name, double eps) {
  require_shape(kOp, "rewards", rewards, {-1, -1}, "[P, G]");
  TORCH_CHECK_TYPE(rewards.scalar_type() == at::kFloat || rewards.scalar_type() == at::kDouble, kOp,
                   ": rewards must be Float or Double, got ", rewards.scalar_type());
  TORCH_CHECK_VALUE(rewards.size(1) >= 2, kOp, ": rewards needs G >= 2 responses per prompt, got ", rewards.sizes());
  require_contiguous(kOp, "rewards", rewards);
  TORCH_CHECK_VALUE(std::isfinite(eps) && eps >= 0.0, kOp, ": eps must be finite and >= 0, got ", eps);
  return {dtype_of(rewards), rewards.size(0), rewards.size(1), parse_std(std_name), eps, nullptr, nullptr};
}

template <typename T>
void all_rows(const GroupAdvantagesArgs& a) {
  const T* r = static_cast<const T*>(a.rewards);
  T* o = static_cast<T*>(a.advantages);
  for (int64_t p = 0; p < a.P; ++p) group_advantages_row(r + p * a.G, o + p * a.G, a.G, a.eps, a.std);
}

at::Tensor group_advantages(const at::Tensor& rewards, std::string_view std_name, double eps) {
  GroupAdvantagesArgs args = check(rewards, std_name, eps);
  at::Tensor out = at::empty_like(rewards);
  args.rewards = rewards.const_data_ptr();
  args.advantages = out.mutable_data_ptr();
  if (cuda_call(rewards, [&](auto stream) { group_advantages_cuda(args, stream); })) return out;
  if (args.dtype == DType::f32) all_rows<float>(args);
  else all_rows<double>(args);
  return out;
}

at::Tensor group_advantages_meta(const at::Tensor& rewards, std::string_view std_name, double eps) {
  check(rewards, std_name, eps);
  return at::empty_like(rewards);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(grpo_engine, m) { m.def("group_advantages(Tensor rewards, str std, float eps) -> Tensor"); }
GE_DEVICE_IMPL(m) { m.impl(kOp, &group_advantages); }
TORCH_LIBRARY_IMPL(grpo_engine, Meta, m) { m.impl(kOp, &group_advantages_meta); }

}  // namespace grpo_engine
