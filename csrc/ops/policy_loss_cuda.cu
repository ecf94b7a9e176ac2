#include "ops/policy_loss.h"

#include "core/cuda_values.cuh"
#include "core/reduce.cuh"
#include "ops/policy_loss.cuh"

namespace grpo_engine {
namespace {

constexpr int kThreads = 128;  // of a sequence

// NaN wins.
struct MaxOrNan {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a > b || a != a ? a : b;
  }
};

__device__ inline bool is_max(int stat) { return stat == kStatRatioMax || stat == kStatMismatch; }

template <typename A>
struct Sequence {
  const A *logprob, *old_logprob, *ref_logprob, *advantage;
  const bool* mask;
  A* dlogprob;
  int64_t length;

  __device__ Sequence(const PolicyLossArgs& a, int64_t first, int64_t last) : length(last - first) {
    logprob = static_cast<const A*>(a.logprob) + first;
    old_logprob = a.old_logprob ? static_cast<const A*>(a.old_logprob) + first : nullptr;
    ref_logprob = a.ref_logprob ? static_cast<const A*>(a.ref_logprob) + first : nullptr;
    advantage = static_cast<const A*>(a.advantage) + first;
    mask = a.mask ? a.mask + first : nullptr;
    dlogprob = static_cast<A*>(a.dlogprob) + first;
  }
  __device__ bool keeps(int64_t i) const { return !mask || mask[i]; }
  __device__ A difference(int64_t i) const { return old_logprob ? logprob[i] - old_logprob[i] : A(0); }

  // use(i) for this thread's tokens, in ascending order.
  template <typename Use>
  __device__ void each(Use use) const {
    for (int64_t i = threadIdx.x; i < length; i += kThreads) use(i);
  }
};

// One block, one sequence.
template <typename A>
__global__ void __launch_bounds__(kThreads) policy_loss_kernel(PolicyLossArgs a) {
  const int64_t n = blockIdx.x, first = a.cu_seqlens[n], last = a.cu_seqlens[n + 1];
  double* stats = a.stats + n * kNumPolicyStats;
  if (first < 0 || first > last || last > a.R) {  // policy_loss_total_kernel turns everything to NaN
    if (threadIdx.x < kNumPolicyStats) stats[threadIdx.x] = not_a_number<double>();
    return;
  }
  const auto constant = [](double x) { return static_cast<A>(x); };
  const PolicyConstants<A> c{
      A(0), A(1), constant(1.0 - a.clip_low), constant(1.0 + a.clip_high), constant(a.dual_clip), constant(kLogRatioLimit)};
  const Sequence<A> s(a, first, last);
  const bool by_sequence = a.ratio == PolicyRatio::sequence;
  const bool clip_by_sequence = by_sequence && a.objective == PolicyObjective::clip;
  double sums[kNumPolicyStats] = {}, log_ratios = 0.0, slopes = 0.0;
  s.each([&](int64_t i) {
    if (!s.keeps(i)) return;
    sums[kStatTokens] += 1.0;
    if (by_sequence) log_ratios += static_cast<double>(log_ratio(c, s.difference(i)).value);
  });
  const double kept = block_reduce(sums[kStatTokens], Add{}, 0.0), length = kept > 0.0 ? kept : 1.0;
  const double weight = a.sequence_mean ? a.weight / length : a.weight;
  A sequence_ratio = 0;
  if (by_sequence) sequence_ratio = static_cast<A>(exp(block_reduce(log_ratios, Add{}, 0.0) / length));
  const A each = static_cast<A>(weight), kl_each = static_cast<A>(weight * a.kl_coef);
  s.each([&](int64_t i) {
    if (!s.keeps(i)) {
      s.dlogprob[i] = 0;
      return;
    }
    const A difference = s.difference(i), logprob = s.logprob[i];
    const LogRatio<A> d = log_ratio(c, difference);
    const A ratio = by_sequence ? sequence_ratio : s.old_logprob ? exp(d.value) : c.one;
    const PolicyTerm<A> term = policy_term(a.objective, c, s.advantage[i], ratio, logprob, by_sequence ? c.one : d.inside);
    A gradient = 0;
    if (clip_by_sequence) slopes += static_cast<double>(term.slope);
    else gradient = each * term.slope;
    if (s.ref_logprob) {
      const LogRatio<A> e = log_ratio(c, s.ref_logprob[i] - logprob);
      KlTerm<A> kl = kl_term(a.kl, c, e, a.kl == PolicyKl::k3 ? exp(e.value) : c.one);
      if (a.kl_ratio) {
        kl = times_ratio(kl, ratio, by_sequence ? c.zero : d.inside);
        if (by_sequence && a.kl_coef > 0.0) slopes += a.kl_coef * static_cast<double>(kl.value);
      }
      sums[kStatKl] += static_cast<double>(kl.value);
      // with coefficient 0 it is only measured: a NaN must not reach the loss
      if (a.kl_coef > 0.0) gradient = fma(kl_each, kl.slope, gradient);
    }
    s.dlogprob[i] = gradient;
    sums[kStatPolicyLoss] += static_cast<double>(term.value);
    sums[kStatRatio] += static_cast<double>(ratio);
    sums[kStatRatioMax] = MaxOrNan{}(sums[kStatRatioMax], static_cast<double>(ratio));
    sums[kStatMismatch] = MaxOrNan{}(sums[kStatMismatch], static_cast<double>(fabs(difference)));
    sums[kStatClipLow] += static_cast<double>(term.low);
    sums[kStatClipHigh] += static_cast<double>(term.high);
    sums[kStatDualClip] += static_cast<double>(term.dual);
  });
  if (clip_by_sequence || (by_sequence && a.kl_ratio && a.kl_coef > 0.0)) {
    // d(mean of the log-ratios)/dlogprob_t is 1/length for each kept token whose limit does not bind
    const A share = static_cast<A>(weight * block_reduce(slopes, Add{}, 0.0) / length);
    s.each([&](int64_t i) {
      if (s.keeps(i) && log_ratio(c, s.difference(i)).inside > A(0)) s.dlogprob[i] += share;
    });
  }
#pragma unroll
  for (int k = 0; k < kNumPolicyStats; ++k) {
    sums[k] = is_max(k) ? block_reduce(sums[k], MaxOrNan{}, 0.0) : block_reduce(sums[k], Add{}, 0.0);
  }
  if (threadIdx.x != 0) return;
  sums[kStatPolicyLoss] *= weight;
  sums[kStatKlLoss] = a.kl_coef > 0.0 ? weight * a.kl_coef * sums[kStatKl] : 0.0;
#pragma unroll
  for (int k = 0; k < kNumPolicyStats; ++k) stats[k] = sums[k];
}

// One warp, one statistic over all sequences, in one order whatever the device; then the loss.
template <typename A>
__global__ void __launch_bounds__(kNumPolicyStats* kWarpSize) policy_loss_total_kernel(PolicyLossArgs a) {
  const int stat = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  double mine = 0.0;
  int wrong = a.cu_seqlens[0] != 0 || a.cu_seqlens[a.N] != a.R;
  for (int64_t n = lane; n < a.N; n += kWarpSize) {
    const double x = a.stats[n * kNumPolicyStats + stat];
    mine = is_max(stat) ? MaxOrNan{}(mine, x) : mine + x;
    wrong |= a.cu_seqlens[n] > a.cu_seqlens[n + 1];
  }
  mine = is_max(stat) ? warp_reduce(mine, MaxOrNan{}) : warp_reduce(mine, Add{});
  wrong = block_reduce(wrong, Max{}, 0);
  if (wrong) {
    mine = not_a_number<double>();
    for (int64_t i = threadIdx.x; i < a.R; i += blockDim.x) static_cast<A*>(a.dlogprob)[i] = not_a_number<A>();
  }
  __shared__ double total[kNumPolicyStats];
  if (lane == 0) a.total[stat] = total[stat] = mine;
  __syncthreads();
  if (threadIdx.x == 0) *static_cast<A*>(a.loss) = static_cast<A>(total[kStatPolicyLoss] + total[kStatKlLoss]);
}

template <typename A>
void run(const PolicyLossArgs& args, CudaStream stream) {
  launch({"policy_loss", args.N, kThreads, stream}, policy_loss_kernel<A>, args);
  launch({"policy_loss_total", 1, kNumPolicyStats * kWarpSize, stream}, policy_loss_total_kernel<A>, args);
}

}  // namespace

void policy_loss_cuda(const PolicyLossArgs& args, CudaStream stream) {
  if (args.dtype == DType::f64) return run<double>(args, stream);
  run<float>(args, stream);
}

}  // namespace grpo_engine
