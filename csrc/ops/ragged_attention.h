// ragged_attention -- causal self-attention over packed sequences, forward and backward (training).
//
//   out[i] = sum_{j <= i} p_ij value[j],  p_ij = softmax_j (scale * query[i] . key[j])
//
// within each sequence; query head h reads kv head h / (H / K). With D_i = dout[i] . out[i]:
//
//   ds_ij = p_ij (dout[i] . value[j] - D_i) scale
//   dquery[i] = sum_j ds_ij key[j]   dkey[j] = sum_i ds_ij query[i]   dvalue[j] = sum_i p_ij dout[i]
//
// where the sums over i run over the tokens and then the heads of the group. The forward row
// algorithm is core/attention.h, so a row has the bits that paged_attention gives it. The forward
// keeps two numbers of each row (max and 1 / sum); the backward recomputes p from them, one work item
// for each sequence and kv head, so no two threads add to one gradient. Everything of a sequence
// depends on that sequence alone. NaN in a token reaches the tokens after it, not those before.
// Vaswani et al. 2017, arXiv:1706.03762; recomputation: Dao et al. 2022, arXiv:2205.14135.
//
//   query [T, H, E]   key, value [T, K, E]   rows contiguous, any stride over T
//   out, dout, dquery [T, H, E]   dkey, dvalue [T, K, E]   contiguous
//   stats [T, H, 2] float32 (float64 for float64)   cu_seqlens [N+1] int32; empty sequences allowed
#pragma once
#include "core/attention_plan.h"
#include "core/cpu_dispatch.h"
#include "core/dtype.h"

namespace grpo_engine {

struct RaggedAttentionArgs {
  DType dtype;
  AttentionPlan plan;
  int64_t H, E, max_len;  // max_len: tokens of the longest sequence
  int64_t query_stride, key_stride, value_stride;
  double scale;
  const void* query;  // [T, H, E]
  const void* key;    // [T, K, E]
  const void* value;  // [T, K, E]
  void* out;          // [T, H, E]; written by forward, read by backward
  void* stats;        // [T, H, 2]; written by forward, read by backward
  const void* dout;   // [T, H, E]; backward only, as the following
  void* dquery;       // [T, H, E]
  void* dkey;         // [T, K, E]
  void* dvalue;       // [T, K, E]
};

GE_CPU_KERNEL(ragged_attention_forward, RaggedAttentionArgs)   // items: those of the plan
GE_CPU_KERNEL(ragged_attention_backward, RaggedAttentionArgs)  // items: (sequence, kv head)

}  // namespace grpo_engine
