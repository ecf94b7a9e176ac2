// decoder_layer_call.h -- the inputs of decoder_layer and their checks. decoder_layer_tiles.cpp (CPU) and
// decoder_layer_cuda.cpp share them.
#pragma once
#include <ATen/core/Tensor.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "core/checks.h"
#include "core/dtype.h"

namespace grpo_engine::layer {

inline constexpr const char* kOp = "decoder_layer";
using Tensor = at::Tensor;

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

struct Weights {
  const Tensor &attn_norm, &qkv;
  const std::optional<Tensor>& qkv_bias;
  const Tensor &out, &mlp_norm, &gate_up, &down;
};

// The facts that every stage needs.
struct Layer {
  Weights w;
  DType dtype;
  int64_t D, F, H, K, E;
  double theta, eps;
  bool batch_invariant = true;  // of the matmuls on CUDA

  int64_t qkv_width() const { return (H + 2 * K) * E; }
};

inline Layer check(const Tensor& x, const Weights& w, const Tensor& position, int64_t K, int64_t E, double theta,
                   double eps) {
  require_shape(kOp, "x", x, {-1, -1}, "[T, D]");
  TORCH_CHECK_VALUE(x.size(1) > 0, kOp, ": x needs D >= 1 columns, got ", x.sizes());
  require_float(kOp, "x", x);
  require_contiguous(kOp, "x", x);
  TORCH_CHECK_VALUE(E > 0 && E % 2 == 0, kOp, ": head_dim must be even and >= 2, got ", E);
  const auto dtype = x.scalar_type();
  const int64_t D = x.size(1);
  require_tensor(kOp, "out_weight", w.out, {D, -1}, "[D, H E]", dtype, x);
  const int64_t H = w.out.size(1) / E;
  TORCH_CHECK_VALUE(H > 0 && w.out.size(1) == H * E, kOp, ": out_weight must be [D, H E] with head_dim E = ", E, ", got ",
                    w.out.sizes());
  TORCH_CHECK_VALUE(K > 0 && H % K == 0, kOp, ": num_kv_heads must divide H = ", H, ", got ", K);
  const int64_t Q = (H + 2 * K) * E;
  require_tensor(kOp, "attn_norm", w.attn_norm, {D}, "[D]", dtype, x);
  require_tensor(kOp, "qkv_weight", w.qkv, {Q, D}, "[(H + 2K) E, D]", dtype, x);
  if (w.qkv_bias) require_tensor(kOp, "qkv_bias", *w.qkv_bias, {Q}, "[(H + 2K) E]", dtype, x);
  require_tensor(kOp, "mlp_norm", w.mlp_norm, {D}, "[D]", dtype, x);
  require_tensor(kOp, "down_weight", w.down, {D, -1}, "[D, F]", dtype, x);
  const int64_t F = w.down.size(1);
  require_tensor(kOp, "gate_up_weight", w.gate_up, {2 * F, D}, "[2F, D]", dtype, x);
  require_tensor(kOp, "position", position, {x.size(0)}, "[T]", at::kLong, x);
  require_positive(kOp, "theta", theta);
  TORCH_CHECK_VALUE(std::isfinite(eps) && eps >= 0.0, kOp, ": eps must be finite and >= 0, got ", eps);
  return {w, dtype_of(x), D, F, H, K, E, theta, eps};
}

inline void check_backward(const Tensor& dy, const Tensor& x, const Tensor& gate_up) {
  require_tensor(kOp, "dy", dy, x.sizes(), "[T, D]", x.scalar_type(), x);
  TORCH_CHECK_VALUE(gate_up.dim() == 2, kOp, ": the forward pass was called with save = false");
}

inline Layer check_paged(const Tensor& x, const Weights& w, const Tensor& position, const Tensor& key_pages, double theta,
                         double eps) {
  require_shape(kOp, "key_pages", key_pages, {-1, -1, -1, -1}, "[num_pages, K, E, page]");
  return check(x, w, position, key_pages.size(1), key_pages.size(2), theta, eps);
}

struct Heads {
  Tensor q, k, v;  // [T, H, E], [T, K, E], [T, K, E] inside qkv
};

inline Heads split(const Layer& l, const Tensor& qkv) {
  const int64_t T = qkv.size(0), width = l.qkv_width();
  auto heads = [&](int64_t first, int64_t count) {
    return qkv.as_strided({T, count, l.E}, {width, l.E, 1}, qkv.storage_offset() + first * l.E);
  };
  return {heads(0, l.H), heads(l.H, l.K), heads(l.H + l.K, l.K)};
}

inline double attention_scale(const Layer& l) { return 1.0 / std::sqrt(static_cast<double>(l.E)); }

}  // namespace grpo_engine::layer
