// Token arithmetic of policy_loss, for the CPU and a CUDA kernel alike.
#pragma once
#include "core/dtype.h"
#include "ops/policy_loss.h"

namespace grpo_engine {

inline constexpr double kLogRatioLimit = 20.0;

template <typename A>
struct PolicyTerm {
  A value;    // f
  A slope;    // df/dlogprob through this token's own ratio: r df/dr for clip, the weight for cispo
  bool low, high, dual;
};

// `slope_of_ratio` is 1, or 0 where the clamp of the log-ratio binds.
template <typename A>
GE_HOST_DEVICE inline PolicyTerm<A> policy_term(PolicyObjective objective, A advantage, A ratio, A logprob,
                                                A clip_low, A clip_high, A dual_clip,
                                                A slope_of_ratio) {
  const A floor = A(1) - clip_low, ceiling = A(1) + clip_high;
  const A clamped = ratio < floor ? floor : (ratio > ceiling ? ceiling : ratio);
  PolicyTerm<A> t{A(0), A(0), advantage < A(0) && ratio < floor, advantage > A(0) && ratio > ceiling,
                  false};
  if (objective == PolicyObjective::cispo) {
    t.value = -advantage * clamped * logprob;
    t.slope = -advantage * clamped;
    return t;
  }
  const A free = -advantage * ratio, held = -advantage * clamped;
  const bool first = !(free < held);  // equal branches: the gradient flows; NaN goes through
  t.value = first ? free : held;
  t.slope = first ? free * slope_of_ratio : A(0);
  if (advantage < A(0) && t.value > -advantage * dual_clip) {
    t.value = -advantage * dual_clip;
    t.slope = A(0);
    t.dual = true;
  }
  return t;
}

// e = ref - logprob (clamped), exp_e = exp(e); `inside`: the clamp does not bind.
template <typename A>
GE_HOST_DEVICE inline void kl_term(PolicyKl kl, A e, A exp_e, bool inside, A* value, A* slope) {
  switch (kl) {
    case PolicyKl::k1: *value = -e; *slope = A(1); break;
    case PolicyKl::k2: *value = e * e / A(2); *slope = -e; break;
    case PolicyKl::k3: *value = exp_e - e - A(1); *slope = A(1) - exp_e; break;
  }
  if (!inside) *slope = A(0);
}

}  // namespace grpo_engine
