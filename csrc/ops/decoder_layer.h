// decoder_layer -- one layer of a Qwen2.5 or Llama decoder in one call: forward, backward, and over a paged cache.
//
//   h  = rms_norm(x, attn_norm)        qkv = linear(h, qkv_weight, qkv_bias), q and k turned by rope
//   s  = x + linear(attention(q, k, v), out_weight)
//   y  = s + linear(swiglu(linear(rms_norm(s, mlp_norm), gate_up_weight)), down_weight)
//
// Attention is ragged_attention over packed sequences or, after kv_write, paged_attention. The kernels of those ops compute
// every number in the same order. So y has the bits of the ops called one after another, and a token has the same bits in
// training and in decoding. This op adds an order of work: tiles of rows go from input to output inside the second-level
// cache. A layer costs one dispatch instead of ten. Rows do not meet outside attention, so the tile size changes no bit.
//
// The gradient of each weight is one matmul over all T tokens, in ascending t.
// Vaswani et al. 2017, arXiv:1706.03762; Qwen team 2024, arXiv:2412.15115.
//
//   x, s, y [T, D]     qkv [T, (H + 2K) E], q then k then v     attention out [T, H E]     gate_up [T, 2F]
//   attn_norm, mlp_norm [D]   qkv_weight [(H + 2K) E, D]   qkv_bias [(H + 2K) E] or none   out_weight [D, H E]
//   gate_up_weight [2F, D]   down_weight [D, F]   position [T] int64
#pragma once
#include "core/cpu_dispatch.h"
#include "core/dtype.h"

namespace grpo_engine {

struct AddRowsArgs {
  DType dtype;
  int64_t D;
  const void* a;  // [T, D]
  void* b;        // [T, D]; a + b on return
};

GE_CPU_KERNEL(add_rows, AddRowsArgs)  // items: rows

}  // namespace grpo_engine
