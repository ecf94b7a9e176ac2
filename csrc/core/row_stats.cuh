// row_stats.cuh -- max, sum of exp and centred weighted sum of a row of logits; core/row_stats.h for a GPU.
//
//   z_i = x_i / temperature
//   M = max z,  S = sum exp(z_i - M),  W = sum (z_i - M) exp(z_i - M)
//   log-prob of i = (z_i - M) - log S,      entropy = log S - W / S
//
// A row is cut into blocks of kRowBlock logits. A kernel of its own reduces them, one a warp, in the arithmetic type of the
// logits. So a single row has work for many multiprocessors. The blocks of a row join in float64 by one tree. All log-prob
// ops use the functions of this header. So the log-prob of a sampled token has the same bits in all of them. The
// bits differ from the CPU's in the last digit. A NaN or +inf anywhere in the row makes S NaN. -inf entries count as
// probability 0. A z that leaves float32 is treated as in core/row_stats.h.
#pragma once
#include "core/cuda_values.cuh"
#include "core/reduce.cuh"

namespace grpo_engine {

inline constexpr int64_t kRowBlock = 512;
inline constexpr int kRowThreads = 512;  // of the block that joins a row

inline constexpr double kFloatMax = 3.40282346638528859812e38;

// As core/row_stats.h has them.
__device__ inline float finite_inverse(float temperature) {
  const float inverse = 1.f / temperature, most = static_cast<float>(kFloatMax);
  return inverse > most ? most : inverse;
}
__device__ inline double scaled(float x, float inv_temperature) {
  const float z = x * inv_temperature;
  return z > kFloatMax || z < -kFloatMax ? static_cast<double>(x) * static_cast<double>(inv_temperature)
                                         : static_cast<double>(z);
}
__device__ inline double scaled(double x, double inv_temperature) { return x * inv_temperature; }

template <typename A>
struct BlockStats {
  A max = -infinity<A>(), sum = 0, weighted = 0;  // of x; the sums of exp(z - the largest z)

  __device__ void write(A* to) const {
    to[0] = max;
    to[1] = sum;
    to[2] = weighted;
  }
  __device__ static BlockStats read(const A* from) { return {from[0], from[1], from[2]}; }
};

// Below it exp is 0. The limit keeps (-inf) * 0 out of the weighted sum.
template <typename A>
inline constexpr A kExpFloor = sizeof(A) == sizeof(double) ? A(-746) : A(-104);

// One warp reduces min(n, kRowBlock) logits from x on, n >= 1. Every lane gets the result.
template <typename S>
__device__ inline BlockStats<Arith<S>> block_stats(const S* x, int64_t n, Arith<S> inv_temperature, bool aligned) {
  using A = Arith<S>;
  constexpr int kPacks = kRowBlock / (kWarpSize * kPack<S>);  // of a lane
  const int lane = threadIdx.x % kWarpSize;
  Pack<S> z[kPacks];
  A max = -infinity<A>();
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const int64_t i = (k * kWarpSize + lane) * kPack<S>;
    z[k] = load_pack(x + i, n - i, aligned, -infinity<A>());
  }
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
#pragma unroll
    for (int i = 0; i < kPack<S>; ++i) max = z[k].v[i] > max ? z[k].v[i] : max;
  }
  BlockStats<A> b;
  b.max = warp_reduce(max, Max{});
  const A z_max = b.max * inv_temperature;  // rounding is monotonic: the largest product is the product of the largest
  const bool overflows = z_max - z_max != A(0) && b.max - b.max == A(0);
  const A before = overflows ? b.max : A(0);
  const A shift = overflows || z_max == -infinity<A>() ? A(0) : z_max;  // a block of nothing must add 0, not NaN
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
#pragma unroll
    for (int i = 0; i < kPack<S>; ++i) {
      const A away = (z[k].v[i] - before) * inv_temperature - shift,
              d = away < kExpFloor<A> ? kExpFloor<A> : away;  // NaN stays
      const A e = exp(d);
      b.sum = b.sum + e;
      b.weighted = fma(d, e, b.weighted);
    }
  }
  b.sum = warp_reduce(b.sum, Add{});
  b.weighted = warp_reduce(b.weighted, Add{});
  return b;
}

struct RowStats {
  double max, sum, weighted;

  // z = scaled(logit, inv_temperature)
  __device__ double logprob(double z) const { return (z - max) - log(sum); }
  __device__ double entropy() const {
    const double h = log(sum) - weighted / sum;
    return h < 0.0 ? 0.0 : h;  // a one-hot row rounds to -1e-17 otherwise; NaN stays NaN
  }
};

// The stats of a row from those of its blocks, one for each of kRowThreads threads; max is the largest z of mine. Threads
// beyond the row's blocks bring BlockStats{}. `before` holds the stats of the blocks before these.
template <typename A>
__device__ inline RowStats join_blocks(const BlockStats<A>& mine, double max, const RowStats& before) {
  RowStats r;
  const double block_max = block_reduce(max, Max{}, -infinity<double>());
  r.max = block_max > before.max ? block_max : before.max;
  // (x - y) where both may be -inf
  const double shift = max == r.max ? 0.0 : max - r.max, scale = exp(shift);
  const double moved = before.max == r.max ? 0.0 : before.max - r.max, keep = exp(moved);
  const double sum = scale == 0.0 ? 0.0 * mine.sum : scale * mine.sum;  // NaN goes through
  const double weighted = scale == 0.0 ? 0.0 : scale * (mine.weighted + shift * mine.sum);
  r.sum = keep * before.sum + block_reduce(sum, Add{}, 0.0);
  r.weighted = (keep == 0.0 ? 0.0 : keep * (before.weighted + moved * before.sum)) + block_reduce(weighted, Add{}, 0.0);
  return r;
}

// The block of a round that this thread of kRowThreads joins. Warp w has w, w + warps, ..., its lane k the k-th of them.
__device__ inline int64_t block_of_thread() {
  return threadIdx.x % kWarpSize * (kRowThreads / kWarpSize) + threadIdx.x / kWarpSize;
}

// The stats of a row from those of its blocks, of(block), by kRowThreads threads in rounds of kRowThreads blocks. Every
// thread gets the result.
template <typename A, typename Of>
__device__ inline RowStats join_row(int64_t num_blocks, A inv_temperature, Of of) {
  RowStats r{-infinity<double>(), 0.0, 0.0};
  for (int64_t first = 0; first < num_blocks; first += kRowThreads) {
    const int64_t block = first + block_of_thread();
    const BlockStats<A> mine = block < num_blocks ? of(block) : BlockStats<A>{};
    r = join_blocks(mine, scaled(mine.max, inv_temperature), r);
  }
  return r;
}

// The results of the log-prob ops for row t, and the numbers saved for its gradient. z is that of RowStats::logprob, NaN for
// no target.
template <typename A>
__device__ inline void write_row(const RowStats& r, double z, int64_t t, void* logprob, void* entropy, double* saved) {
  const double h = r.entropy();
  static_cast<A*>(logprob)[t] = static_cast<A>(r.logprob(z));
  static_cast<A*>(entropy)[t] = static_cast<A>(h);
  saved[t * 3] = r.max;
  saved[t * 3 + 1] = log(r.sum);
  saved[t * 3 + 2] = h;
}

// The gradient of a row's logits, from the max, log of the sum and entropy that the forward pass saved.
template <typename A>
struct LogitGradient {
  double max, log_sum, entropy;
  A g_logprob, g_entropy, scale;

  __device__ LogitGradient(const double* saved, A g_logprob_, A g_entropy_, A scale_)
      : max(saved[0]), log_sum(saved[1]), entropy(saved[2]), g_logprob(g_logprob_), g_entropy(g_entropy_), scale(scale_) {}

  __device__ A operator()(A logit, bool is_target) const {
    if (sizeof(A) == sizeof(float) && (max > kFloatMax || max < -kFloatMax || scale > A(1e30))) {
      const double log_p = scaled(logit, scale) - max - log_sum, p = exp(log_p), g = g_logprob;
      const double by_entropy = p > 0.0 ? static_cast<double>(g_entropy) * p * (log_p + entropy) : 0.0;
      return static_cast<A>(((is_target ? g * (1.0 - p) : -g * p) - by_entropy) * static_cast<double>(scale));
    }
    const A z = logit * scale, all = z - static_cast<A>(max) - static_cast<A>(log_sum);
    const A low = A(-1000), log_p = all < low ? low : all;  // p = 0 there; keeps 0 * -inf out; NaN stays
    if (!is_target) return exp(log_p) * fma(-g_entropy * scale, log_p + static_cast<A>(entropy), -g_logprob * scale);
    // in full precision before the one rounding of the store; z is rounded as in the forward pass, or p could exceed 1
    const double exact = static_cast<double>(z) - max - log_sum, p = exp(exact);
    return static_cast<A>((static_cast<double>(g_logprob) * (1.0 - p) -
                           (p > 0.0 ? static_cast<double>(g_entropy) * p * (exact + entropy) : 0.0)) *
                          static_cast<double>(scale));
  }
};

}  // namespace grpo_engine
