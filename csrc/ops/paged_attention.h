// paged_attention -- causal attention of new tokens over a paged cache, for decoding and prefill.
//
// Token j of the q_n new tokens of sequence n has position kv_len[n] - q_n + j. It sees the keys 0 .. its position, those of
// the new tokens included (kv_write comes first). Query head h reads kv head h / (H / K).
//
// core/attention.h defines the arithmetic of a row. The bits of a row depend on its own query and keys alone. They do not
// depend on how the prompt is cut into chunks or which pages hold it, and they equal those of ragged_attention. CUDA runs
// core/attention.cuh, and core/attention_mma.cuh for bfloat16 with E <= 128. There, sequences with one new token each read
// their shared pages once, if they are neighbours. This changes no bit.
//
// q_n = 0 is allowed, with any kv_len. Of page_table[n] only the first ceil(kv_len[n] / page) entries are read (none if
// q_n = 0). Slots past kv_len may hold anything. No gradient.
// CUDA does not check values. These rows become NaN:
//   - rows that see a page outside [0, num_pages)
//   - rows of a sequence whose kv_len is less than q_n, or more than max_pages pages hold
//   - tokens that cu_query gives to no sequence
// Kwon et al. 2023, arXiv:2309.06180.
//
//   query [T, H, E]  rows contiguous, any stride over T     out [T, H, E]  contiguous
//   key_pages [num_pages, K, E, page]   value_pages [num_pages, K, page, E]   page % 16 = 0
//   page_table [N, max_pages] int32   cu_query [N+1] int32   kv_len [N] int32
#pragma once
#include "core/attention_plan.h"
#include "core/cpu_dispatch.h"
#include "core/cuda_stream.h"
#include "core/dtype.h"
#include "ops/kv_pages.cuh"

namespace grpo_engine {

struct PagedAttentionArgs {
  DType dtype;
  AttentionPlan plan;
  KvPageShape shape;
  int64_t H, num_pages, max_pages, query_stride;
  double scale;
  const void* query;  // [T, H, E]
  const void* key_pages;  // [num_pages, K, E, page]
  const void* value_pages;  // [num_pages, K, page, E]
  const int32_t* page_table;  // [N, max_pages]
  const int32_t* kv_len;  // [N]
  void* out;  // [T, H, E]
  int64_t T;  // CUDA only, as the following; of the plan it reads N and cu
  void* partial;  // [paged_attention_scratch] arithmetic type
};

GE_CPU_KERNEL(paged_attention, PagedAttentionArgs)  // items: those of the plan

void paged_attention_cuda(const PagedAttentionArgs&, CudaStream);
int64_t paged_attention_scratch(const PagedAttentionArgs&);  // elements; a function of shapes alone

}  // namespace grpo_engine
