// row_stats.h -- max, sum of exp and centred weighted sum of one row of logits, in one pass.
//
//   z_i = x_i / temperature
//   M = max z,  S = sum exp(z_i - M),  W = sum (z_i - M) exp(z_i - M)
//   log-prob of i = (z_i - M) - log S,      entropy = log S - W / S
//
// A row is read in blocks of kRowBlock logits: float32 inside a block, float64 across blocks, in order. sample_token,
// gather_logprob and token_logprob all reduce a row by the functions of this header. So the log-prob of a sampled token has
// the same bits in all three. A NaN or +inf anywhere in the row makes S NaN. -inf entries count as probability 0.
//
// Where z leaves float32, the logits of a block are subtracted before they are scaled, and z is a float64. Other rows keep
// their bits. Such a z lies so far from the next logit's that only equals of the largest share in the mass.
#pragma once
#include "core/simd.h"

namespace grpo_engine::GE_ISA {
namespace {

constexpr int64_t kRowBlock = 512;

template <typename T>
struct BlockStatsOf {
  T max, sum, weighted;  // of x; the sums of exp(z - the largest z)
};
using BlockStats = BlockStatsOf<float>;

constexpr double kFloatMax = 3.40282346638528859812e38;

// 1 / temperature, finite: below 2^-128 a temperature counts as that.
GE_INLINE float finite_inverse(float temperature) {
  const float inverse = 1.f / temperature;
  return inverse > static_cast<float>(kFloatMax) ? static_cast<float>(kFloatMax) : inverse;
}

// z of a logit: rounded to float32 as the kernels round it, or the exact product where float32 overflows.
GE_INLINE double scaled(float x, float inv_temperature) {
  const double exact = static_cast<double>(x) * static_cast<double>(inv_temperature);
  const float z = x * inv_temperature;
  return z == z && (z > kFloatMax || z < -kFloatMax) ? exact : static_cast<double>(z);
}
GE_INLINE double scaled(double x, double inv_temperature) { return x * inv_temperature; }

// Of a block whose largest z overflows.
template <typename S>
BlockStats wide_block(const S* x, int64_t n, float inv_temperature, float largest) {
  double sum = 0.0, weighted = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    const double d = (static_cast<double>(to_arith(x[i])) - largest) * inv_temperature, e = ::exp(d);
    sum += e;
    weighted += e == 0.0 ? 0.0 : d * e;
  }
  return {largest, static_cast<float>(sum), static_cast<float>(weighted)};
}

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
  const float largest = max_lane(vmax(vmax(m[0], m[1]), vmax(m[2], m[3]))), block_max = largest * inv_temperature;
  const auto finite = [](float f) { return f - f == 0.f; };
  if (!finite(block_max) && finite(largest)) return wide_block(x, n, inv_temperature, largest);
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
  return {largest, sum((s[0] + s[1]) + (s[2] + s[3])), sum((w[0] + w[1]) + (w[2] + w[3]))};
}

struct RowStats {
  double max = -__builtin_inf(), sum = 0.0, weighted = 0.0;

  // Blocks must come in order of their position in the row.
  template <typename T>
  GE_MEMBER void add(BlockStatsOf<T> b, T inv_temperature) {
    const double b_max = scaled(b.max, inv_temperature);
    if (b_max > max) {
      const double shift = max - b_max;  // -inf at the first block with a finite logit
      const double scale = ::exp(shift);
      weighted = scale == 0.0 ? 0.0 : scale * (weighted + shift * sum);
      sum = sum * scale + b.sum;
      weighted += b.weighted;
      max = b_max;
    } else {
      const double shift = b_max == max ? 0.0 : b_max - max;
      const double scale = ::exp(shift);
      sum += scale * b.sum;
      if (scale != 0.0) weighted += scale * (b.weighted + shift * b.sum);
    }
  }

  // z = scaled(logit, inv_temperature)
  GE_MEMBER double logprob(double z) const { return (z - max) - ::log(sum); }
  GE_MEMBER double entropy() const {
    const double h = ::log(sum) - weighted / sum;
    return h < 0.0 ? 0.0 : h;  // a one-hot row rounds to -1e-17 otherwise; NaN stays NaN
  }
};

// Whether the gradient of a row's logits needs float64: z, or what scales a gradient, leaves float32.
GE_INLINE bool leaves_float(double max, float inv_temperature) {
  return max > kFloatMax || max < -kFloatMax || inv_temperature > 1e30f;
}
GE_INLINE bool leaves_float(double, double) { return false; }

// The gradient of n logits of such a row, from the max, log of the sum and entropy that the forward pass saved; out may be
// x. target: the column of the row's target, or one outside [0, n).
template <typename S, typename A>
void wide_gradient(const S* x, int64_t n, int64_t target, A inv_temperature, const double* saved, A g_logprob, A g_entropy,
                   S* out) {
  const double scale = inv_temperature, g = g_logprob, h = g_entropy;
  for (int64_t v = 0; v < n; ++v) {
    const double log_p = scaled(to_arith(x[v]), inv_temperature) - saved[0] - saved[1], p = ::exp(log_p);
    const double by_logprob = v == target ? g * (1.0 - p) : -g * p;
    from_arith(static_cast<A>((by_logprob - (p > 0.0 ? h * p * (log_p + saved[2]) : 0.0)) * scale), out + v);
  }
}

template <typename S>
GE_INLINE RowStats row_stats(const S* x, int64_t n, float inv_temperature) {
  RowStats r;
  for (int64_t i = 0; i < n; i += kRowBlock) {
    r.add(block_stats(x + i, n - i < kRowBlock ? n - i : kRowBlock, inv_temperature), inv_temperature);
  }
  return r;
}

}  // namespace
}  // namespace grpo_engine::GE_ISA
