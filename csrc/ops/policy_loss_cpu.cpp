#include "ops/policy_loss.h"

#include "core/simd.h"
#include "ops/policy_loss.cuh"

namespace grpo_engine::GE_ISA {
namespace {

template <typename A>
GE_INLINE A clamp_log(A x) {
  constexpr A limit = static_cast<A>(kLogRatioLimit);
  return x < -limit ? -limit : (x > limit ? limit : x);
}

template <typename A>
struct Chunk {
  A d[kLanes], e[kLanes];          // clamped log-ratios to the old and to the reference policy
  A ratio[kLanes], exp_e[kLanes];
  bool d_inside[kLanes], e_inside[kLanes], keep[kLanes];
};

template <typename A>
struct Sequence {
  const A* logprob;
  const A* old_logprob;
  const A* ref_logprob;
  const A* advantage;
  const bool* mask;
  A* dlogprob;
  int64_t length;

  Sequence(const PolicyLossArgs& a, int64_t n) {
    const int64_t first = a.cu_seqlens[n];
    const auto at = [&](const void* p) { return p ? static_cast<const A*>(p) + first : nullptr; };
    logprob = at(a.logprob);
    old_logprob = at(a.old_logprob);
    ref_logprob = at(a.ref_logprob);
    advantage = at(a.advantage);
    mask = a.mask ? a.mask + first : nullptr;
    dlogprob = static_cast<A*>(a.dlogprob) + first;
    length = a.cu_seqlens[n + 1] - first;
  }

  // Log-ratios of tokens [i, i + count), 0 at masked ones; returns max |logprob - old|.
  GE_MEMBER double log_ratios(int64_t i, int count, Chunk<A>& c) const {
    double mismatch = 0.0;
    for (int j = 0; j < kLanes; ++j) {
      const int64_t t = i + j;
      c.keep[j] = j < count && (!mask || mask[t]);
      const A d = c.keep[j] && old_logprob ? logprob[t] - old_logprob[t] : A(0);
      const A e = c.keep[j] && ref_logprob ? ref_logprob[t] - logprob[t] : A(0);
      c.d[j] = clamp_log(d);
      c.e[j] = clamp_log(e);
      c.d_inside[j] = c.d[j] == d || d != d;  // NaN keeps its slope, so that it reaches the gradient
      c.e_inside[j] = c.e[j] == e || e != e;
      const double size = d < A(0) ? -d : d;
      mismatch = size > mismatch || size != size ? size : mismatch;
    }
    return mismatch;
  }
};

template <typename A>
void one_sequence(const PolicyLossArgs& a, int64_t n) {
  using V = Vec16<A>;
  const Sequence<A> s(a, n);
  double* stats = a.stats + n * kNumPolicyStats;
  for (int k = 0; k < kNumPolicyStats; ++k) stats[k] = 0.0;

  Chunk<A> c;
  double kept = 0.0, log_ratio_sum = 0.0, mismatch = 0.0;
  each_vector(s.length, [&](int64_t i, int count) {
    const double m = s.log_ratios(i, count, c);
    mismatch = m > mismatch || m != m ? m : mismatch;
    for (int j = 0; j < count; ++j) {
      kept += c.keep[j];
      log_ratio_sum += static_cast<double>(c.d[j]);
    }
  });
  stats[kStatTokens] = kept;
  stats[kStatMismatch] = mismatch;
  const bool by_sequence = a.ratio == PolicyRatio::sequence;
  const double length = kept > 0.0 ? kept : 1.0;
  const double weight = a.sequence_mean ? a.weight / length : a.weight;
  const A sequence_ratio = static_cast<A>(::exp(log_ratio_sum / length));

  double slope_sum = 0.0;  // sum over the sequence of w r df/dr, shared out when the ratio is shared
  each_vector(s.length, [&](int64_t i, int count) {
    s.log_ratios(i, count, c);
    vexp(V::load(c.d)).store(c.ratio);
    vexp(V::load(c.e)).store(c.exp_e);
    for (int j = 0; j < count; ++j) {
      const int64_t t = i + j;
      if (!c.keep[j]) {
        s.dlogprob[t] = A(0);
        continue;
      }
      const A ratio = by_sequence ? sequence_ratio : c.ratio[j];
      const A inside = by_sequence || c.d_inside[j] ? A(1) : A(0);
      const PolicyTerm<A> term =
          policy_term(a.objective, s.advantage[t], ratio, s.logprob[t], static_cast<A>(a.clip_low),
                      static_cast<A>(a.clip_high), static_cast<A>(a.dual_clip), inside);
      A kl = A(0), kl_slope = A(0);
      if (s.ref_logprob) kl_term(a.kl, c.e[j], c.exp_e[j], c.e_inside[j], &kl, &kl_slope);
      stats[kStatKl] += static_cast<double>(kl);
      if (a.kl_coef == 0.0) kl = kl_slope = A(0);  // only measured: a NaN must not reach the loss
      const bool shared = by_sequence && a.objective == PolicyObjective::clip;
      if (shared) slope_sum += weight * static_cast<double>(term.slope);
      const double own = shared ? 0.0 : static_cast<double>(term.slope);
      s.dlogprob[t] = static_cast<A>(weight * (own + a.kl_coef * static_cast<double>(kl_slope)));
      stats[kStatPolicyLoss] += weight * static_cast<double>(term.value);
      stats[kStatKlLoss] += weight * a.kl_coef * static_cast<double>(kl);
      stats[kStatRatio] += static_cast<double>(ratio);
      if (!(static_cast<double>(ratio) <= stats[kStatRatioMax])) stats[kStatRatioMax] = ratio;
      stats[kStatClipLow] += term.low;
      stats[kStatClipHigh] += term.high;
      stats[kStatDualClip] += term.dual;
    }
  });
  if (by_sequence && a.objective == PolicyObjective::clip) {
    // d(mean of the log-ratios)/dlogprob_t is 1/length for each kept token whose clamp does not bind
    const double share = slope_sum / length;
    each_vector(s.length, [&](int64_t i, int count) {
      s.log_ratios(i, count, c);
      for (int j = 0; j < count; ++j) {
        if (c.keep[j] && c.d_inside[j]) {
          s.dlogprob[i + j] = static_cast<A>(static_cast<double>(s.dlogprob[i + j]) + share);
        }
      }
    });
  }
}

}  // namespace

void policy_loss(const PolicyLossArgs& args, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    if (args.dtype == DType::f64) one_sequence<double>(args, n);
    else one_sequence<float>(args, n);
  }
}

}  // namespace grpo_engine::GE_ISA
