// attention.h -- the row algorithm of attention, the same on every CPU.
//
// For a query row q that sees keys 0 .. L-1 (by position in its sequence, where that of a response
// begins with its prompt):
//
//   s_j = scale * (q . k_j)            chain of fma over e ascending, 16 keys side by side
//   m   = max_j s_j                    p_j = exp(s_j - m)
//   l   = sum_j p_j                    lane-wise by j mod 16, then the tree of sum()
//   o_e = (sum_j p_j v_je) * (1 / l)   chain of fma over j ascending
//
// Each value is a chain that its own row and keys determine. How many rows and columns a loop holds in registers changes no
// bit. Neither do the batch, the page layout, the chunks of a prompt or the number of threads. AVX2, AVX-512 and NEON agree.
// paged_attention and ragged_attention both run Attend, so a token has the same bits in rollout and in training.
//
// A key past L never matters. A select masks its score, and its value row is not read. So an unused slot may hold NaN. A NaN
// in a visible key makes the row NaN.
#pragma once
#include "core/attention_pack.h"
#include "core/attention_plan.h"
#include "core/scratch.h"
#include "core/simd.h"

namespace grpo_engine::GE_ISA {
namespace {

// The matmuls are functions of their own: inlined among other loops, they spill their accumulators.
#define GE_NOINLINE static __attribute__((noinline))

// Rows, and vectors of 16 columns, whose accumulators fit in the registers. Without vector registers one row is as fast as
// many, and takes less code.
template <typename A>
constexpr int kRows = 1;
#if defined(__AVX512F__)
template <>
constexpr int kRows<float> = 8;
constexpr int kWide = 2;
#elif defined(__AVX2__)
template <>
constexpr int kRows<float> = 6;
constexpr int kWide = 1;
#elif defined(GE_NEON)
template <>
constexpr int kRows<float> = 6;  // of the 32 registers 24 hold sums, 4 keys or values
constexpr int kWide = 1;
#else
constexpr int kWide = 1;
#endif

// f(Rows<m>{}) for 1 <= m <= M: the number of rows as a constant.
template <int M>
struct Rows {
  static constexpr int value = M;
};
template <int M, typename F>
GE_INLINE void with_rows(int m, F f) {
  if (m == M) {
    f(Rows<M>{});
  } else if constexpr (M > 1) {
    with_rows<M - 1>(m, f);
  }
}

// Lanes >= n become fill.
template <typename T>
GE_INLINE Vec16<T> keep_first(Vec16<T> v, int n, T fill) {
  for (int i = n; i < kLanes; ++i) v.v[i] = fill;
  return v;
}
#if defined(__AVX512F__)
GE_INLINE VecF keep_first(VecF v, int n, float fill) {
  return {_mm512_mask_mov_ps(_mm512_set1_ps(fill), VecF::first(n), v.v)};
}
#elif defined(__AVX2__)
GE_INLINE VecF keep_first(VecF v, int n, float fill) {
  const __m256i count = _mm256_set1_epi32(n);
  const __m256 f = _mm256_set1_ps(fill);
  const __m256i low = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i high = _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15);
  return {_mm256_blendv_ps(f, v.lo, _mm256_castsi256_ps(_mm256_cmpgt_epi32(count, low))),
          _mm256_blendv_ps(f, v.hi, _mm256_castsi256_ps(_mm256_cmpgt_epi32(count, high)))};
}
#elif defined(GE_NEON)
GE_INLINE VecF keep_first(VecF v, int n, float fill) {
  GE_QUARTERWISE(vbslq_f32(VecF::first(n, i), v.v[i], vdupq_n_f32(fill)));
}
#endif

// a * b + c if `yes`, else c, without a branch: no CPU could predict it.
template <typename T>
GE_INLINE Vec16<T> fma_if(bool yes, Vec16<T> a, Vec16<T> b, Vec16<T> c) {
  return yes ? fma(a, b, c) : c;
}
#if defined(__AVX512F__)
GE_INLINE VecF fma_if(bool yes, VecF a, VecF b, VecF c) {
  return {_mm512_mask3_fmadd_ps(a.v, b.v, c.v, static_cast<__mmask16>(-static_cast<int>(yes)))};
}
#elif defined(__AVX2__)
GE_INLINE VecF fma_if(bool yes, VecF a, VecF b, VecF c) {
  const __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(-static_cast<int>(yes)));
  const VecF sum = fma(a, b, c);
  return {_mm256_blendv_ps(c.lo, sum.lo, mask), _mm256_blendv_ps(c.hi, sum.hi, mask)};
}
#elif defined(GE_NEON)
GE_INLINE VecF fma_if(bool yes, VecF a, VecF b, VecF c) {
  const uint32x4_t mask = vdupq_n_u32(-static_cast<uint32_t>(yes));
  const VecF sum = fma(a, b, c);
  GE_QUARTERWISE(vbslq_f32(mask, sum.v[i], c.v[i]));
}
#endif

// ---------------------------------------------------------------- matmuls

// s[m][16 n + lane] = scale * sum_e q[m][e] * key[n][e][lane] for M rows and N blocks of 16 keys.
template <typename S, int M, int N>
GE_INLINE void score_blocks(const Arith<S>* const* q, const S* const* key, int64_t key_stride, int64_t E, Arith<S> scale,
                            Arith<S>* s, int64_t s_stride) {
  using V = Vec16<Arith<S>>;
  V acc[M][N];
#pragma GCC unroll 16
  for (int i = 0; i < M * N; ++i) acc[i / N][i % N] = V::zero();
  const Arith<S>* row[M];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) row[m] = q[m];
  const S* block[N];
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n) block[n] = key[n];
  for (int64_t e = 0; e < E; ++e) {
    V k[N];
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) k[n] = V::load(block[n] + e * key_stride);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const V x = V::set1(row[m][e]);
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) acc[m][n] = fma(x, k[n], acc[m][n]);
    }
  }
  const V factor = V::set1(scale);
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) (acc[m][n] * factor).store(s + m * s_stride + n * kLanes);
  }
}

// The same for any number of blocks.
template <typename S, int M>
GE_NOINLINE void score_rows(const Arith<S>* const* q, const S* const* key, int64_t key_stride, int64_t E, Arith<S> scale,
                            int64_t blocks, Arith<S>* s, int64_t s_stride) {
  int64_t b = 0;
  for (; b + kWide <= blocks; b += kWide) {
    score_blocks<S, M, kWide>(q, key + b, key_stride, E, scale, s + b * kLanes, s_stride);
  }
  for (; b < blocks; ++b) {
    score_blocks<S, M, 1>(q, key + b, key_stride, E, scale, s + b * kLanes, s_stride);
  }
}

// sums[m][16 n + lane] = sum_{j < visible[m]} p[m][j] * value_j[16 n + lane]. visible never falls.
// value[b] points at the first of 16 rows; `lanes` of the last vector exist (16 unless N is 1).
template <typename S, int M, int N>
GE_NOINLINE void weigh(const Arith<S>* p, int64_t p_stride, const S* const* value, int64_t value_stride, int64_t column,
                       int lanes, const int64_t* visible, Arith<S>* sums) {
  using V = Vec16<Arith<S>>;
  V acc[M][N];
#pragma GCC unroll 16
  for (int i = 0; i < M * N; ++i) acc[i / N][i % N] = V::zero();
  const int64_t all = visible[0];
  for (int64_t b = 0; b * kLanes < all; ++b) {
    const S* row = value[b] + column;
    const Arith<S>* weight = p + b * kLanes;
    const int64_t left = all - b * kLanes;
    const int count = left < kLanes ? static_cast<int>(left) : kLanes;
    for (int j = 0; j < count; ++j, row += value_stride) {
      V v[N];
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) v[n] = load<V>(row + n * kLanes, N == 1 ? lanes : kLanes);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const V x = V::set1(weight[m * p_stride + j]);
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) acc[m][n] = fma(x, v[n], acc[m][n]);
      }
    }
  }
  // keys that only the later rows see: a masked row must not meet the value, which may be NaN
  for (int64_t j = all; j < visible[M - 1]; ++j) {
    const S* row = value[j / kLanes] + j % kLanes * value_stride + column;
    V v[N];
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) v[n] = load<V>(row + n * kLanes, N == 1 ? lanes : kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const V x = V::set1(p[m * p_stride + j]);
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) acc[m][n] = fma_if(j < visible[m], x, v[n], acc[m][n]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) acc[m][n].store(sums + (m * N + n) * kLanes);
  }
}

// Calls write(m, column, lanes, vector) with sum_j p[m][j] * value_j over all E columns.
template <typename S, int M, typename Write>
GE_INLINE void weigh_rows(const Arith<S>* p, int64_t p_stride, const S* const* value, int64_t value_stride, int64_t E,
                          const int64_t* visible, Write write) {
  using V = Vec16<Arith<S>>;
  Arith<S> sums[M * kWide * kLanes];
  int64_t column = 0;
  for (; column + kWide * kLanes <= E; column += kWide * kLanes) {
    weigh<S, M, kWide>(p, p_stride, value, value_stride, column, kLanes, visible, sums);
    for (int m = 0; m < M; ++m) {
      for (int n = 0; n < kWide; ++n) {
        write(m, column + n * kLanes, kLanes, V::load(sums + (m * kWide + n) * kLanes));
      }
    }
  }
  for (; column < E; column += kLanes) {
    const int lanes = E - column < kLanes ? static_cast<int>(E - column) : kLanes;
    weigh<S, M, 1>(p, p_stride, value, value_stride, column, lanes, visible, sums);
    for (int m = 0; m < M; ++m) write(m, column, lanes, V::load(sums + m * kLanes));
  }
}

// ---------------------------------------------------------------- softmax

// How many keys of block b a row sees.
GE_INLINE int visible_lanes(int64_t visible, int64_t b) {
  const int64_t left = visible - b * kLanes;
  return static_cast<int>(left < 0 ? 0 : left > kLanes ? kLanes : left);
}

// Calls f(b, keep) for every block that the last of M rows sees. keep(m, v, fill) masks the keys that row m does not see.
// All rows go through a block together, since their short chains then overlap.
template <int M, typename F>
GE_INLINE void each_block(const int64_t (&visible)[M], F f) {
  const int64_t whole = visible[0] / kLanes, blocks = blocks_of(visible[M - 1]);
  for (int64_t b = 0; b < whole; ++b) f(b, [](int, auto v, auto) GE_LAMBDA { return v; });
  for (int64_t b = whole; b < blocks; ++b) {
    f(b, [&](int m, auto v, auto fill) GE_LAMBDA { return keep_first(v, visible_lanes(visible[m], b), fill); });
  }
}

// In place: s_j -> exp(s_j - max) where row m sees key j, 0 in the rest of the last block of all.
template <typename A, int M>
GE_NOINLINE void softmax_rows(A* s, int64_t s_stride, const int64_t (&visible)[M], A (&max)[M], A (&inverse)[M]) {
  using V = Vec16<A>;
  const A neg_inf = static_cast<A>(-__builtin_inf());
  V top[M], total[M];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) top[m] = V::set1(neg_inf);
  each_block(visible, [&](int64_t b, auto keep) GE_LAMBDA {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      top[m] = vmax(top[m], keep(m, V::load(s + m * s_stride + b * kLanes), neg_inf));
    }
  });
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) max[m] = max_lane(top[m]);
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) total[m] = V::zero();
  each_block(visible, [&](int64_t b, auto keep) GE_LAMBDA {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      A* score = s + m * s_stride + b * kLanes;
      const V p = keep(m, vexp(V::load(score) - V::set1(max[m])), A(0));
      p.store(score);
      total[m] = total[m] + p;
    }
  });
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) inverse[m] = sum(total[m]);
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) inverse[m] = A(1) / inverse[m];
}

// ---------------------------------------------------------------- rows of one (sequence, kv head)

// The addresses of the keys and values of one sequence and kv head, in blocks of 16 by position. Packed keys have arithmetic
// type, those of pages the type of the cache.
template <typename S, typename KeyS>
struct KeyBlocks {
  const KeyS* const* key;  // [blocks] -> [E][16], rows key_stride apart
  const S* const* value;  // [blocks] -> [16][E], rows value_stride apart
  int64_t key_stride, value_stride;
};

// The query rows of num_tokens tokens and the `group` heads that share a kv head, token-major.
template <typename S>
struct QueryRows {
  const S* query;  // first row of the first token
  S* out;
  Arith<S>* stats;  // (max, 1 / sum) of each row; null when not wanted
  int64_t query_stride, out_stride, stats_stride;  // from token to token
  int64_t num_tokens, group, E;
  int64_t first_visible;  // how many keys the first token sees; the next sees one more
};

// A row of a group, counted without divisions, which would cost as much as a short row.
struct RowIndex {
  int64_t token = 0, head = 0;

  GE_MEMBER void advance(int64_t rows, int64_t group) {
    for (head += rows; head >= group; head -= group) ++token;
  }
};

// The M rows from `first` on, and how many keys each sees. There is no branch: a predictor would have to learn which rows
// start the next token.
template <int M>
GE_INLINE void index_rows(RowIndex first, int64_t group, int64_t first_visible, RowIndex (&index)[M],
                          int64_t (&visible)[M]) {
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    index[m] = first;
    visible[m] = first_visible + first.token;
    const int64_t next = first.head + 1 == group;
    first.token += next;
    first.head = next ? 0 : first.head + 1;
  }
}

// q[m] = the row of index[m] in arithmetic type, copied to `buffer` [M][E] where it has another.
template <typename A, int M>
GE_INLINE void find_rows(const A* rows, int64_t stride, int64_t E, const RowIndex (&index)[M], A*, const A* (&q)[M]) {
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) q[m] = rows + index[m].token * stride + index[m].head * E;
}
template <int M>
GE_INLINE void find_rows(const bfloat16* rows, int64_t stride, int64_t E, const RowIndex (&index)[M], float* buffer,
                         const float* (&q)[M]) {
  for (int m = 0; m < M; ++m) {
    const bfloat16* row = rows + index[m].token * stride + index[m].head * E;
    each_vector(E, [&](int64_t e, int n) { store(load<VecF>(row + e, n), buffer + m * E + e, n); });
    q[m] = buffer + m * E;
  }
}

// The next tile takes 1/tiles of what is left, so that no tile is much thinner than the others.
template <typename A>
GE_INLINE int tile_rows(int64_t left) {
  const int64_t tiles = (left + kRows<A> - 1) / kRows<A>;
  return static_cast<int>((left + tiles - 1) / tiles);
}

template <typename S, typename KeyS, int M>
GE_NOINLINE void attend_tile(const QueryRows<S>& rows, const KeyBlocks<S, KeyS>& keys, Arith<S> scale, RowIndex first,
                             Arith<S>* buffer, Arith<S>* s, int64_t s_stride) {
  using A = Arith<S>;
  RowIndex index[M];
  int64_t visible[M];
  A max[M], inverse[M];
  index_rows(first, rows.group, rows.first_visible, index, visible);
  const A* q[M];
  find_rows(rows.query, rows.query_stride, rows.E, index, buffer, q);
  score_rows<KeyS, M>(q, keys.key, keys.key_stride, rows.E, scale, blocks_of(visible[M - 1]), s, s_stride);
  softmax_rows(s, s_stride, visible, max, inverse);
  if (rows.stats) {
    for (int m = 0; m < M; ++m) {
      A* stats = rows.stats + index[m].token * rows.stats_stride + index[m].head * 2;
      stats[0] = max[m];
      stats[1] = inverse[m];
    }
  }
  weigh_rows<S, M>(s, s_stride, keys.value, keys.value_stride, rows.E, visible,
                   [&](int m, int64_t column, int lanes, Vec16<A> acc) {
                     S* out = rows.out + index[m].token * rows.out_stride + index[m].head * rows.E;
                     store(acc * Vec16<A>::set1(inverse[m]), out + column, lanes);
                   });
}

// The loop over tiles of one chunk, with its memory.
template <typename S, typename KeyS>
class Attend {
 public:
  using A = Arith<S>;

  static int64_t bytes(int64_t E, int64_t max_visible) {
    return Arena::bytes<A>(kRows<A> * E) + Arena::bytes<A>(kRows<A> * stride(max_visible));
  }
  Attend(Arena& arena, int64_t E, int64_t max_visible)
      : buffer_(arena.take<A>(kRows<A> * E)),
        s_(arena.take<A>(kRows<A> * stride(max_visible))),
        s_stride_(stride(max_visible)) {}

  void operator()(const QueryRows<S>& rows, const KeyBlocks<S, KeyS>& keys, A scale) const {
    RowIndex index;
    for (int64_t left = rows.num_tokens * rows.group; left > 0;) {
      const int m = tile_rows<A>(left);
      with_rows<kRows<A>>(m, [&](auto count) {
        attend_tile<S, KeyS, decltype(count)::value>(rows, keys, scale, index, buffer_, s_, s_stride_);
      });
      index.advance(m, rows.group);
      left -= m;
    }
  }

 private:
  // an odd number of vectors: rows a power of two apart would compete for the same cache sets
  static int64_t stride(int64_t max_visible) { return (blocks_of(max_visible) | 1) * kLanes; }

  A* buffer_;  // [kRows][E]
  A* s_;  // [kRows][s_stride]
  int64_t s_stride_;
};

// ---------------------------------------------------------------- work items

// The chunk of query tokens and the kv head of one work item (attention_plan.h).
struct AttentionItem {
  int64_t group, sequence, kv_head;
  int64_t first_token, num_tokens;  // counted from the sequence's first
};

// The i in [low, high) with start(i) <= x < start(i + 1); start never falls.
template <typename Start>
GE_INLINE int64_t find_interval(int64_t low, int64_t high, int64_t x, Start start) {
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (start(middle) <= x ? low : high) = middle;
  }
  return low;
}

GE_INLINE AttentionItem find_item(const AttentionPlan& plan, int64_t item) {
  const int64_t group =
      find_interval(0, plan.M, item, [&](int64_t m) { return plan.first_chunk[first_of_group(plan, m)] * plan.K; });
  const int64_t begin = first_of_group(plan, group), end = first_of_group(plan, group + 1);
  const int64_t first_chunk = plan.first_chunk[begin];
  const int64_t group_chunks = plan.first_chunk[end] - first_chunk;
  const int64_t local = item - first_chunk * plan.K, kv_head = local / group_chunks;
  const int64_t in_order = first_chunk + local - kv_head * group_chunks;
  const int64_t n = find_interval(begin, end, in_order, [&](int64_t i) { return plan.first_chunk[i]; });
  // late chunks see more keys: first, last, second, last but one, ... balances any split in half
  const int64_t turn = in_order - plan.first_chunk[n];
  const int64_t chunks = plan.first_chunk[n + 1] - plan.first_chunk[n];
  const int64_t chunk = turn % 2 ? chunks - 1 - turn / 2 : turn / 2;
  const int64_t tokens = plan.cu[n + 1] - plan.cu[n], first = chunk * kQueryChunk;
  return {group, n, kv_head, first, tokens - first < kQueryChunk ? tokens - first : kQueryChunk};
}

}  // namespace
}  // namespace grpo_engine::GE_ISA
