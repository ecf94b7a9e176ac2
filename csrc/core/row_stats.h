// row_stats.h -- max, sum of exp and centred weighted sum of one row of logits, in one pass.
//
//   z_i = x_i / temperature
//   M = max z,  S = sum exp(z_i - M),  W = sum (z_i - M) exp(z_i - M)
//   log-prob of i = (z_i - M) - log S,      entropy = log S - W / S
//
// A row is read in blocks of kRowBlock logits: float32 inside a block, float64 across blocks, in
// order. sample_token, gather_logprob and token_logprob all reduce a row by the functions of this
// header, so the log-prob of a sampled token has the same bits in all three.
// A NaN or +inf anywhere in the row makes S NaN; -inf entries count as probability 0.
#pragma once
#include "core/simd.h"

namespace grpo_engine::GE_ISA {
namespace {

constexpr int64_t kRowBlock = 512;

template <typename T>
struct BlockStatsOf {
  T max, sum, weighted;  // relative to the block's own max
};
using BlockStats = BlockStatsOf<float>;

// n logits (1 <= n <= kRowBlock) of S = float or bfloat16, the whole block; lanes past n count as -inf.
template <typename S>
GE_INLINE BlockStats block_stats(const S* x, int64_t n, float inv_temperature) {
  const VecF scale = VecF::set1(inv_temperature);
  const float neg_inf = -__builtin_inff();
  VecF m = VecF::set1(neg_inf);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) m = vmax(m, VecF::load(x + i) * scale);
  const int tail = static_cast<int>(n - i);
  if (tail) m = vmax(m, VecF::load_n(x + i, tail, neg_inf) * scale);
  const float block_max = max_lane(m);
  // an all -inf block must add 0, not NaN: shift it by 0
  const VecF shift = VecF::set1(block_max == neg_inf ? 0.f : block_max);
  // exp is 0 below -87.33; the clamp keeps (-inf) * 0 out of the weighted sum
  const VecF low = VecF::set1(-100.f);
  VecF s = VecF::zero(), w = VecF::zero();
  auto add = [&](VecF v) {
    const VecF d = vmax(low, v * scale - shift), e = vexp(d);
    s = s + e;
    w = fma(d, e, w);
  };
  for (i = 0; i + kLanes <= n; i += kLanes) add(VecF::load(x + i));
  if (tail) add(VecF::load_n(x + i, tail, neg_inf));
  return {block_max, sum(s), sum(w)};
}

struct RowStats {
  double max = -__builtin_inf(), sum = 0.0, weighted = 0.0;

  // Blocks must come in order of their position in the row.
  template <typename T>
  GE_MEMBER void add(BlockStatsOf<T> b) {
    if (b.max > max) {
      const double shift = max - b.max;  // -inf at the first block with a finite logit
      const double scale = ::exp(shift);
      weighted = scale == 0.0 ? 0.0 : scale * (weighted + shift * sum);
      sum = sum * scale + b.sum;
      weighted += b.weighted;
      max = b.max;
    } else {
      const double shift = b.max == max ? 0.0 : b.max - max;
      const double scale = ::exp(shift);
      sum += scale * b.sum;
      if (scale != 0.0) weighted += scale * (b.weighted + shift * b.sum);
    }
  }

  // z = logit * inv_temperature, rounded to the type of the logit as block_stats does.
  GE_MEMBER double logprob(double z) const { return (z - max) - ::log(sum); }
  GE_MEMBER double entropy() const {
    const double h = ::log(sum) - weighted / sum;
    return h < 0.0 ? 0.0 : h;  // a one-hot row rounds to -1e-17 otherwise; NaN stays NaN
  }
};

template <typename S>
GE_INLINE RowStats row_stats(const S* x, int64_t n, float inv_temperature) {
  RowStats r;
  for (int64_t i = 0; i < n; i += kRowBlock) {
    r.add(block_stats(x + i, n - i < kRowBlock ? n - i : kRowBlock, inv_temperature));
  }
  return r;
}

}  // namespace
}  // namespace grpo_engine::GE_ISA
