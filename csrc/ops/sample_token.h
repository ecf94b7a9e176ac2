// sample_token -- one token a row from logits, with its log-prob and the row's entropy.
//
//   z = logits / temperature, p = softmax(z)
//   filters, in this order: top-k keeps the k largest z (ties: lowest ids first); top-p keeps, of what
//   is left and renormalised, every token whose z is at least that of the last one needed for mass
//   top_p; min-p keeps p_v >= min_p * max p
//   token = the first kept v with  sum_{w <= v, kept} p_w  >=  u * kept mass,  u = philox(seed, position)
//
// One uniform a token and no sort: the row is reduced in blocks (core/row_stats.h), u picks a block by
// its mass and then a token inside it. Sums across blocks are float64. The draw depends on the row, its
// seed and its position alone.
//   temperature 0   the lowest id among the largest logits; log-prob 0; entropy and full log-prob are
//                   those of temperature 1
//   a row whose z holds NaN or +inf, or -inf only: token -1, NaN everywhere else; other rows are
//   untouched
// Philox: Salmon et al. 2011, SC'11; nucleus: Holtzman et al. 2020, arXiv:1904.09751; min-p: Nguyen et
// al. 2024, arXiv:2407.01082.
#pragma once
#include "core/cpu_dispatch.h"
#include "core/dtype.h"

namespace grpo_engine {

// One row while it is being sampled. The kernels fill and read it in this order: blocks, then gather
// if a filter is on, then pick if not.
struct SampleRow {
  // in
  DType dtype;             // f32 or bf16
  int64_t V;
  const void* logits;      // [V]
  float inv_temperature;
  // written by sample_blocks
  float* block_max;        // [blocks], of z
  float* block_sum;        // [blocks], sum exp(z - block max)
  double max, sum;         // over the row: M and Z = sum exp(z - M)
  double entropy;
  // gather: tokens with z >= threshold, in order of id
  float threshold;
  int64_t* candidate_id;   // [V]
  float* candidate_z;      // [V]
  int64_t num_candidates;
  // pick: in the block that holds the draw, what is left to go of the block's share in [0, 1]
  int64_t block;
  double share;
  int64_t token;           // written by pick and argmax
};

inline constexpr int64_t kSampleBlock = 512;  // logits a block; equals kRowBlock of core/row_stats.h

struct SampleRows {
  SampleRow* row;  // items index it
};

GE_CPU_KERNEL(sample_blocks, SampleRows)
GE_CPU_KERNEL(sample_gather, SampleRows)
GE_CPU_KERNEL(sample_pick, SampleRows)
GE_CPU_KERNEL(sample_argmax, SampleRows)  // needs block_max

}  // namespace grpo_engine
