#include "ops/ragged_attention.h"

#include "core/attention.h"

namespace grpo_engine::GE_ISA {
namespace {

// Rows [16 begin, 16 end) of [num_rows, E], transposed into blocks [E][16]; 0 past num_rows.
template <typename S>
void pack_blocks(const S* rows, int64_t stride, int64_t num_rows, int64_t E, int64_t begin,
                 int64_t end, S* packed) {
  for (int64_t b = begin; b < end; ++b) {
    S* block = packed + b * E * kLanes;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t r = b * kLanes + lane;
      const S* row = rows + r * stride;
      if (r < num_rows) {
        for (int64_t e = 0; e < E; ++e) block[e * kLanes + lane] = row[e];
      } else {
        for (int64_t e = 0; e < E; ++e) block[e * kLanes + lane] = S{};
      }
    }
  }
}

template <typename S>
void forward(const RaggedAttentionArgs& a, int64_t begin, int64_t end) {
  using A = Arith<S>;
  const int64_t E = a.E, group = a.H / a.plan.K, max_blocks = blocks_of(a.max_len);
  Arena arena(2 * Arena::bytes<const S*>(max_blocks) + Arena::bytes<S>(max_blocks * kLanes * E) +
              Attend<S>::bytes(E, a.max_len));
  const S** key = arena.take<const S*>(max_blocks);
  const S** value = arena.take<const S*>(max_blocks);
  S* packed = arena.take<S>(max_blocks * kLanes * E);
  const Attend<S> attend(arena, E, a.max_len);
  for (int64_t b = 0; b < max_blocks; ++b) key[b] = packed + b * kLanes * E;

  int64_t sequence = -1, kv_head = -1, num_packed = 0;
  for (int64_t i = begin; i < end; ++i) {
    const AttentionItem item = find_item(a.plan, i);
    const int64_t start = a.plan.cu[item.sequence];
    const int64_t S_n = a.plan.cu[item.sequence + 1] - start;
    if (item.sequence != sequence || item.kv_head != kv_head) {
      sequence = item.sequence;
      kv_head = item.kv_head;
      num_packed = 0;
      const S* rows = static_cast<const S*>(a.value) + start * a.value_stride + kv_head * E;
      for (int64_t b = 0; b < blocks_of(S_n); ++b) value[b] = rows + b * kLanes * a.value_stride;
    }
    const int64_t blocks = blocks_of(item.first_token + item.num_tokens);
    if (blocks > num_packed) {  // chunks of one sequence share what is packed
      pack_blocks(static_cast<const S*>(a.key) + start * a.key_stride + kv_head * E, a.key_stride,
                  S_n, E, num_packed, blocks, packed);
      num_packed = blocks;
    }
    const int64_t first = start + item.first_token;
    QueryRows<S> rows{};
    rows.query = static_cast<const S*>(a.query) + first * a.query_stride + kv_head * group * E;
    rows.out = static_cast<S*>(a.out) + (first * a.H + kv_head * group) * E;
    rows.stats = static_cast<A*>(a.stats) + (first * a.H + kv_head * group) * 2;
    rows.query_stride = a.query_stride;
    rows.out_stride = a.H * E;
    rows.stats_stride = a.H * 2;
    rows.num_tokens = item.num_tokens;
    rows.group = group;
    rows.E = E;
    rows.first_visible = item.first_token + 1;
    attend(rows, KeyBlocks<S>{key, value, kLanes, a.value_stride}, static_cast<A>(a.scale));
  }
}

// ---------------------------------------------------------------- backward

// Query rows whose p and ds are held before the keys gather from them. Their sum is a chain of its
// own, added to the total once: short chains lose less, and the bits need one size on every CPU.
constexpr int kTile = 32;

// sums[m][16 n + lane] += sum_r weight[r][m] * rows[r][16 n + lane] for M keys.
template <typename A, int M, int N>
GE_INLINE void gather_columns(const A* weight, int64_t weight_stride, const A* rows,
                              int64_t row_stride, int count, A* sums) {
  using V = Vec16<A>;
  V acc[M][N];
#pragma GCC unroll 16
  for (int i = 0; i < M * N; ++i) acc[i / N][i % N] = V::zero();
  for (int r = 0; r < count; ++r) {
    V v[N];
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) v[n] = V::load(rows + r * row_stride + n * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const V x = V::set1(weight[r * weight_stride + m]);
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) acc[m][n] = fma(x, v[n], acc[m][n]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      A* total = sums + m * row_stride + n * kLanes;
      (V::load(total) + acc[m][n]).store(total);
    }
  }
}

template <typename A, int M>
GE_NOINLINE void gather(const A* weight, int64_t weight_stride, const A* rows, int64_t row_stride,
                      int count, A* sums) {
  int64_t column = 0;
  for (; column + kWide * kLanes <= row_stride; column += kWide * kLanes) {
    gather_columns<A, M, kWide>(weight, weight_stride, rows + column, row_stride, count,
                                sums + column);
  }
  for (; column < row_stride; column += kLanes) {
    gather_columns<A, M, 1>(weight, weight_stride, rows + column, row_stride, count, sums + column);
  }
}

// One (sequence, kv head).
template <typename S>
struct Backward {
  using A = Arith<S>;
  using V = Vec16<A>;
  const RaggedAttentionArgs& a;
  int64_t E, padded, group, s_stride;  // padded: E rounded up to whole vectors
  const S **key, **key_row, **value;   // [blocks] -> [E][16], [16][E], [E][16]
  S *packed_key, *packed_value;
  A *q, *dout_t;                       // [E][kRows]
  A *p, *ds;                           // [kTile][s_stride]
  A *query_rows, *dout_rows;           // [kTile][padded], 0 past E
  A *dkey, *dvalue;                    // [max_len rounded up][padded]

  static int64_t bytes(const RaggedAttentionArgs& a) {
    const int64_t blocks = blocks_of(a.max_len), padded = blocks_of(a.E) * kLanes;
    return 3 * Arena::bytes<const S*>(blocks) + 2 * Arena::bytes<S>(blocks * kLanes * a.E) +
           2 * Arena::bytes<A>(a.E * kRows<A>) + 2 * Arena::bytes<A>(kTile * blocks * kLanes) +
           2 * Arena::bytes<A>(kTile * padded) + 2 * Arena::bytes<A>(blocks * kLanes * padded);
  }

  Backward(const RaggedAttentionArgs& args, Arena& arena) : a(args), E(args.E) {
    const int64_t blocks = blocks_of(a.max_len);
    padded = blocks_of(E) * kLanes;
    group = a.H / a.plan.K;
    s_stride = blocks * kLanes;
    key = arena.take<const S*>(blocks);
    key_row = arena.take<const S*>(blocks);
    value = arena.take<const S*>(blocks);
    packed_key = arena.take<S>(s_stride * E);
    packed_value = arena.take<S>(s_stride * E);
    q = arena.take<A>(E * kRows<A>);
    dout_t = arena.take<A>(E * kRows<A>);
    p = arena.take<A>(kTile * s_stride);
    ds = arena.take<A>(kTile * s_stride);
    query_rows = arena.take<A>(kTile * padded);
    dout_rows = arena.take<A>(kTile * padded);
    dkey = arena.take<A>(s_stride * padded);
    dvalue = arena.take<A>(s_stride * padded);
    for (int64_t b = 0; b < blocks; ++b) {
      key[b] = packed_key + b * kLanes * E;
      value[b] = packed_value + b * kLanes * E;
    }
  }

  void operator()(int64_t sequence, int64_t kv_head) {
    const int64_t start = a.plan.cu[sequence], S_n = a.plan.cu[sequence + 1] - start;
    if (S_n == 0) return;
    const int64_t blocks = blocks_of(S_n);
    const S* keys = static_cast<const S*>(a.key) + start * a.key_stride + kv_head * E;
    const S* values = static_cast<const S*>(a.value) + start * a.value_stride + kv_head * E;
    pack_blocks(keys, a.key_stride, S_n, E, 0, blocks, packed_key);
    pack_blocks(values, a.value_stride, S_n, E, 0, blocks, packed_value);
    for (int64_t b = 0; b < blocks; ++b) key_row[b] = keys + b * kLanes * a.key_stride;
    memset(dkey, 0, blocks * kLanes * padded * sizeof(A));
    memset(dvalue, 0, blocks * kLanes * padded * sizeof(A));

    RowPlace place;
    for (int64_t left = S_n * group; left > 0;) {
      const int count = left < kTile ? static_cast<int>(left) : kTile;
      left -= count;
      RowPlace last = place;
      last.advance(count - 1, group);
      const int64_t seen = last.token + 1;  // keys that the last row sees
      const RowPlace first = place;
      for (int done = 0; done < count;) {
        const int m = tile_rows<A>(count - done);
        with_rows<kRows<A>>(m, [&](auto rows) {
          differentiate<decltype(rows)::value>(start, kv_head, place, done, seen);
        });
        place.advance(m, group);
        done += m;
      }
      for (int64_t j = 0; j < seen; j += kRows<A>) {
        // the first row of the tile that sees key j
        const int64_t before = (j - first.token) * group - first.head;
        const int skip = before > 0 ? static_cast<int>(before) : 0;
        const int m = seen - j < kRows<A> ? static_cast<int>(seen - j) : kRows<A>;
        with_rows<kRows<A>>(m, [&](auto rows) {
          constexpr int M = decltype(rows)::value;
          gather<A, M>(ds + skip * s_stride + j, s_stride, query_rows + skip * padded, padded,
                       count - skip, dkey + j * padded);
          gather<A, M>(p + skip * s_stride + j, s_stride, dout_rows + skip * padded, padded,
                       count - skip, dvalue + j * padded);
        });
      }
    }
    for (int64_t j = 0; j < S_n; ++j) {
      const int64_t at = ((start + j) * a.plan.K + kv_head) * E;
      each_vector(E, [&](int64_t e, int n) {
        store(V::load(dkey + j * padded + e), static_cast<S*>(a.dkey) + at + e, n);
        store(V::load(dvalue + j * padded + e), static_cast<S*>(a.dvalue) + at + e, n);
      });
    }
  }

  // p and ds of the M rows from `first` on, which become rows [slot, slot + M) of the tile, and
  // their dquery. Columns up to the block of key seen - 1 are written.
  template <int M>
  __attribute__((noinline)) void differentiate(int64_t start, int64_t kv_head, RowPlace first,
                                               int slot, int64_t seen) {
    RowPlace place[M];
    int64_t visible[M];
    A centre[M];
    place_rows(first, group, 1, place, visible);
    const S* query = static_cast<const S*>(a.query) + start * a.query_stride + kv_head * group * E;
    const int64_t rows = (start * a.H + kv_head * group) * E, stride = a.H * E;
    const S* dout = static_cast<const S*>(a.dout) + rows;
    for (int m = 0; m < M; ++m) {
      const S* g_row = dout + place[m].token * stride + place[m].head * E;
      const S* q_row = query + place[m].token * a.query_stride + place[m].head * E;
      const S* out = static_cast<const S*>(a.out) + rows + (g_row - dout);
      V dots = V::zero();
      each_vector(E, [&](int64_t e, int n) {
        const V g = load<V>(g_row + e, n);
        dots = fma(g, load<V>(out + e, n), dots);
        g.store(dout_rows + (slot + m) * padded + e);
        load<V>(q_row + e, n).store(query_rows + (slot + m) * padded + e);
      });
      centre[m] = sum(dots);
    }
    load_rows(query, a.query_stride, E, place, q);
    load_rows(dout, stride, E, place, dout_t);
    const int64_t blocks = blocks_of(visible[M - 1]);
    const A scale = static_cast<A>(a.scale);
    score_rows<S, M>(q, key, kLanes, E, scale, blocks, p + slot * s_stride, s_stride);
    score_rows<S, M>(dout_t, value, kLanes, E, A(1), blocks, ds + slot * s_stride, s_stride);
    for (int m = 0; m < M; ++m) {
      const A* stats = static_cast<const A*>(a.stats) +
                       ((start + place[m].token) * a.H + kv_head * group + place[m].head) * 2;
      const V max = V::set1(stats[0]), inverse = V::set1(stats[1]);
      const V mean = V::set1(centre[m]), factor = V::set1(scale);
      A* p_row = p + (slot + m) * s_stride;
      A* ds_row = ds + (slot + m) * s_stride;
      for (int64_t j = 0; j < seen; j += kLanes) {
        const int64_t left = visible[m] - j;
        const int n = left >= kLanes ? kLanes : left > 0 ? static_cast<int>(left) : 0;
        const V weight = vexp(V::load(p_row + j) - max) * inverse;
        const V slope = weight * (V::load(ds_row + j) - mean) * factor;
        keep_first(weight, n, A(0)).store(p_row + j);
        keep_first(slope, n, A(0)).store(ds_row + j);
      }
    }
    weigh_rows<S, M>(ds + slot * s_stride, s_stride, key_row, a.key_stride, E, visible,
                     [&](int m, int64_t column, int lanes, V acc) {
                       S* dquery = static_cast<S*>(a.dquery) + rows +
                                   place[m].token * stride + place[m].head * E;
                       store(acc, dquery + column, lanes);
                     });
  }
};

template <typename S>
void backward(const RaggedAttentionArgs& a, int64_t begin, int64_t end) {
  Arena arena(Backward<S>::bytes(a));
  Backward<S> differentiate(a, arena);
  for (int64_t i = begin; i < end; ++i) differentiate(i / a.plan.K, i % a.plan.K);
}

}  // namespace

void ragged_attention_forward(const RaggedAttentionArgs& args, int64_t begin, int64_t end) {
  GE_FOR_DTYPE(forward)
}
void ragged_attention_backward(const RaggedAttentionArgs& args, int64_t begin, int64_t end) {
  GE_FOR_DTYPE(backward)
}

}  // namespace grpo_engine::GE_ISA
