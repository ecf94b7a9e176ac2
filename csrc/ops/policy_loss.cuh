// Token arithmetic of policy_loss, for one token or a vector of them: T is a number or a Vec16.
#pragma once
#include "core/dtype.h"
#include "ops/policy_loss.h"

namespace grpo_engine {

inline constexpr double kLogRatioLimit = 20.0;

// The three functions below are those that core/simd.h has for a Vec16. x where a < b, else y; y where a or b is NaN.
template <typename A>
GE_HOST_DEVICE inline A where_less(A a, A b, A x, A y) {
  return a < b ? x : y;
}
// The second argument when either is NaN.
template <typename A>
GE_HOST_DEVICE inline A vmax(A a, A b) {
  return a > b ? a : b;
}
template <typename A>
GE_HOST_DEVICE inline A vmin(A a, A b) {
  return a < b ? a : b;
}

template <typename T>
struct PolicyConstants {
  T zero, one;
  T floor, ceiling;  // 1 - clip_low, 1 + clip_high
  T dual_clip;
  T limit;           // of the log-ratios
};

// A difference of log-probs, clamped to [-limit, limit]. `inside` is 1 where the clamp does not bind, else 0. A NaN counts
// as inside, so it reaches the gradient.
template <typename T>
struct LogRatio {
  T value, inside, size;  // |difference|
};
template <typename T>
GE_HOST_DEVICE inline LogRatio<T> log_ratio(const PolicyConstants<T>& c, T difference) {
  const T size = vmax(c.zero - difference, difference);
  return {vmin(c.limit, vmax(c.zero - c.limit, difference)), where_less(c.limit, size, c.zero, c.one), size};
}

template <typename T>
struct PolicyTerm {
  T value;            // f, the loss of the token
  T slope;            // df/dlogprob through this token's own ratio: r df/dr for clip, the weight for cispo
  T low, high, dual;  // 1 where the token is clipped so, else 0
};

// The surrogates are negated, because they are losses here. `inside` is 0 where the limit of the log-ratio binds, else 1.
template <typename T>
GE_HOST_DEVICE inline PolicyTerm<T> policy_term(PolicyObjective objective, const PolicyConstants<T>& c, T advantage, T ratio,
                                                T logprob, T inside) {
  const T zero = c.zero, one = c.one;
  const T clamped = vmin(c.ceiling, vmax(c.floor, ratio));
  const T is_low = where_less(advantage, zero, where_less(ratio, c.floor, one, zero), zero);
  const T is_high = where_less(zero, advantage, where_less(c.ceiling, ratio, one, zero), zero);
  const T minus_advantage = zero - advantage, clipped_surrogate = minus_advantage * clamped;
  if (objective == PolicyObjective::cispo) {
    return {clipped_surrogate * logprob, clipped_surrogate, is_low, is_high, zero};
  }
  const T surrogate = minus_advantage * ratio;
  const T value = vmax(clipped_surrogate, surrogate);  // equal branches: the gradient flows; NaN goes through
  const T slope = where_less(surrogate, clipped_surrogate, zero, surrogate * inside);
  const T dual_clip_bound = minus_advantage * c.dual_clip;
  const T is_dual = where_less(advantage, zero, where_less(dual_clip_bound, value, one, zero), zero);
  return {where_less(zero, is_dual, dual_clip_bound, value), where_less(zero, is_dual, zero, slope), is_low, is_high,
          is_dual};
}

template <typename T>
struct KlTerm {
  T value, slope;  // of the estimate, and its derivative by logprob
};

// e = the log-ratio ref - logprob, exp_e = exp(e).
template <typename T>
GE_HOST_DEVICE inline KlTerm<T> kl_term(PolicyKl kl, const PolicyConstants<T>& c, LogRatio<T> e, T exp_e) {
  const T minus = c.zero - e.value;
  if (kl == PolicyKl::k1) return {minus, e.inside};
  if (kl == PolicyKl::k2) return {e.value * e.value / (c.one + c.one), minus * e.inside};
  return {exp_e - e.value - c.one, (c.one - exp_e) * e.inside};
}

// The estimate times the ratio. `inside` is 0 where the ratio does not move with this token alone. That is so where the
// limit of its log-ratio binds, and for the ratio of a sequence.
template <typename T>
GE_HOST_DEVICE inline KlTerm<T> times_ratio(KlTerm<T> kl, T ratio, T inside) {
  const T value = kl.value * ratio;
  return {value, kl.slope * ratio + value * inside};
}

}  // namespace grpo_engine
