// ragged_groups.cuh -- the tokens that a sequence of ragged_attention sees on CUDA: its group's prompt, then its own.
#pragma once
#include "core/attention.cuh"
#include "ops/ragged_attention.h"

namespace grpo_engine {

// The prompt that a sequence continues, and the end of its group.
struct RaggedGroup {
  int64_t prompt, end;             // sequences
  int64_t prompt_begin, prompt_len;  // tokens; no length for the prompt itself
  bool known;                      // whether cu_groups and cu_seqlens are as they should be
};

__device__ inline RaggedGroup group_of(const RaggedAttentionArgs& a, int64_t sequence) {
  RaggedGroup g{sequence, sequence + 1, 0, 0, true};
  const AttentionPlan& plan = a.plan;
  if (!plan.cu_groups) return g;
  g.known = plan.M > 0;
  if (!g.known) return g;
  const int64_t m = warp_find(0, plan.M, sequence, [&](int64_t i) { return plan.cu_groups[i]; });
  g.prompt = plan.cu_groups[m];
  g.end = plan.cu_groups[m + 1];
  g.known = g.prompt >= 0 && g.prompt <= sequence && sequence < g.end && g.end <= plan.N;
  if (!g.known || g.prompt == sequence) return g;
  g.prompt_begin = plan.cu[g.prompt];
  g.prompt_len = plan.cu[g.prompt + 1] - g.prompt_begin;
  g.known = g.prompt_begin >= 0 && g.prompt_len >= 0 && g.prompt_begin + g.prompt_len <= a.T;
  return g;
}

// The token at a position of a sequence: those of the prompt, then the sequence's own.
struct RaggedTokens {
  int64_t before;               // tokens of the prompt; see AttentionRows
  int64_t prompt_begin, begin;

  __device__ RaggedTokens(const RaggedAttentionArgs& a, int64_t sequence, int64_t tokens) {
    const RaggedGroup g = group_of(a, sequence);
    before = g.known ? g.prompt_len : -tokens - 1;
    prompt_begin = g.prompt_begin;
    begin = a.plan.cu[sequence];
  }
  __device__ int64_t token(int position) const {
    return position < before ? prompt_begin + position : begin + position - before;
  }
};

}  // namespace grpo_engine
