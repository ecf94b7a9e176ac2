#include "ops/policy_loss.h"

#include "core/simd.h"
#include "ops/policy_loss.cuh"

namespace grpo_engine::GE_ISA {
namespace {

// Sixteen running sums in float64, one a lane, joined at the end of a sequence.
struct Sum {
  VecD lanes = VecD::zero();

  template <typename A>
  GE_MEMBER void add(Vec16<A> x) {
    A v[kLanes];
    x.store(v);
    for (int i = 0; i < kLanes; ++i) lanes.v[i] += static_cast<double>(v[i]);
  }
  GE_MEMBER double total() const { return sum(lanes); }
};

// The largest of values >= 0; NaN if one is.
template <typename A>
struct Largest {
  using V = Vec16<A>;
  V most = V::zero(), nans = V::zero();

  GE_MEMBER void add(V x) {
    most = where_less(most, x, x, most);
    const V infinity = V::set1(static_cast<A>(__builtin_inf())), zero = V::zero();
    nans = nans + where_less(x, infinity, zero, where_less(zero, x, zero, V::set1(1)));
  }
  GE_MEMBER double value() const { return sum(nans) > A(0) ? __builtin_nan("") : static_cast<double>(max_lane(most)); }
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
  const bool shared = by_sequence && kObjective == PolicyObjective::clip;
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
  Largest<A> ratio_max, mismatch;
  const V each = V::set1(static_cast<A>(weight)), kl_each = V::set1(static_cast<A>(weight * a.kl_coef));
  each_vector(s.length, [&](int64_t i, int count) {
    const V keep = s.keep(i, count), logprob = s.read(s.logprob, i, count, keep);
    const V difference = s.difference(i, count, keep, logprob);
    const LogRatio<V> d = log_ratio(c, difference);
    const V every = by_sequence ? sequence_ratio : s.old_logprob ? vexp(d.value) : c.one;
    const V ratio = where_less(c.zero, keep, every, c.zero);
    const PolicyTerm<V> term = policy_term(kObjective, c, s.read(s.advantage, i, count, keep), ratio, logprob,
                                           by_sequence ? c.one : d.inside);
    V gradient = V::zero();
    if (shared) slopes.add(term.slope);
    else gradient = each * term.slope;
    if (s.ref_logprob) {
      const LogRatio<V> e = log_ratio(c, s.read(s.ref_logprob, i, count, keep) - logprob);
      const KlTerm<V> t = kl_term(kKl, c, e, kKl == PolicyKl::k3 ? vexp(e.value) : c.one);
      kl.add(t.value);
      // with coefficient 0 it is only measured: a NaN must not reach the loss
      if (a.kl_coef > 0.0) gradient = fma(kl_each, t.slope * keep, gradient);
    }
    store(gradient, s.dlogprob + i, count);
    value.add(term.value);
    ratios.add(ratio);
    ratio_max.add(ratio);
    mismatch.add(vmax(difference, c.zero - difference));
    low = low + term.low;
    high = high + term.high;
    dual = dual + term.dual;
  });
  if (shared) {
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
  stats[kStatRatioMax] = ratio_max.value();
  stats[kStatClipLow] = static_cast<double>(sum(low));
  stats[kStatClipHigh] = static_cast<double>(sum(high));
  stats[kStatDualClip] = static_cast<double>(sum(dual));
  stats[kStatMismatch] = mismatch.value();
}

template <typename A, PolicyObjective kObjective, PolicyKl kKl>
void sequences(const PolicyLossArgs& a, int64_t begin, int64_t end) {
  auto constant = [](double x) { return Vec16<A>::set1(static_cast<A>(x)); };
  const PolicyConstants<Vec16<A>> c{constant(0.0),           constant(1.0),         constant(1.0 - a.clip_low),
                                    constant(1.0 + a.clip_high), constant(a.dual_clip), constant(kLogRatioLimit)};
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
