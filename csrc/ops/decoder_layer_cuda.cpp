// decoder_layer on CUDA: its single ops, one after another. The tiles of decoder_layer_tiles.cpp are for a CPU's cache. A
// GPU needs a matmul of all rows to be busy, and a CUDA graph removes the cost of the launches.
#include <ATen/Functions.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "core/op_call.h"
#include "ops/decoder_layer.h"
#include "ops/decoder_layer_call.h"

namespace grpo_engine {
namespace {

using namespace layer;

using OptionalTensor = std::optional<Tensor>;
using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;

// ---------------------------------------------------------------- the single ops

namespace single {

Two rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  static const auto call = op<Two(const Tensor&, const Tensor&, double)>("grpo_engine::rms_norm");
  return call.call(x, weight, eps);
}

Three rms_norm_residual(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
  static const auto call = op<Three(const Tensor&, const Tensor&, const Tensor&, double)>("grpo_engine::rms_norm_residual");
  return call.call(x, residual, weight, eps);
}

Two rms_norm_backward(const Tensor& dy, const Tensor& dsum, const Tensor& x, const Tensor& weight, const Tensor& rstd) {
  static const auto call = op<Two(const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&, const Tensor&)>(
      "grpo_engine::rms_norm_backward");
  return call.call(dy, dsum, x, weight, rstd);
}

Tensor linear(const Layer& l, const Tensor& x, const Tensor& weight, const OptionalTensor& bias = std::nullopt) {
  static const auto call =
      op<Tensor(const Tensor&, const Tensor&, const OptionalTensor&, std::optional<at::ScalarType>, bool)>(
          "grpo_engine::linear");
  return call.call(x, weight, bias, std::nullopt, l.batch_invariant);
}

Three linear_backward(const Layer& l, const Tensor& dy, const Tensor& x, const Tensor& weight, bool need_bias) {
  static const auto call =
      op<Three(const Tensor&, const Tensor&, const Tensor&, bool, bool, bool, bool)>("grpo_engine::linear_backward");
  return call.call(dy, x, weight, true, true, need_bias, l.batch_invariant);
}

Tensor swiglu(const Tensor& gate_up) {
  static const auto call = op<Tensor(const Tensor&)>("grpo_engine::swiglu");
  return call.call(gate_up);
}

Tensor swiglu_backward(const Tensor& dy, const Tensor& gate_up) {
  static const auto call = op<Tensor(const Tensor&, const Tensor&)>("grpo_engine::swiglu_backward");
  return call.call(dy, gate_up);
}

Tensor rope(const Tensor& x, const Tensor& position, double theta, bool inverse) {
  static const auto call =
      op<Tensor(const Tensor&, const Tensor&, double, bool, const OptionalTensor&)>("grpo_engine::rope");
  return call.call(x, position, theta, inverse, std::nullopt);
}

}  // namespace single

// ---------------------------------------------------------------- stages

// The heads [first, first + count) of a tensor like qkv, [T, count, E].
Tensor heads_of(const Layer& l, const Tensor& qkv, int64_t first, int64_t count) {
  return qkv.view({qkv.size(0), l.H + 2 * l.K, l.E}).narrow(1, first, count);
}

struct Qkv {
  Tensor qkv, rstd;  // queries and keys turned
};
Qkv qkv_stage(const Layer& l, const Tensor& x, const Tensor& position) {
  const auto [h, rstd] = single::rms_norm(x, l.w.attn_norm, l.eps);
  const Tensor qkv = single::linear(l, h, l.w.qkv, l.w.qkv_bias), turned = heads_of(l, qkv, 0, l.H + l.K);
  turned.copy_(single::rope(turned, position, l.theta, /*inverse=*/false));
  return {qkv, rstd};
}

struct Mlp {
  Tensor y, s, rstd, gate_up;
};
Mlp mlp_stage(const Layer& l, const Tensor& x, const Tensor& attn) {
  const auto [h, s, rstd] = single::rms_norm_residual(single::linear(l, attn, l.w.out), x, l.w.mlp_norm, l.eps);
  const Tensor gate_up = single::linear(l, h, l.w.gate_up);
  return {single::linear(l, single::swiglu(gate_up), l.w.down).add_(s), s, rstd, gate_up};
}

// ---------------------------------------------------------------- forward

Forward forward(const Tensor& x, const Tensor& attn_norm, const Tensor& qkv_weight, const OptionalTensor& qkv_bias,
                const Tensor& out_weight, const Tensor& mlp_norm, const Tensor& gate_up_weight, const Tensor& down_weight,
                const Tensor& position, const Tensor& cu_seqlens, const OptionalTensor& cu_groups, int64_t num_kv_heads,
                int64_t head_dim, double theta, double eps, bool save, bool batch_invariant) {
  const Weights w{attn_norm, qkv_weight, qkv_bias, out_weight, mlp_norm, gate_up_weight, down_weight};
  Layer l = check(x, w, position, num_kv_heads, head_dim, theta, eps);
  l.batch_invariant = batch_invariant;
  static const auto attend =
      op<Two(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, double)>(
          "grpo_engine::ragged_attention");
  const auto [qkv, attn_rstd] = qkv_stage(l, x, position);
  const Heads heads = split(l, qkv);
  const auto [out, stats] = attend.call(heads.q, heads.k, heads.v, cu_seqlens, cu_groups, attention_scale(l));
  const Tensor attn = out.view({x.size(0), l.H * l.E});
  const Mlp mlp = mlp_stage(l, x, attn);
  if (save) return {mlp.y, qkv, attn, stats, mlp.s, at::stack({attn_rstd, mlp.rstd}), mlp.gate_up};
  const auto none = [&](const Tensor& like) { return at::empty({0}, like.options()); };
  return {mlp.y, none(x), none(x), none(stats), none(x), none(stats), none(x)};
}

// ---------------------------------------------------------------- backward

Backward backward(const Tensor& dy, const Tensor& x, const Tensor& attn_norm, const Tensor& qkv_weight,
                  const OptionalTensor& qkv_bias, const Tensor& out_weight, const Tensor& mlp_norm,
                  const Tensor& gate_up_weight, const Tensor& down_weight, const Tensor& position, const Tensor& cu_seqlens,
                  const OptionalTensor& cu_groups, const Tensor& qkv, const Tensor& attn, const Tensor& stats,
                  const Tensor& s, const Tensor& rstd, const Tensor& gate_up, int64_t num_kv_heads, int64_t head_dim,
                  double theta, double eps, bool batch_invariant) {
  const Weights w{attn_norm, qkv_weight, qkv_bias, out_weight, mlp_norm, gate_up_weight, down_weight};
  Layer l = check(x, w, position, num_kv_heads, head_dim, theta, eps);
  l.batch_invariant = batch_invariant;
  check_backward(dy, x, gate_up);
  const int64_t T = x.size(0);

  // from the end to s; the norms and the activation are computed again
  const auto [dactivation, ddown, no_bias] = single::linear_backward(l, dy, single::swiglu(gate_up), w.down, false);
  const Tensor dgate_up = single::swiglu_backward(dactivation, gate_up);
  const auto [dh_mlp, dgate_up_weight, no_bias2] =
      single::linear_backward(l, dgate_up, std::get<0>(single::rms_norm(s, w.mlp_norm, eps)), w.gate_up, false);
  const auto [ds, dmlp_norm] = single::rms_norm_backward(dh_mlp, dy, s, w.mlp_norm, rstd.select(0, 1));

  // through attention
  const auto [dattn, dout, no_bias3] = single::linear_backward(l, ds, attn, w.out, false);
  static const auto attention_backward =
      op<Three(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
               const Tensor&, const Tensor&, double)>("grpo_engine::ragged_attention_backward");
  const Heads heads = split(l, qkv);
  const auto [dq, dk, dv] = attention_backward.call(dattn.view({T, l.H, l.E}), heads.q, heads.k, heads.v, cu_seqlens,
                                                    cu_groups, attn.view({T, l.H, l.E}), stats, attention_scale(l));

  // to x
  const Tensor dqkv = at::empty_like(qkv);
  heads_of(l, dqkv, 0, l.H).copy_(single::rope(dq, position, theta, /*inverse=*/true));
  heads_of(l, dqkv, l.H, l.K).copy_(single::rope(dk, position, theta, /*inverse=*/true));
  heads_of(l, dqkv, l.H + l.K, l.K).copy_(dv);
  const auto [dh_attn, dqkv_weight, dqkv_bias] =
      single::linear_backward(l, dqkv, std::get<0>(single::rms_norm(x, w.attn_norm, eps)), w.qkv, qkv_bias.has_value());
  const auto [dx, dattn_norm] = single::rms_norm_backward(dh_attn, ds, x, w.attn_norm, rstd.select(0, 0));
  return {dx, dattn_norm, dqkv_weight, dqkv_bias, dout, dmlp_norm, dgate_up_weight, ddown};
}

// ---------------------------------------------------------------- over pages

Tensor paged(const Tensor& x, const Tensor& attn_norm, const Tensor& qkv_weight, const OptionalTensor& qkv_bias,
             const Tensor& out_weight, const Tensor& mlp_norm, const Tensor& gate_up_weight, const Tensor& down_weight,
             const Tensor& position, Tensor& key_pages, Tensor& value_pages, const Tensor& slot, const Tensor& page_table,
             const Tensor& cu_query, const Tensor& kv_len, double theta, double eps, bool batch_invariant) {
  const Weights w{attn_norm, qkv_weight, qkv_bias, out_weight, mlp_norm, gate_up_weight, down_weight};
  Layer l = check_paged(x, w, position, key_pages, theta, eps);
  l.batch_invariant = batch_invariant;
  static const auto write = op<void(const Tensor&, const Tensor&, Tensor&, Tensor&, const Tensor&)>("grpo_engine::kv_write");
  static const auto attend =
      op<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, double)>(
          "grpo_engine::paged_attention");
  const Heads heads = split(l, qkv_stage(l, x, position).qkv);
  write.call(heads.k, heads.v, key_pages, value_pages, slot);
  const Tensor attn = attend.call(heads.q, key_pages, value_pages, page_table, cu_query, kv_len, attention_scale(l));
  return mlp_stage(l, x, attn.view({x.size(0), l.H * l.E})).y;
}

}  // namespace

#ifdef GE_CUDA_EMULATED
TORCH_LIBRARY_IMPL(grpo_engine, CPU, m) {
#else
TORCH_LIBRARY_IMPL(grpo_engine, CUDA, m) {
#endif
  m.impl("decoder_layer", &forward);
  m.impl("decoder_layer_backward", &backward);
  m.impl("decoder_layer_paged", &paged);
}

}  // namespace grpo_engine
