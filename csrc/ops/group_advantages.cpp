#include "ops/group_advantages.h"

#include <ATen/Functions.h>
#include <torch/library.h>

#include <string_view>

#include "core/checks.h"
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

AdvantageStd check(const at::Tensor& rewards, std::string_view std_name, double eps) {
  require_shape(kOp, "rewards", rewards, {-1, -1}, "[P, G]");
  TORCH_CHECK_TYPE(rewards.scalar_type() == at::kFloat || rewards.scalar_type() == at::kDouble, kOp,
                   ": rewards must be Float or Double, got ", rewards.scalar_type());
  TORCH_CHECK_VALUE(rewards.size(1) >= 2, kOp, ": rewards needs G >= 2 answers per prompt, got ",
                    rewards.sizes());
  require_contiguous(kOp, "rewards", rewards);
  TORCH_CHECK_VALUE(std::isfinite(eps) && eps >= 0.0, kOp, ": eps must be finite and >= 0, got ",
                    eps);
  return parse_std(std_name);
}

template <typename T>
void all_rows(const at::Tensor& rewards, at::Tensor& out, double eps, AdvantageStd std_mode) {
  const int64_t P = rewards.size(0), G = rewards.size(1);
  const T* r = rewards.const_data_ptr<T>();
  T* o = out.mutable_data_ptr<T>();
  for (int64_t p = 0; p < P; ++p) group_advantages_row(r + p * G, o + p * G, G, eps, std_mode);
}

at::Tensor group_advantages_cpu(const at::Tensor& rewards, std::string_view std_name, double eps) {
  const AdvantageStd std_mode = check(rewards, std_name, eps);
  at::Tensor out = at::empty_like(rewards);
  if (rewards.scalar_type() == at::kFloat) all_rows<float>(rewards, out, eps, std_mode);
  else all_rows<double>(rewards, out, eps, std_mode);
  return out;
}

at::Tensor group_advantages_meta(const at::Tensor& rewards, std::string_view std_name, double eps) {
  check(rewards, std_name, eps);
  return at::empty_like(rewards);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(grpo_engine, m) {
  m.def("group_advantages(Tensor rewards, str std, float eps) -> Tensor");
}
TORCH_LIBRARY_IMPL(grpo_engine, CPU, m) { m.impl(kOp, &group_advantages_cpu); }
TORCH_LIBRARY_IMPL(grpo_engine, Meta, m) { m.impl(kOp, &group_advantages_meta); }

}  // namespace grpo_engine
