// attention_plan.h -- how attention is cut into work items: (sequence, kv head, chunk of tokens).
#pragma once
#include <cstdint>

namespace grpo_engine {

inline constexpr int64_t kQueryChunk = 128;  // query tokens of one work item

// Sequence n owns the items [first_chunk[n] * K, first_chunk[n+1] * K), chunks innermost.
struct AttentionPlan {
  int64_t N, K;
  const int32_t* cu;           // [N + 1] first token of each sequence
  const int64_t* first_chunk;  // [N + 1] chunks of the sequences before
};

}  // namespace grpo_engine
