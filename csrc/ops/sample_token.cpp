#include "ops/sample_token.h"

#include <ATen/Functions.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "core/checks.h"
#include "core/cuda_call.h"
#include "core/parallel.h"

namespace grpo_engine {
namespace {

constexpr const char* kOp = "sample_token";
using Four = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using OptionalTensor = std::optional<at::Tensor>;

void require_row_vector(const char* name, const OptionalTensor& t, at::ScalarType dtype, const at::Tensor& logits) {
  if (t) require_tensor(kOp, name, *t, {logits.size(0)}, "[B]", dtype, logits);
}

Four meta(const at::Tensor& logits, const at::Tensor& seed, const at::Tensor& position, const at::Tensor& temperature,
          const OptionalTensor& top_k, const OptionalTensor& top_p, const OptionalTensor& min_p) {
  require_shape(kOp, "logits", logits, {-1, -1}, "[B, V]");
  TORCH_CHECK_TYPE(logits.scalar_type() == at::kFloat || logits.scalar_type() == at::kBFloat16, kOp,
                   ": logits must be Float or BFloat16, got ", logits.scalar_type());
  TORCH_CHECK_VALUE(logits.size(1) > 0, kOp, ": logits needs V >= 1 columns, got ", logits.sizes());
  TORCH_CHECK_VALUE(logits.stride(1) == 1 || logits.size(1) == 1, kOp,
                    ": each row of logits must be contiguous, got strides ", logits.strides());
  require_row_vector("seed", seed, at::kLong, logits);
  require_row_vector("position", position, at::kLong, logits);
  require_row_vector("temperature", temperature, at::kFloat, logits);
  require_row_vector("top_k", top_k, at::kLong, logits);
  require_row_vector("top_p", top_p, at::kFloat, logits);
  require_row_vector("min_p", min_p, at::kFloat, logits);
  const int64_t B = logits.size(0);
  const auto f32 = logits.options().dtype(at::kFloat);
  return {at::empty({B}, f32.dtype(at::kLong)), at::empty({B}, f32), at::empty({B}, f32), at::empty({B}, f32)};
}

Four forward(const at::Tensor& logits, const at::Tensor& seed, const at::Tensor& position, const at::Tensor& temperature,
             const OptionalTensor& top_k, const OptionalTensor& top_p, const OptionalTensor& min_p) {
  auto [token, logprob, full_logprob, entropy] = meta(logits, seed, position, temperature, top_k, top_p, min_p);
  const int64_t B = logits.size(0);
  const float* temperatures = temperature.const_data_ptr<float>();
  const float* ps = top_p ? top_p->const_data_ptr<float>() : nullptr;
  const float* mins = min_p ? min_p->const_data_ptr<float>() : nullptr;
  for (int64_t b = 0; b < B && !on_cuda(logits); ++b) {
    TORCH_CHECK_VALUE(std::isfinite(temperatures[b]) && temperatures[b] >= 0.f, kOp,
                      ": temperature must be finite and >= 0, got ", temperatures[b], " at row ", b);
    TORCH_CHECK_VALUE(!ps || (ps[b] >= 0.f && ps[b] <= 1.f), kOp, ": top_p must be in [0, 1], got ", ps ? ps[b] : 0.f,
                      " at row ", b);
    TORCH_CHECK_VALUE(!mins || (mins[b] >= 0.f && mins[b] <= 1.f), kOp, ": min_p must be in [0, 1], got ",
                      mins ? mins[b] : 0.f, " at row ", b);
  }
  SampleTokenArgs args{};
  args.dtype = dtype_of(logits);
  args.B = B;
  args.V = logits.size(1);
  args.row_stride = logits.stride(0);
  args.logits = logits.const_data_ptr();
  args.seed = seed.const_data_ptr<int64_t>();
  args.position = position.const_data_ptr<int64_t>();
  args.temperature = temperatures;
  args.top_k = top_k ? top_k->const_data_ptr<int64_t>() : nullptr;
  args.top_p = ps;
  args.min_p = mins;
  args.token = token.mutable_data_ptr<int64_t>();
  args.logprob = logprob.mutable_data_ptr<float>();
  args.full_logprob = full_logprob.mutable_data_ptr<float>();
  args.entropy = entropy.mutable_data_ptr<float>();
  if (on_cuda(logits)) {
    const int64_t blocks = (args.V + kSampleBlock - 1) / kSampleBlock;
    const at::Tensor block_max = at::empty({B, blocks}, logprob.options()), block_weighted = at::empty_like(block_max);
    const at::Tensor block_mass = at::empty({B, blocks}, logprob.options().dtype(at::kDouble));
    args.block_max = block_max.mutable_data_ptr<float>();
    args.block_mass = block_mass.mutable_data_ptr<double>();
    args.block_weighted = block_weighted.mutable_data_ptr<float>();
    cuda_call(logits, [&](auto stream) { sample_token_cuda(args, stream); });
    return {token, logprob, full_logprob, entropy};
  }
  parallel_items(sample_token_cpu, args, B, 40.0 * args.V);
  return {token, logprob, full_logprob, entropy};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(grpo_engine, m) {
  m.def(
      "sample_token(Tensor logits, Tensor seed, Tensor position, Tensor temperature, Tensor? top_k,"
      " Tensor? top_p, Tensor? min_p) -> (Tensor token, Tensor logprob, Tensor full_logprob,"
      " Tensor entropy)");
}
GE_DEVICE_IMPL(m) { m.impl(kOp, &forward); }
TORCH_LIBRARY_IMPL(grpo_engine, Meta, m) { m.impl(kOp, &meta); }

}  // namespace grpo_engine
