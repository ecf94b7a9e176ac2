// gather_logprob -- log-prob of one token and entropy of each row of logits, and their gradient.
//
//   z = logits / temperature,   logprob[t] = z[t, target[t]] - log sum_v exp z[t,v]
//   entropy[t] = -sum_v p log p,  p = softmax(z[t])                      nats
//   dlogits[t,v] = (g_logprob (1[v = target] - p_v) - g_entropy p_v (log p_v + entropy)) / temperature
//
// core/row_stats.h (CUDA: row_stats.cuh) reduces the row, so the log-prob equals that of sample_token on the same device bit
// for bit. A -inf logit is a token of probability 0. A NaN or +inf logit makes its row NaN and no other. On CUDA a target
// outside [0, V) makes its row NaN.
//
//   logits, dlogits [T, V] float32, bfloat16 or float64     target [T] int64 in [0, V)
//   logprob, entropy, g_logprob, g_entropy [T] float32 (float64 for float64 logits)
//   saved [T, 3] float64: max of z, log of the centred sum, entropy
#pragma once
#include "core/cpu_dispatch.h"
#include "core/cuda_stream.h"
#include "core/dtype.h"

namespace grpo_engine {

inline constexpr int64_t kGatherBlock = 512;  // kRowBlock of row_stats.h and row_stats.cuh

struct GatherLogprobArgs {
  DType dtype;
  int64_t T, V;
  double inv_temperature;  // a float32 number unless dtype is f64
  const void* logits;  // [T, V]
  const int64_t* target;  // [T]
  const void* g_logprob;  // [T]; backward only
  const void* g_entropy;  // [T]; backward only
  void* logprob;  // [T]; forward only
  void* entropy;  // [T]; forward only
  double* saved;  // [T, 3]; written by forward, read by backward
  void* dlogits;  // [T, V]; backward only
  void* blocks;  // [T, blocks of V, 3] of logprob's dtype; scratch of CUDA, forward only
};

GE_CPU_KERNEL(gather_logprob_forward, GatherLogprobArgs)  // items: rows
GE_CPU_KERNEL(gather_logprob_backward, GatherLogprobArgs)  // items: rows

void gather_logprob_forward_cuda(const GatherLogprobArgs&, CudaStream);
void gather_logprob_backward_cuda(const GatherLogprobArgs&, CudaStream);

}  // namespace grpo_engine
