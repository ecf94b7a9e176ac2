// token_logprob -- log-prob of one token and entropy of each row, straight from hidden states.
//
//   z[t,v] = (sum_d hidden[t,d] weight[v,d]) / temperature       logprob[t] = z[t, target[t]] - log sum_v exp z[t,v]
//   entropy[t] = -sum_v p log p,  p = softmax(z[t])              nats
//   dlogits[t,v] = (g_logprob (1[v = target] - p_v) - g_entropy p_v (log p_v + entropy)) / temperature
//   dhidden = dlogits weight          dweight = dlogits^T hidden
//
// No [T, V] tensor exists. Forward: a work item multiplies a wave of rows by a block of kRowBlock vocabulary rows and keeps
// 3 numbers of each row of the tile. A second kernel joins the blocks of a row in order. Backward: the tiles are recomputed
// from the saved statistics, a window of the vocabulary at a time.
//
// The logits are those of linear(..., out_dtype=float32) bit for bit (core/gemm.h). core/row_stats.h reduces them. So the
// log-probs equal those of sample_token and gather_logprob bit for bit. dhidden and dweight are float32 chains in ascending
// v and t. Waves and threads change no bit. A NaN or +inf logit makes its own row NaN.
//
// CUDA has the same windows for both passes. A matmul (linear.h) multiplies a wave of rows by a window of the vocabulary.
// Kernels then reduce it, or turn it into the gradient, as core/row_stats.cuh does. So the bits are those of gather_logprob
// on linear's logits. For bfloat16 the gradient of the logits is the sum of two bfloat16. A target outside [0, V) makes its
// row NaN.
// batch_invariant = false on CUDA: windows are larger, and torch's library (cuBLAS) multiplies them in float32 sums. For
// bfloat16 the gradient of the logits is then rounded once.
//
//   hidden, dhidden [T, D]   weight, dweight [V, D]   target [T] int64 in [0, V)
//   logprob, entropy, g_logprob, g_entropy [T] float32 (float64 for float64)
//   saved [T, 3] float64: max of z, log of the centred sum, entropy
#pragma once
#include "core/cpu_dispatch.h"
#include "core/cuda_stream.h"
#include "core/dtype.h"

namespace grpo_engine {

inline constexpr int64_t kVocabBlock = 512;  // vocabulary rows of one tile: kRowBlock of row_stats.h

struct TokenLogprobArgs {
  DType dtype;
  int64_t T, D, V;
  double temperature;
  const void* hidden;        // [T, D]
  const void* weight;        // [V, D]
  const int64_t* target;     // [T]
  int64_t wave;              // rows of one tile

  // forward; A = arithmetic type of dtype
  void* blocks;              // [T, blocks of V, 3] A: max, sum, weighted sum of each block
  void* target_logit;        // [T] A
  void* logprob;             // [T] A
  void* entropy;             // [T] A

  double* saved;             // [T, 3]; written by forward, read by backward

  // backward
  const void* g_logprob;     // [T] A
  const void* g_entropy;     // [T] A
  int64_t first_row, num_rows;    // the rows and
  int64_t first_id, num_ids;      // vocabulary ids of the window whose gradient is wanted
  void* dlogits;             // [num_rows, num_ids] A; CUDA: first the logits, in both passes
  bfloat16 *high, *low;      // [num_rows, num_ids], CUDA: dlogits for bfloat16, or null; low null: high is rounded
};

GE_CPU_MATMUL_KERNEL(token_logprob_blocks, TokenLogprobArgs)   // items: tiles, down the rows first
GE_CPU_KERNEL(token_logprob_join, TokenLogprobArgs)     // items: rows
GE_CPU_MATMUL_KERNEL(token_logprob_dlogits, TokenLogprobArgs)  // items: tiles of the window, down the rows first

void token_logprob_blocks_cuda(const TokenLogprobArgs&, CudaStream);   // of the window
void token_logprob_join_cuda(const TokenLogprobArgs&, CudaStream);     // of all rows
void token_logprob_dlogits_cuda(const TokenLogprobArgs&, CudaStream);  // of the window

}  // namespace grpo_engine
