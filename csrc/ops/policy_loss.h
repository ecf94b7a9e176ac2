// policy_loss -- the clipped policy-gradient loss, its gradient and its statistics, in one pass.
//
//   d_t = clamp(logprob_t - old_t, -20, 20)              0 when there is no old log-prob (on-policy)
//   token ratio     r_t = exp(d_t)
//   sequence ratio  r_t = exp(mean over the sequence's tokens of d)                          (GSPO)
//   surrogate -A r     clipped surrogate -A clamp(r, 1 - clip_low, 1 + clip_high)     dual-clip bound -A dual_clip
//   clip    f_t = max(surrogate, clipped surrogate);  where A < 0: min(f, dual-clip bound)
//           df/dr = -A where f is the surrogate (ties included), else 0
//   cispo   f_t = stop_gradient(clipped surrogate) logprob_t
//   KL, e = clamp(ref_t - logprob_t, -20, 20):  k1 = -e,  k2 = e^2 / 2,  k3 = exp(e) - e - 1
//   kl_ratio: KL_t r_t replaces KL_t, r differentiated as well: the gradient of k3 is then that of the reverse KL
//   loss = sum_t w_t (f_t + kl_coef KL_t) over tokens that the mask keeps
//     token_mean      w = 1 / num_tokens                               (DAPO; verl's default)
//     sequence_mean   w = 1 / (num_sequences * tokens kept in the sequence)        (GRPO's eq. 3)
//     constant        w = 1 / (num_sequences * constant_length)                       (Dr. GRPO)
//
// The caller gives the denominators of the whole optimizer step. So a step cut into micro-batches has the same loss and
// gradient. Where a clamp of a log-ratio binds, its gradient is 0. A masked token is skipped, whatever its numbers. A
// sequence without kept tokens adds 0. A NaN in a kept token reaches loss and gradient (through ref only if kl_coef > 0).
// On CUDA, invalid cu_seqlens make loss, gradient and statistics NaN. The arithmetic is that of logprob's dtype. Sums are
// float64: sixteen running sums in a sequence (on CUDA one a thread), joined by a fixed tree, then the sequences in order.
//
// GRPO: Shao et al. 2024, arXiv:2402.03300, eq. 3 and 4 (k3); dual clip: Ye et al. 2020,
// arXiv:1912.09729; DAPO: Yu et al. 2025, arXiv:2503.14476; Dr. GRPO: Liu et al. 2025,
// arXiv:2503.20783; GSPO: Zheng et al. 2025, arXiv:2507.18071, eq. 5 and 7; CISPO: MiniMax 2025,
// arXiv:2506.13585; k1, k2, k3: Schulman 2020, "Approximating KL divergence"; KL times ratio: DeepSeek-AI 2025,
// arXiv:2512.02556.
//
//   logprob, old, ref, advantage, dlogprob [R] float32 or float64   mask [R] bool   cu_seqlens [N+1] int32
#pragma once
#include "core/cpu_dispatch.h"
#include "core/cuda_stream.h"
#include "core/dtype.h"

namespace grpo_engine {

enum class PolicyRatio : int32_t { token, sequence };
enum class PolicyObjective : int32_t { clip, cispo };
enum class PolicyKl : int32_t { k1, k2, k3 };

// Raw sums and maxima over kept tokens, so that micro-batches can be added up.
enum PolicyStat : int32_t {
  kStatTokens,      // kept tokens
  kStatPolicyLoss,  // sum w f
  kStatKlLoss,      // sum w kl_coef KL
  kStatKl,          // sum KL, times the ratio with kl_ratio
  kStatRatio,       // sum r
  kStatRatioMax,    // max r
  kStatClipLow,     // tokens with A < 0 and r < 1 - clip_low
  kStatClipHigh,    // tokens with A > 0 and r > 1 + clip_high
  kStatDualClip,    // tokens where the dual clip binds
  kStatMismatch,    // max |logprob - old|, unclamped
  kNumPolicyStats
};

struct PolicyLossArgs {
  DType dtype;  // f32 or f64
  int64_t N, R;
  PolicyRatio ratio;
  PolicyObjective objective;
  PolicyKl kl;
  bool kl_ratio;           // KL times the ratio
  bool sequence_mean;      // divide each sequence's weight by its kept tokens
  double clip_low, clip_high, kl_coef;
  double dual_clip;        // +inf: off
  double weight;           // 1 / denominator
  const int32_t* cu_seqlens;   // [N+1]
  const void* logprob;         // [R]
  const void* old_logprob;     // [R] or nullptr: equal to logprob
  const void* ref_logprob;     // [R] or nullptr: no KL term
  const void* advantage;       // [R]
  const bool* mask;            // [R] or nullptr: keep all
  void* dlogprob;              // [R]
  double* stats;               // [N, kNumPolicyStats], one row a sequence
  double* total;               // [kNumPolicyStats]; CUDA only, as loss
  void* loss;                  // one number
};

GE_CPU_KERNEL(policy_loss, PolicyLossArgs)  // items: sequences

void policy_loss_cuda(const PolicyLossArgs&, CudaStream);

}  // namespace grpo_engine
