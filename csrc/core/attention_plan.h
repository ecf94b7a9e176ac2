// attention_plan.h -- how attention is cut into work items: (group, kv head, sequence, chunk of tokens).
#pragma once
#include <cstdint>

namespace grpo_engine {

inline constexpr int64_t kQueryChunk = 128;  // query tokens of one work item

// Group m owns the items [first_chunk[g] * K, first_chunk[g'] * K) with g and g' the first sequences of groups m and m + 1.
// Kv heads are outermost in a group, so neighbouring items share their packed keys.
struct AttentionPlan {
  int64_t N, M, K;             // sequences, groups, kv heads
  const int32_t* cu;           // [N + 1] first token of each sequence
  const int32_t* cu_groups;    // [M + 1] first sequence of each group; null: every sequence is one, M = N
  const int64_t* first_chunk;  // [N + 1] chunks of the sequences before
  int64_t max_len;             // the most keys that a token sees
  double pairs;                // (query token, key that it sees), all sequences; about
};

static inline int64_t first_of_group(const AttentionPlan& plan, int64_t m) { return plan.cu_groups ? plan.cu_groups[m] : m; }

static inline int64_t num_items(const AttentionPlan& plan) { return plan.first_chunk[plan.N] * plan.K; }

// Fills first_chunk [N + 1] and sets it in a plan whose N, K and cu are set.
static inline void plan_chunks(AttentionPlan& plan, int64_t* first_chunk) {
  first_chunk[0] = 0;
  for (int64_t n = 0; n < plan.N; ++n) {
    const int64_t tokens = plan.cu[n + 1] - plan.cu[n];
    first_chunk[n + 1] = first_chunk[n] + (tokens + kQueryChunk - 1) / kQueryChunk;
  }
  plan.first_chunk = first_chunk;
}

// The same with max_len and pairs. The first sequence of a group is the prompt of the others.
// The forward pass has num_items(plan) items, the backward pass M * K.
static inline void plan_ragged(AttentionPlan& plan, int64_t* first_chunk) {
  plan_chunks(plan, first_chunk);
  plan.max_len = 0;
  plan.pairs = 0;
  for (int64_t m = 0; m < plan.M; ++m) {
    const int64_t prompt = first_of_group(plan, m);
    for (int64_t n = prompt; n < first_of_group(plan, m + 1); ++n) {
      const int64_t tokens = plan.cu[n + 1] - plan.cu[n];
      const int64_t before = n == prompt ? 0 : plan.cu[prompt + 1] - plan.cu[prompt];
      if (tokens > 0 && before + tokens > plan.max_len) plan.max_len = before + tokens;
      plan.pairs += static_cast<double>(tokens) * (static_cast<double>(before) + 0.5 * (tokens + 1));
    }
  }
}

}  // namespace grpo_engine
