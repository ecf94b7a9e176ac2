#include "ops/decoder_layer.h"

#include <ATen/Functions.h>
#include <torch/library.h>

#include <optional>

#include "ops/decoder_layer_call.h"

namespace grpo_engine {
namespace {

using namespace layer;

Forward forward_meta(const Tensor& x, const Tensor& attn_norm, const Tensor& qkv_weight,
                     const std::optional<Tensor>& qkv_bias, const Tensor& out_weight, const Tensor& mlp_norm,
                     const Tensor& gate_up_weight, const Tensor& down_weight, const Tensor& position, const Tensor&,
                     const std::optional<Tensor>&, int64_t num_kv_heads, int64_t head_dim, double theta, double eps,
                     bool save, bool) {
  const Weights w{attn_norm, qkv_weight, qkv_bias, out_weight, mlp_norm, gate_up_weight, down_weight};
  const Layer l = check(x, w, position, num_kv_heads, head_dim, theta, eps);
  const auto T = x.sym_size(0);
  auto kept = [&](c10::SymInt columns, const at::TensorOptions& options) {
    return save ? at::empty_symint({T, columns}, options) : at::empty({0}, options);
  };
  return {at::empty_like(x),
          kept(l.qkv_width(), x.options()),
          kept(l.H * l.E, x.options()),
          save ? at::empty_symint({T, l.H, 2}, arithmetic(x)) : at::empty({0}, arithmetic(x)),
          kept(l.D, x.options()),
          save ? at::empty_symint({2, T}, arithmetic(x)) : at::empty({0}, arithmetic(x)),
          kept(2 * l.F, x.options())};
}

Backward backward_meta(const Tensor&, const Tensor& x, const Tensor& attn_norm, const Tensor& qkv_weight,
                       const std::optional<Tensor>& qkv_bias, const Tensor& out_weight, const Tensor& mlp_norm,
                       const Tensor& gate_up_weight, const Tensor& down_weight, const Tensor&, const Tensor&,
                       const std::optional<Tensor>&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                       const Tensor&, const Tensor&, int64_t, int64_t, double, double, bool) {
  const Tensor dbias = qkv_bias ? at::empty_like(*qkv_bias) : at::empty({0}, x.options());  // [0]: of no bias
  return {
      at::empty_like(x),          at::empty_like(attn_norm), at::empty_like(qkv_weight),     dbias,
      at::empty_like(out_weight), at::empty_like(mlp_norm),  at::empty_like(gate_up_weight), at::empty_like(down_weight)};
}

Tensor paged_meta(const Tensor& x, const Tensor& attn_norm, const Tensor& qkv_weight, const std::optional<Tensor>& qkv_bias,
                  const Tensor& out_weight, const Tensor& mlp_norm, const Tensor& gate_up_weight, const Tensor& down_weight,
                  const Tensor& position, Tensor& key_pages, Tensor&, const Tensor&, const Tensor&, const Tensor&,
                  const Tensor&, double theta, double eps, bool) {
  const Weights w{attn_norm, qkv_weight, qkv_bias, out_weight, mlp_norm, gate_up_weight, down_weight};
  check_paged(x, w, position, key_pages, theta, eps);
  return at::empty_like(x);
}

}  // namespace

#define GE_LAYER_WEIGHTS                                                                        \
  "Tensor attn_norm, Tensor qkv_weight, Tensor? qkv_bias, Tensor out_weight, Tensor mlp_norm, " \
  "Tensor gate_up_weight, Tensor down_weight, Tensor position, "
TORCH_LIBRARY_FRAGMENT(grpo_engine, m) {
  m.def("decoder_layer(Tensor x, " GE_LAYER_WEIGHTS
        "Tensor cu_seqlens, Tensor? cu_groups, int num_kv_heads, int head_dim, float theta, float eps, bool save,"
        " bool batch_invariant=True)"
        " -> (Tensor y, Tensor qkv, Tensor attn, Tensor attn_stats, Tensor s, Tensor rstd, Tensor gate_up)");
  m.def("decoder_layer_backward(Tensor dy, Tensor x, " GE_LAYER_WEIGHTS
        "Tensor cu_seqlens, Tensor? cu_groups, Tensor qkv, Tensor attn, Tensor attn_stats, Tensor s, Tensor rstd,"
        " Tensor gate_up, int num_kv_heads, int head_dim, float theta, float eps, bool batch_invariant=True)"
        " -> (Tensor dx, Tensor dattn_norm, Tensor dqkv_weight, Tensor dqkv_bias, Tensor dout_weight,"
        " Tensor dmlp_norm, Tensor dgate_up_weight, Tensor ddown_weight)");
  m.def("decoder_layer_paged(Tensor x, " GE_LAYER_WEIGHTS
        "Tensor(a!) key_pages, Tensor(b!) value_pages, Tensor slot, Tensor page_table, Tensor cu_query,"
        " Tensor kv_len, float theta, float eps, bool batch_invariant=True) -> Tensor");
}
TORCH_LIBRARY_IMPL(grpo_engine, Meta, m) {
  m.impl("decoder_layer", &forward_meta);
  m.impl("decoder_layer_backward", &backward_meta);
  m.impl("decoder_layer_paged", &paged_meta);
}

}  // namespace grpo_engine
