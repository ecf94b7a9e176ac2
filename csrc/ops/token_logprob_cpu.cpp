#include "ops/token_logprob.h"

#include "core/gemm.h"
#include "core/row_stats.h"
#include "core/scratch.h"

namespace grpo_engine::GE_ISA {
namespace {

static_assert(kVocabBlock == kRowBlock, "a tile must be one block of row_stats.h");

GE_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// rows x ids logits in arithmetic type: the bits that linear gives.
template <typename S>
void logits_tile(const TokenLogprobArgs& a, int64_t row, int64_t rows, int64_t id, int64_t ids, Arith<S>* out,
                 int64_t out_row) {
  Gemm<S, S, Arith<S>> g{};
  g.M = rows;
  g.N = ids;
  g.K = a.D;
  g.a = static_cast<const S*>(a.hidden) + row * a.D;
  g.a_row = a.D;
  g.a_col = 1;
  g.b = static_cast<const S*>(a.weight) + id * a.D;
  g.b_row = 1;
  g.b_col = a.D;
  g.c = out;
  g.c_row = out_row;
  run_gemm(g);
}

// 1 / temperature as sample_token divides: in float32 for float32 logits.
template <typename A>
GE_INLINE A inverse(double temperature) {
  if constexpr (sizeof(A) == sizeof(float)) return finite_inverse(static_cast<float>(temperature));
  return static_cast<A>(1.0 / temperature);
}

void block_of(const float* x, int64_t n, float scale, float* out) {
  const BlockStats s = block_stats(x, n, scale);
  out[0] = s.max;
  out[1] = s.sum;
  out[2] = s.weighted;
}

void block_of(const double* x, int64_t n, double scale, double* out) {
  double max = -__builtin_inf(), sum = 0.0, weighted = 0.0;
  for (int64_t i = 0; i < n; ++i) max = x[i] > max ? x[i] : max;
  const double shift = max == -__builtin_inf() ? 0.0 : max * scale;
  for (int64_t i = 0; i < n; ++i) {
    const double d = x[i] * scale - shift, e = ::exp(d);
    sum += e;
    weighted += e == 0.0 ? 0.0 : d * e;
  }
  out[0] = max;
  out[1] = sum;
  out[2] = weighted;
}

template <typename S>
void reduce_blocks(const TokenLogprobArgs& a, int64_t begin, int64_t end) {
  using A = Arith<S>;
  const int64_t waves = (a.T + a.wave - 1) / a.wave;
  const int64_t num_blocks = (a.V + kVocabBlock - 1) / kVocabBlock;
  const A scale = inverse<A>(a.temperature);
  A* tile = thread_scratch<A>(ScratchUse::logits_tile, a.wave * kVocabBlock);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item % waves * a.wave, rows = smaller(a.wave, a.T - row);
    const int64_t block = item / waves, id = block * kVocabBlock;
    const int64_t ids = smaller(kVocabBlock, a.V - id);
    logits_tile<S>(a, row, rows, id, ids, tile, kVocabBlock);
    for (int64_t r = 0; r < rows; ++r) {
      const A* x = tile + r * kVocabBlock;
      const int64_t t = row + r, column = a.target[t] - id;
      block_of(x, ids, scale, static_cast<A*>(a.blocks) + (t * num_blocks + block) * 3);
      if (column >= 0 && column < ids) static_cast<A*>(a.target_logit)[t] = x[column];
    }
  }
}

template <typename S>
void join_blocks(const TokenLogprobArgs& a, int64_t begin, int64_t end) {
  using A = Arith<S>;
  const int64_t num_blocks = (a.V + kVocabBlock - 1) / kVocabBlock;
  const A scale = inverse<A>(a.temperature);
  for (int64_t t = begin; t < end; ++t) {
    const A* blocks = static_cast<const A*>(a.blocks) + t * num_blocks * 3;
    RowStats r;
    for (int64_t b = 0; b < num_blocks; ++b, blocks += 3) {
      r.add(BlockStatsOf<A>{blocks[0], blocks[1], blocks[2]}, scale);
    }
    const double entropy = r.entropy();
    const double z = scaled(static_cast<const A*>(a.target_logit)[t], scale);
    static_cast<A*>(a.logprob)[t] = static_cast<A>(r.logprob(z));
    static_cast<A*>(a.entropy)[t] = static_cast<A>(entropy);
    double* saved = a.saved + t * 3;
    saved[0] = r.max;
    saved[1] = ::log(r.sum);
    saved[2] = entropy;
  }
}

// One row of logits becomes its gradient, in place.
template <typename A>
void gradient_row(A* x, int64_t n, A scale, const double* saved, A g_logprob, A g_entropy) {
  using V = Vec16<A>;
  const V z_scale = V::set1(scale), shift = V::set1(static_cast<A>(saved[0]));
  const V log_sum = V::set1(static_cast<A>(saved[1])), entropy = V::set1(static_cast<A>(saved[2]));
  const V gl = V::set1(-g_logprob * scale), ge = V::set1(-g_entropy * scale);
  const V low = V::set1(A(-1000));  // p = 0 there; keeps 0 * -inf out
  each_vector(n, [&](int64_t v, int count) {
    const V log_p = vmax(low, load<V>(x + v, count) * z_scale - shift - log_sum);
    store(vexp(log_p) * fma(ge, log_p + entropy, gl), x + v, count);
  });
}

template <typename S>
void window_gradient(const TokenLogprobArgs& a, int64_t begin, int64_t end) {
  using A = Arith<S>;
  const int64_t waves = (a.num_rows + a.wave - 1) / a.wave;
  const A scale = inverse<A>(a.temperature);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item % waves * a.wave, rows = smaller(a.wave, a.num_rows - row);
    const int64_t first = item / waves * kVocabBlock, ids = smaller(kVocabBlock, a.num_ids - first);
    A* tile = static_cast<A*>(a.dlogits) + row * a.num_ids + first;
    logits_tile<S>(a, a.first_row + row, rows, a.first_id + first, ids, tile, a.num_ids);
    for (int64_t r = 0; r < rows; ++r) {
      A* x = tile + r * a.num_ids;
      const int64_t t = a.first_row + row + r, column = a.target[t] - a.first_id - first;
      const double* saved = a.saved + t * 3;
      const A g_logprob = static_cast<const A*>(a.g_logprob)[t];
      const A g_entropy = static_cast<const A*>(a.g_entropy)[t];
      if (leaves_float(saved[0], scale)) {
        wide_gradient(x, ids, column, scale, saved, g_logprob, g_entropy, x);
        continue;
      }
      const bool here = column >= 0 && column < ids;
      const double z = here ? static_cast<double>(x[column] * scale) : 0.0;
      gradient_row(x, ids, scale, saved, g_logprob, g_entropy);
      if (here) {  // 1 - p in float64: it is small where training has succeeded
        const double log_p = z - saved[0] - saved[1], p = ::exp(log_p);
        const double g = static_cast<double>(g_logprob) * (1.0 - p) -
                         (p > 0.0 ? static_cast<double>(g_entropy) * p * (log_p + saved[2]) : 0.0);
        x[column] = static_cast<A>(g * static_cast<double>(scale));
      }
    }
  }
}

}  // namespace

void token_logprob_blocks(const TokenLogprobArgs& args, int64_t begin, int64_t end) { GE_FOR_DTYPE(reduce_blocks) }
void token_logprob_join(const TokenLogprobArgs& args, int64_t begin, int64_t end) { GE_FOR_DTYPE(join_blocks) }
void token_logprob_dlogits(const TokenLogprobArgs& args, int64_t begin, int64_t end) { GE_FOR_DTYPE(window_gradient) }

}  // namespace grpo_engine::GE_ISA
