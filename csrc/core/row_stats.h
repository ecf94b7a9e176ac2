// row_stats.h -- max, sum of exp and centred weighted sum of one row of logits, in one pass.
//
//   z_i = x_i / temperature
//   M = max z,  S = sum exp(z_i - M),  W = sum (z_i - M) exp(z_i - M)
//   log-prob of i = (z_i - M) - log S,      entropy = log S - W / S
//
// A row is read in blocks of kRowBlock logits: float32 inside a block, float64 across blocks, in order. sample_token,
// gather_logprob and token_logprob all reduce a row by the functions of this header. So the log-prob of a sampled token has
// the same bits in all three. A NaN or +inf anywhere in the row makes S NaN. -inf entries count as probability 0.
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

// A block of n logits (1 <= n <= kRowBlock) of S = float or bfloat16. Lanes past n count as -inf.
template <typename S>
GE_INLINE BlockStats block_stats(const S* x, int64_t n, float inv_temperature) {
  const VecF scale = VecF::set1(inv_temperature);
  const float neg_inf = -__builtin_inff();
  // four chains each: a single chain would wait for its own additions
  VecF m[4], s[4], w[4];
  for (int k = 0; k < 4; ++k) {
    m[k] = VecF::set1(neg_inf);
    s[k] = w[k] = VecF::zero();
  }
  each_four_vectors(n, [&]<int N>(int64_t i, int count) {
    for (int k = 0; k < N; ++k) m[k] = vmax(m[k], load<VecF>(x + i + k * kLanes, count, neg_inf));
  });
  // rounding is monotonic: the largest product is the product of the largest
  const float block_max = max_lane(vmax(vmax(m[0], m[1]), vmax(m[2], m[3]))) * inv_temperature;
  // an all -inf block must add 0, not NaN: shift it by 0
  const VecF shift = VecF::set1(block_max == neg_inf ? 0.f : block_max);
  // exp(-104) is 0 in float32; the clamp keeps (-inf) * 0 out of the weighted sum
  const VecF low = VecF::set1(-104.f);
  each_four_vectors(n, [&]<int N>(int64_t i, int count) {
    VecF d[N], e[N];
    for (int k = 0; k < N; ++k) {
      const VecF z = load<VecF>(x + i + k * kLanes, count, neg_inf) * scale;
      e[k] = d[k] = vmax(low, z - shift);
    }
    exp_in_range(e);
    for (int k = 0; k < N; ++k) {
      s[k] = s[k] + e[k];
      w[k] = fma(d[k], e[k], w[k]);
    }
  });
  return {block_max, sum((s[0] + s[1]) + (s[2] + s[3])), sum((w[0] + w[1]) + (w[2] + w[3]))};
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
