#include "ops/policy_loss.h"

#include "core/simd.h"
#include "ops/policy_loss.cuh"

namespace grpo_engine::GE_ISA {
namespace {

// Sixteen running sums in float64, one a lane, joined at the end of a sequence. GCC's vectors rather than a
// VecD: with its plain loops the sums would live in memory.
class Sum {
 public:
  template <typename A>
  GE_MEMBER void add(Vec16<A> x) {
    Eight<A> lanes[2];
    x.store(reinterpret_cast<A*>(lanes));
    low_ += __builtin_convertvector(lanes[0], Eight<double>);
    high_ += __builtin_convertvector(lanes[1], Eight<double>);
  }
#if defined(__AVX512F__)
  GE_MEMBER void add(VecF x) {  // GCC 12 would convert four lanes at a time
    low_ += _mm512_cvtps_pd(_mm512_castps512_ps256(x.v));
    high_ += _mm512_cvtps_pd(_mm512_extractf32x8_ps(x.v, 1));
  }
#endif
  GE_MEMBER double total() const {  // the tree of sum()
    const Eight<double> s = low_ + high_;
    const double a = s[0] + s[4], b = s[1] + s[5], c = s[2] + s[6], d = s[3] + s[7];
    return (a + c) + (b + d);
  }

 private:
  template <typename A>
  using Eight __attribute__((vector_size(8 * sizeof(A)))) = A;
  Eight<double> low_ = {}, high_ = {};
};

template <typename A>
struct Sequence {
  using V = Vec16<A>;
  const A *logprob, *old_logprob, *ref_logprob, *advantage;
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

  int64_t kept() const {
    if (!mask) return length;
    int64_t count = 0;
    for (int64_t t = 0; t < length; ++t) count += mask[t];
    return count;
  }
  // 1 at tokens of [i, i + count) that the mask keeps, else 0.
  GE_MEMBER V keep(int64_t i, int count) const {
    if (!mask && count == kLanes) return V::set1(1);
    A k[kLanes] = {};
    for (int j = 0; j < count; ++j) k[j] = !mask || mask[i + j] ? A(1) : A(0);
    return V::load(k);
  }
  // Values of the kept tokens, 0 elsewhere: a masked one may hold anything.
  GE_MEMBER V read(const A* values, int64_t i, int count, V keep) const {
    const V x = load<V>(values + i, count);
    return mask ? where_less(V::zero(), keep, x, V::zero()) : x;
  }
  // logprob - old; 0 where there is no old.
  GE_MEMBER V difference(int64_t i, int count, V keep, V logprobs) const {
    return old_logprob ? logprobs - read(old_logprob, i, count, keep) : V::zero();
  }
};

template <typename A, PolicyObjective kObjective, PolicyKl kKl>
void one_sequence(const PolicyLossArgs& a, const PolicyConstants<Vec16<A>>& c, int64_t n) {
  using V = Vec16<A>;
  const Sequence<A> s(a, n);
  const double kept = static_cast<double>(s.kept()), length = kept > 0.0 ? kept : 1.0;
  const double weight = a.sequence_mean ? a.weight / length : a.weight;
  const bool by_sequence = a.ratio == PolicyRatio::sequence;
  const bool clip_by_sequence = by_sequence && kObjective == PolicyObjective::clip;
  const bool kl_by_sequence = by_sequence && a.kl_ratio && a.kl_coef > 0.0;
  V sequence_ratio = V::zero();
  if (by_sequence) {
    Sum log_ratios;
    each_vector(s.length, [&](int64_t i, int count) {
      const V keep = s.keep(i, count), logprob = s.read(s.logprob, i, count, keep);
      log_ratios.add(log_ratio(c, s.difference(i, count, keep, logprob)).value);
    });
    sequence_ratio = V::set1(static_cast<A>(::exp(log_ratios.total() / length)));
  }

  Sum value, kl, ratios, slopes;
  V low = V::zero(), high = V::zero(), dual = V::zero();  // counts: exact
  V ratio_max = V::zero(), mismatch = V::zero();          // of values >= 0, NaN left out
  const V each = V::set1(static_cast<A>(weight)), kl_each = V::set1(static_cast<A>(weight * a.kl_coef));
  const V kl_coef = V::set1(static_cast<A>(a.kl_coef));
  each_vector(s.length, [&](int64_t i, int count) {
    const V keep = s.keep(i, count), logprob = s.read(s.logprob, i, count, keep);
    const LogRatio<V> d = log_ratio(c, s.difference(i, count, keep, logprob));
    const LogRatio<V> e = log_ratio(c, s.ref_logprob ? s.read(s.ref_logprob, i, count, keep) - logprob : c.zero);
    V exps[2] = {d.value, e.value};
    exp_in_range(exps);  // of 0 it is 1
    const V ratio = where_less(c.zero, keep, by_sequence ? sequence_ratio : exps[0], c.zero);
    const PolicyTerm<V> term =
        policy_term(kObjective, c, s.read(s.advantage, i, count, keep), ratio, logprob, by_sequence ? c.one : d.inside);
    V gradient = V::zero();
    if (clip_by_sequence) slopes.add(term.slope);
    else gradient = each * term.slope;
    if (s.ref_logprob) {
      KlTerm<V> t = kl_term(kKl, c, e, exps[1]);
      if (a.kl_ratio) t = times_ratio(t, ratio, by_sequence ? c.zero : d.inside);
      if (kl_by_sequence) slopes.add(kl_coef * t.value);
      kl.add(t.value);
      // with coefficient 0 it is only measured: a NaN must not reach the loss
      if (a.kl_coef > 0.0) gradient = fma(kl_each, t.slope * keep, gradient);
    }
    store(gradient, s.dlogprob + i, count);
    value.add(term.value);
    ratios.add(ratio);
    ratio_max = vmax(ratio, ratio_max);
    mismatch = vmax(d.size, mismatch);
    low = low + term.low;
    high = high + term.high;
    dual = dual + term.dual;
  });
  if (clip_by_sequence || kl_by_sequence) {
    // d(mean of the log-ratios)/dlogprob_t is 1/length for each kept token whose limit does not bind
    const V share = V::set1(static_cast<A>(weight * slopes.total() / length));
    each_vector(s.length, [&](int64_t i, int count) {
      const V keep = s.keep(i, count), logprob = s.read(s.logprob, i, count, keep);
      const V inside = log_ratio(c, s.difference(i, count, keep, logprob)).inside * keep;
      store(load<V>(s.dlogprob + i, count) + where_less(c.zero, inside, share, c.zero), s.dlogprob + i, count);
    });
  }
  double* stats = a.stats + n * kNumPolicyStats;
  stats[kStatTokens] = kept;
  stats[kStatPolicyLoss] = weight * value.total();
  stats[kStatKl] = kl.total();
  stats[kStatKlLoss] = a.kl_coef > 0.0 ? weight * a.kl_coef * stats[kStatKl] : 0.0;
  stats[kStatRatio] = ratios.total();
  // a difference that is NaN makes its ratio NaN, and nothing else does: a ratio is at most exp(20)
  const bool nan = stats[kStatRatio] != stats[kStatRatio];
  stats[kStatRatioMax] = nan ? __builtin_nan("") : static_cast<double>(max_lane(ratio_max));
  stats[kStatClipLow] = static_cast<double>(sum(low));
  stats[kStatClipHigh] = static_cast<double>(sum(high));
  stats[kStatDualClip] = static_cast<double>(sum(dual));
  stats[kStatMismatch] = nan ? __builtin_nan("") : static_cast<double>(max_lane(mismatch));
}

template <typename A, PolicyObjective kObjective, PolicyKl kKl>
void sequences(const PolicyLossArgs& a, int64_t begin, int64_t end) {
  auto constant = [](double x) { return Vec16<A>::set1(static_cast<A>(x)); };
  const PolicyConstants<Vec16<A>> c{
      constant(0.0),         constant(1.0),           constant(1.0 - a.clip_low), constant(1.0 + a.clip_high),
      constant(a.dual_clip), constant(kLogRatioLimit)};
  for (int64_t n = begin; n < end; ++n) one_sequence<A, kObjective, kKl>(a, c, n);
}

template <typename A, PolicyObjective kObjective>
void sequences(const PolicyLossArgs& a, int64_t begin, int64_t end) {
  switch (a.kl) {
    case PolicyKl::k1: return sequences<A, kObjective, PolicyKl::k1>(a, begin, end);
    case PolicyKl::k2: return sequences<A, kObjective, PolicyKl::k2>(a, begin, end);
    case PolicyKl::k3: return sequences<A, kObjective, PolicyKl::k3>(a, begin, end);
  }
}

template <typename A>
void sequences(const PolicyLossArgs& a, int64_t begin, int64_t end) {
  if (a.objective == PolicyObjective::cispo) return sequences<A, PolicyObjective::cispo>(a, begin, end);
  sequences<A, PolicyObjective::clip>(a, begin, end);
}

}  // namespace

void policy_loss(const PolicyLossArgs& args, int64_t begin, int64_t end) {
  if (args.dtype == DType::f64) return sequences<double>(args, begin, end);
  sequences<float>(args, begin, end);
}

}  // namespace grpo_engine::GE_ISA
