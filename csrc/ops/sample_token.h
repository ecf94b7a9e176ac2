// sample_token -- samples one token a row from logits, with its log-prob and the row's entropy.
//
//   z = logits / temperature, p = softmax(z)
//   token = the first kept v with  sum_{w <= v, kept} p_w  >=  u * kept mass,  u = philox(seed, position)
//
// Filters, in this order:
//   top-k   keeps the k largest z; of equal ones the lowest ids
//   top-p   renormalises what is left and finds the last token that mass top_p needs; keeps every z >= that token's
//   min-p   keeps p_v >= min_p * max p
//
// A row takes one uniform and no sort. core/row_stats.h reduces the row in blocks. u chooses a block by its mass, then a
// vector in it, then a token. A filter is a threshold on z. Each pass measures the tail (count or mass) at 16 thresholds
// inside the interval that the pass before left. Blocks whose largest z is lower are skipped. exp is float32. Sums are
// float32 within a block and float64 across blocks, in order. The sample depends on the row, its seed and its position only.
//
// CUDA takes the same steps. core/row_stats.cuh reduces rows: one warp has a block of logits, so one row occupies many
// multiprocessors. Then one block of threads has a row. Masses that are compared with top_p are integers, whose sum has no
// order.
//
//   temperature 0   the lowest id among the largest logits; log-prob 0; entropy and full log-prob are
//                   those of temperature 1
//   logits that hold NaN or +inf, or -inf only: token -1, NaN everywhere else; other rows are
//   untouched. On CUDA, a row whose temperature, top_p or min_p is outside its range likewise
//   z beyond float32: the result of exact arithmetic, which leaves no token but the largest logit's equals any mass
// Philox: Salmon et al. 2011, SC'11; nucleus: Holtzman et al. 2020, arXiv:1904.09751; min-p: Nguyen et
// al. 2024, arXiv:2407.01082.
#pragma once
#include "core/cpu_dispatch.h"
#include "core/cuda_stream.h"
#include "core/dtype.h"

namespace grpo_engine {

inline constexpr int64_t kSampleBlock = 512;  // kRowBlock of core/row_stats.h and row_stats.cuh

struct SampleTokenArgs {
  DType dtype;  // of logits: f32 or bf16
  int64_t B, V;
  int64_t row_stride;  // elements from row to row of logits
  const void* logits;  // [B, V]
  const int64_t* seed;  // [B]
  const int64_t* position;  // [B]
  const float* temperature;  // [B]
  const int64_t* top_k;  // [B] or null; <= 0 or >= V: off
  const float* top_p;  // [B] or null; 1: off
  const float* min_p;  // [B] or null; 0: off
  int64_t* token;  // [B]
  float* logprob;  // [B]
  float* full_logprob;  // [B]
  float* entropy;  // [B]
  float* block_max;  // [B, blocks of V]; scratch of CUDA, as the next two
  double* block_mass;  // [B, blocks of V]
  float* block_weighted;  // [B, blocks of V]
};

GE_CPU_KERNEL(sample_token, SampleTokenArgs)  // items: rows

void sample_token_cuda(const SampleTokenArgs&, CudaStream);

}  // namespace grpo_engine
