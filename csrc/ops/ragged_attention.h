// ragged_attention -- causal self-attention over packed sequences, forward and backward (training).
//
//   out[i] = sum_{j <= i} p_ij value[j],  p_ij = softmax_j (scale * query[i] . key[j])
//
// within each sequence; query head h reads kv head h / (H / K). With D_i = dout[i] . out[i]:
//
//   ds_ij = p_ij (dout[i] . value[j] - D_i) scale
//   dquery[i] = sum_j ds_ij key[j]   dkey[j] = sum_i ds_ij query[i]   dvalue[j] = sum_i p_ij dout[i]
//
// where the sums over i run over the tokens and then the heads that share a kv head.
//
// Groups. The first sequence of a group is a prompt, and the others continue it. A token of a continuing sequence sees the
// whole prompt and then its own sequence, but not its siblings. The gradients of the prompt's keys and values sum over its
// own queries and then over those of the others, in order.
//
// core/attention.h defines the arithmetic of a row, by position in prompt and response together. So a row has the bits of
// paged_attention, whether the prompt is shared or packed with every response. The forward pass keeps two numbers a row:
// max and 1 / sum. The backward pass recomputes p from them. One work item has a group and a kv head, so no two threads add
// to one gradient. On CUDA a work item has 8 keys, or 64 for bfloat16 with E <= 128. The latter rounds p and ds to bfloat16
// for their matmuls. All values of a group depend on that group alone.
//
// A NaN in a token reaches the tokens that see it and no other. CUDA does not check offsets: tokens that cu_seqlens gives to
// no sequence, or cu_groups to no group, become NaN. Shared memory limits E on CUDA to 868 (418 for float64). A larger E is
// a runtime error.
// Vaswani et al. 2017, arXiv:1706.03762; recomputation: Dao et al. 2022, arXiv:2205.14135.
//
//   query [T, H, E]   key, value [T, K, E]   rows contiguous, any stride over T
//   out, dout, dquery [T, H, E]   dkey, dvalue [T, K, E]   contiguous
//   stats [T, H, 2] float32 (float64 for float64)   cu_seqlens [N+1] int32; empty sequences allowed
//   cu_groups [M+1] int32, the first sequence of each group, or none: every sequence is one
#pragma once
#include "core/attention_plan.h"
#include "core/cpu_dispatch.h"
#include "core/cuda_stream.h"
#include "core/dtype.h"

namespace grpo_engine {

struct RaggedAttentionArgs {
  DType dtype;
  AttentionPlan plan;  // from plan_ragged
  int64_t H, E;
  int64_t query_stride, key_stride, value_stride;
  double scale;
  const void* query;  // [T, H, E]
  const void* key;  // [T, K, E]
  const void* value;  // [T, K, E]
  void* out;  // [T, H, E]; written by forward, read by backward
  void* stats;  // [T, H, 2]; written by forward, read by backward
  const void* dout;  // [T, H, E]; backward only, as the following
  void* dquery;  // [T, H, E]
  void* dkey;  // [T, K, E]
  void* dvalue;  // [T, K, E]
  int64_t T;  // CUDA only, as the following; of the plan it reads N, M, K, cu and cu_groups
  void* key_t;  // [K, E, T] scratch, if ragged_attention_transposes; the following for backward only
  void* value_t;  // [K, E, T]
  void* query_t;  // [K, E, T, H / K]
  void* dout_t;  // [K, E, T, H / K]
  void* centre;  // [T, H] arithmetic type
};

// Floating-point operations of the two matmuls of the forward pass. The backward pass takes 2.5 times that.
static inline double ragged_attention_work(const RaggedAttentionArgs& a) { return a.plan.pairs * a.H * a.E * 2; }

GE_CPU_KERNEL(ragged_attention_forward, RaggedAttentionArgs)  // items: num_items(plan)
GE_CPU_KERNEL(ragged_attention_backward, RaggedAttentionArgs)  // items: (group, kv head), M * K

// Whether the CUDA kernels for these arguments need the transposed scratch.
bool ragged_attention_transposes(const RaggedAttentionArgs&);
void ragged_attention_forward_cuda(const RaggedAttentionArgs&, CudaStream);
void ragged_attention_backward_cuda(const RaggedAttentionArgs&, CudaStream);

}  // namespace grpo_engine
