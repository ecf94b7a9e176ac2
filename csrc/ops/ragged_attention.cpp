#include "ops/ragged_attention.h"

#include <ATen/Functions.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "core/attention_checks.h"
#include "core/cuda_call.h"
#include "core/parallel.h"

namespace grpo_engine {
namespace {

constexpr const char* kOp = "ragged_attention";

void check(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& cu_seqlens,
           const std::optional<at::Tensor>& cu_groups, double scale) {
  require_query(kOp, query);
  const int64_t T = query.size(0), E = query.size(2);
  require_shape(kOp, "key", key, {T, -1, E}, "[T, K, E]");
  require_groups(kOp, "key", key.size(1), query.size(1));
  require_shape(kOp, "value", value, key.sizes(), "[T, K, E]");
  for (const auto& [name, t] : {std::pair{"key", &key}, std::pair{"value", &value}}) {
    require_dtype(kOp, name, *t, query.scalar_type());
    require_row_contiguous(kOp, name, *t);
    require_same_device(kOp, name, *t, query);
  }
  require_cu(kOp, "cu_seqlens", cu_seqlens, "[N + 1]", query);
  if (cu_groups) require_cu(kOp, "cu_groups", *cu_groups, "[M + 1]", query);
  require_positive(kOp, "scale", scale);
}

std::tuple<at::Tensor, at::Tensor> forward_meta(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                                const at::Tensor& cu_seqlens, const std::optional<at::Tensor>& cu_groups,
                                                double scale) {
  check(query, key, value, cu_seqlens, cu_groups, scale);
  const auto arithmetic = query.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  return {at::empty(query.sizes(), query.options()),
          at::empty({query.size(0), query.size(1), 2}, query.options().dtype(arithmetic))};
}

// Throws unless groups = [0, ..., N] rises with every step.
void require_rising(const at::Tensor& groups, int64_t N) {
  const int32_t* g = groups.const_data_ptr<int32_t>();
  const int64_t M = groups.size(0) - 1;
  TORCH_CHECK_VALUE(g[0] == 0 && g[M] == N, kOp, ": cu_groups must start at 0 and end at N = ", N, ", got ", g[0], " and ",
                    g[M]);
  for (int64_t m = 0; m < M; ++m) {
    TORCH_CHECK_VALUE(g[m] < g[m + 1], kOp, ": cu_groups must rise, got ", g[m], " then ", g[m + 1], " at group ", m);
  }
}

// What forward and backward share. On the CPU the offsets are checked and the work is planned.
RaggedAttentionArgs make_args(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                              const at::Tensor& cu_seqlens, const std::optional<at::Tensor>& cu_groups, double scale,
                              std::vector<int64_t>& first_chunk) {
  RaggedAttentionArgs args{};
  args.dtype = dtype_of(query);
  args.T = query.size(0);
  args.H = query.size(1);
  args.E = query.size(2);
  args.query_stride = query.stride(0);
  args.key_stride = key.stride(0);
  args.value_stride = value.stride(0);
  args.scale = scale;
  args.query = query.const_data_ptr();
  args.key = key.const_data_ptr();
  args.value = value.const_data_ptr();
  args.plan.N = args.plan.M = cu_seqlens.size(0) - 1;
  args.plan.K = key.size(1);
  args.plan.cu = cu_seqlens.const_data_ptr<int32_t>();
  if (cu_groups) {
    args.plan.M = cu_groups->size(0) - 1;
    args.plan.cu_groups = cu_groups->const_data_ptr<int32_t>();
  }
  if (on_cuda(query)) return args;
  require_offsets(kOp, "cu_seqlens", cu_seqlens, args.T);
  if (cu_groups) require_rising(*cu_groups, args.plan.N);
  first_chunk.resize(args.plan.N + 1);
  plan_ragged(args.plan, first_chunk.data());
  return args;
}

std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                           const at::Tensor& cu_seqlens, const std::optional<at::Tensor>& cu_groups,
                                           double scale) {
  auto [out, stats] = forward_meta(query, key, value, cu_seqlens, cu_groups, scale);
  std::vector<int64_t> first_chunk;
  RaggedAttentionArgs args = make_args(query, key, value, cu_seqlens, cu_groups, scale, first_chunk);
  if (out.numel() == 0) return {out, stats};
  args.out = out.mutable_data_ptr();
  args.stats = stats.mutable_data_ptr();
  const auto on_gpu = [&](auto stream) {
    const int64_t tokens = ragged_attention_transposes(args) ? args.T : 0;
    const at::Tensor key_t = at::empty({args.plan.K, args.E, tokens}, query.options());
    args.key_t = key_t.mutable_data_ptr();
    ragged_attention_forward_cuda(args, stream);
  };
  if (cuda_call(query, on_gpu)) return {out, stats};
  const int64_t items = num_items(args.plan);
  parallel_items(ragged_attention_forward_cpu, args, items, ragged_attention_work(args) / items);
  return {out, stats};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward_meta(const at::Tensor& dout, const at::Tensor& query,
                                                             const at::Tensor& key, const at::Tensor& value,
                                                             const at::Tensor& cu_seqlens,
                                                             const std::optional<at::Tensor>& cu_groups,
                                                             const at::Tensor& out, const at::Tensor& stats, double scale) {
  check(query, key, value, cu_seqlens, cu_groups, scale);
  require_tensor(kOp, "dout", dout, query.sizes(), "[T, H, E]", query.scalar_type(), query);
  require_tensor(kOp, "out", out, query.sizes(), "[T, H, E]", query.scalar_type(), query);
  require_tensor(kOp, "stats", stats, {query.size(0), query.size(1), 2}, "[T, H, 2]",
                 query.scalar_type() == at::kDouble ? at::kDouble : at::kFloat, query);
  return {at::empty(query.sizes(), query.options()), at::empty(key.sizes(), key.options()),
          at::empty(value.sizes(), value.options())};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& dout, const at::Tensor& query,
                                                        const at::Tensor& key, const at::Tensor& value,
                                                        const at::Tensor& cu_seqlens,
                                                        const std::optional<at::Tensor>& cu_groups, const at::Tensor& out,
                                                        const at::Tensor& stats, double scale) {
  auto grads = backward_meta(dout, query, key, value, cu_seqlens, cu_groups, out, stats, scale);
  std::vector<int64_t> first_chunk;
  RaggedAttentionArgs args = make_args(query, key, value, cu_seqlens, cu_groups, scale, first_chunk);
  if (out.numel() == 0) return grads;
  args.out = const_cast<void*>(out.const_data_ptr());
  args.stats = const_cast<void*>(stats.const_data_ptr());
  args.dout = dout.const_data_ptr();
  args.dquery = std::get<0>(grads).mutable_data_ptr();
  args.dkey = std::get<1>(grads).mutable_data_ptr();
  args.dvalue = std::get<2>(grads).mutable_data_ptr();
  const auto on_gpu = [&](auto stream) {
    const int64_t tokens = ragged_attention_transposes(args) ? args.T : 0;
    const at::Tensor key_t = at::empty({2, args.plan.K, args.E, tokens}, query.options());
    const at::Tensor query_t = at::empty({2, args.plan.K, args.E, tokens, args.H / args.plan.K}, query.options());
    const at::Tensor centre = at::empty({args.T, args.H}, arithmetic(query));
    args.key_t = key_t[0].mutable_data_ptr();
    args.value_t = key_t[1].mutable_data_ptr();
    args.query_t = query_t[0].mutable_data_ptr();
    args.dout_t = query_t[1].mutable_data_ptr();
    args.centre = centre.mutable_data_ptr();
    ragged_attention_backward_cuda(args, stream);
  };
  if (cuda_call(query, on_gpu)) return grads;
  const int64_t items = args.plan.M * args.plan.K;
  parallel_items(ragged_attention_backward_cpu, args, items, 2.5 * ragged_attention_work(args) / items);
  return grads;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(grpo_engine, m) {
  m.def(
      "ragged_attention(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens,"
      " Tensor? cu_groups, float scale) -> (Tensor out, Tensor stats)");
  m.def(
      "ragged_attention_backward(Tensor dout, Tensor query, Tensor key, Tensor value,"
      " Tensor cu_seqlens, Tensor? cu_groups, Tensor out, Tensor stats, float scale)"
      " -> (Tensor dquery, Tensor dkey, Tensor dvalue)");
}
GE_DEVICE_IMPL(m) {
  m.impl("ragged_attention", &forward);
  m.impl("ragged_attention_backward", &backward);
}
TORCH_LIBRARY_IMPL(grpo_engine, Meta, m) {
  m.impl("ragged_attention", &forward_meta);
  m.impl("ragged_attention_backward", &backward_meta);
}

}  // namespace grpo_engine
