// decoder_layer -- one layer of a Qwen2.5 or Llama decoder in one call, forward and backward, for training and
// over a paged cache.
//
//   h  = rms_norm(x, attn_norm)        qkv = linear(h, qkv_weight, qkv_bias), q and k turned by rope
//   s  = x + linear(attention(q, k, v), out_weight)
//   y  = s + linear(swiglu(linear(rms_norm(s, mlp_norm), gate_up_weight)), down_weight)
//
// Attention is ragged_attention over packed sequences or, after kv_write, paged_attention. Every number is
// made by the kernels of those ops in the same order, so y has the bits that calling them one after another
// gives, and a token has the same bits in training and in decoding. What this op adds is the order of the
// work: rows go from input to output in tiles that stay in the second-level cache, and a layer costs one
// dispatch instead of ten. Rows do not meet outside attention, so the size of a tile changes no bit.
//
// The gradients of the weights are one product over all T tokens each, in ascending t.
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
