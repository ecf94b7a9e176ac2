#include "ops/ragged_attention.h"

#include "core/attention.h"

namespace grpo_engine::GE_ISA {
namespace {

// The rows of `tensor` [T, K, E] that sequence n sees, where `prompt` is the first of its group.
template <typename S>
SequenceRows<S> sequence_rows(const RaggedAttentionArgs& a, const void* tensor, int64_t stride, int64_t prompt, int64_t n,
                              int64_t kv_head) {
  const S* rows = static_cast<const S*>(tensor) + kv_head * a.E;
  const int32_t* cu = a.plan.cu;
  const int64_t prompt_len = n == prompt ? 0 : cu[prompt + 1] - cu[prompt];
  return {rows + cu[prompt] * stride, rows + cu[n] * stride, prompt_len, prompt_len + cu[n + 1] - cu[n], stride};
}

// Asks for the columns of one kv head in `tokens` rows from token `first` on. Heads lie side by side in a
// row, so these are a few lines each at a stride that the processor does not guess.
template <typename S>
GE_INLINE void prefetch_rows(const void* tensor, int64_t stride, int64_t width, int64_t kv_head, int64_t first,
                             int64_t tokens) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(S));
  const S* row = static_cast<const S*>(tensor) + first * stride + kv_head * width;
  for (int64_t t = 0; t < tokens; ++t, row += stride) {
    for (int64_t e = 0; e < width; e += kLine) __builtin_prefetch(row + e, 0, 2);
  }
}

template <typename S>
GE_INLINE void prefetch_inputs(const RaggedAttentionArgs& a, int64_t kv_head, int64_t first, int64_t tokens) {
  const int64_t group_width = a.H / a.plan.K * a.E;
  prefetch_rows<S>(a.query, a.query_stride, group_width, kv_head, first, tokens);
  prefetch_rows<S>(a.key, a.key_stride, a.E, kv_head, first, tokens);
  prefetch_rows<S>(a.value, a.value_stride, a.E, kv_head, first, tokens);
}

template <typename S>
void forward(const RaggedAttentionArgs& a, int64_t begin, int64_t end) {
  using A = Arith<S>;
  const int64_t E = a.E, group = a.H / a.plan.K, max_blocks = blocks_of(a.plan.max_len);
  Arena arena(Arena::bytes<const A*>(max_blocks) + Arena::bytes<const S*>(max_blocks) +
              Arena::bytes<A>(max_blocks * kLanes * E) + Arena::bytes<S>(kLanes * a.value_stride) +
              Attend<S, A>::bytes(E, a.plan.max_len));
  const A** key = arena.take<const A*>(max_blocks);
  const S** value = arena.take<const S*>(max_blocks);
  A* packed = arena.take<A>(max_blocks * kLanes * E);
  S* seam = arena.take<S>(kLanes * a.value_stride);
  const Attend<S, A> attend(arena, E, a.plan.max_len);
  for (int64_t b = 0; b < max_blocks; ++b) key[b] = packed + b * kLanes * E;

  AttentionItem last{-1, -1, -1, 0, 0};
  SequenceRows<S> keys{}, values{};
  int64_t num_packed = 0;  // blocks, for `last`
  AttentionItem next = find_item(a.plan, begin);
  for (int64_t i = begin; i < end; ++i) {
    const AttentionItem item = next;
    if (i + 1 < end) {
      next = find_item(a.plan, i + 1);
      prefetch_inputs<S>(a, next.kv_head, a.plan.cu[next.sequence] + next.first_token, next.num_tokens);
    }
    const int64_t n = item.sequence, kv_head = item.kv_head;
    if (n != last.sequence || kv_head != last.kv_head) {
      const int64_t prompt = first_of_group(a.plan, item.group);
      keys = sequence_rows<S>(a, a.key, a.key_stride, prompt, n, kv_head);
      values = sequence_rows<S>(a, a.value, a.value_stride, prompt, n, kv_head);
      // of a sibling's blocks those that hold nothing but prompt serve again
      const int64_t whole = keys.prompt_len / kLanes;
      if (item.group != last.group || kv_head != last.kv_head) num_packed = 0;
      if (num_packed > whole) num_packed = whole;
      last = item;
    }
    const int64_t first_visible = keys.prompt_len + item.first_token + 1;
    const int64_t blocks = blocks_of(first_visible + item.num_tokens - 1);
    if (blocks > num_packed) {
      pack_blocks(keys, E, num_packed, blocks, packed);
      point_blocks(values, E, num_packed, blocks, value, seam);
      num_packed = blocks;
    }
    const int64_t first = a.plan.cu[n] + item.first_token;
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
    rows.first_visible = first_visible;
    attend(rows, KeyBlocks<S, A>{key, value, kLanes, a.value_stride}, static_cast<A>(a.scale));
  }
}

// ---------------------------------------------------------------- backward

// Query rows whose p and ds are held before the keys gather from them. Their sum is a chain of its
// own, added to the total once: short chains lose less, and the bits need one size on every CPU.
constexpr int kTile = 32;

// sums[m][16 n + lane] += sum_r weight[r][m] * rows[r][16 n + lane] for M keys.
template <typename A, int M, int N>
GE_INLINE void gather_columns(const A* weight, int64_t weight_stride, const A* rows, int64_t row_stride, int count,
                              A* sums) {
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
GE_NOINLINE void gather(const A* weight, int64_t weight_stride, const A* rows, int64_t row_stride, int count, A* sums) {
  int64_t column = 0;
  for (; column + kWide * kLanes <= row_stride; column += kWide * kLanes) {
    gather_columns<A, M, kWide>(weight, weight_stride, rows + column, row_stride, count, sums + column);
  }
  for (; column < row_stride; column += kLanes) {
    gather_columns<A, M, 1>(weight, weight_stride, rows + column, row_stride, count, sums + column);
  }
}

// In place: scores -> p, and dout . value -> ds; 0 where row m does not see the key.
template <typename A, int M>
GE_NOINLINE void slope_rows(A* p, A* ds, int64_t s_stride, const int64_t (&visible)[M], const A (&max)[M],
                            const A (&inverse)[M], const A (&centre)[M], A scale) {
  using V = Vec16<A>;
  const V factor = V::set1(scale);
  each_block(visible, [&](int64_t b, auto keep) GE_LAMBDA {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const int64_t at = m * s_stride + b * kLanes;
      const V weight = vexp(V::load(p + at) - V::set1(max[m])) * V::set1(inverse[m]);
      const V slope = weight * (V::load(ds + at) - V::set1(centre[m])) * factor;
      keep(m, weight, A(0)).store(p + at);
      keep(m, slope, A(0)).store(ds + at);
    }
  });
}

// One (group, kv head): the prompt and then the sequences that continue it, in their order.
template <typename S>
class Backward {
 public:
  using A = Arith<S>;
  using V = Vec16<A>;

  static int64_t bytes(const RaggedAttentionArgs& a) {
    const int64_t blocks = blocks_of(a.plan.max_len), padded = blocks_of(a.E) * kLanes;
    return 2 * Arena::bytes<const A*>(blocks) + Arena::bytes<const S*>(blocks) + 2 * Arena::bytes<A>(blocks * kLanes * a.E) +
           Arena::bytes<S>(kLanes * a.key_stride) + 2 * Arena::bytes<A>(kTile * blocks * kLanes) +
           2 * Arena::bytes<A>(kTile * padded) + 2 * Arena::bytes<A>(blocks * kLanes * padded);
  }

  Backward(const RaggedAttentionArgs& args, Arena& arena)
      : a(args), E(args.E), padded(blocks_of(E) * kLanes), group(args.H / args.plan.K) {
    const int64_t blocks = blocks_of(a.plan.max_len);
    s_stride = blocks * kLanes;
    key = arena.take<const A*>(blocks);
    value = arena.take<const A*>(blocks);
    key_row = arena.take<const S*>(blocks);
    packed_key = arena.take<A>(s_stride * E);
    packed_value = arena.take<A>(s_stride * E);
    seam = arena.take<S>(kLanes * a.key_stride);
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

  void operator()(int64_t group_index, int64_t kv_head) {
    const int64_t prompt = first_of_group(a.plan, group_index);
    const int64_t end = first_of_group(a.plan, group_index + 1);
    for (int64_t n = prompt; n < end; ++n) {
      const SequenceRows<S> keys = sequence_rows<S>(a, a.key, a.key_stride, prompt, n, kv_head);
      if (keys.len == keys.prompt_len) continue;
      const SequenceRows<S> values = sequence_rows<S>(a, a.value, a.value_stride, prompt, n, kv_head);
      const int64_t begin = keys.prompt_len / kLanes, blocks = blocks_of(keys.len);
      pack_blocks(keys, E, begin, blocks, packed_key);
      pack_blocks(values, E, begin, blocks, packed_value);
      point_blocks(keys, E, begin, blocks, key_row, seam);
      const int64_t own = (keys.len - keys.prompt_len) * padded * sizeof(A);
      memset(dkey + keys.prompt_len * padded, 0, own);
      memset(dvalue + keys.prompt_len * padded, 0, own);
      add_sequence(a.plan.cu[n], a.plan.cu[n + 1] - a.plan.cu[n], keys.prompt_len, kv_head);
      if (n > prompt) write_keys(n, keys.prompt_len, kv_head);
    }
    write_keys(prompt, 0, kv_head);
  }

 private:
  // The query rows of one sequence of `tokens` tokens from token `start` on, after `before` keys.
  void add_sequence(int64_t start, int64_t tokens, int64_t before, int64_t kv_head) {
    RowIndex index;
    for (int64_t left = tokens * group; left > 0;) {
      const int count = left < kTile ? static_cast<int>(left) : kTile;
      left -= count;
      RowIndex last = index;
      last.advance(count - 1, group);
      const int64_t seen = before + last.token + 1;  // keys that the last row sees
      const RowIndex first = index;
      for (int done = 0; done < count;) {
        const int m = tile_rows<A>(count - done);
        with_rows<kRows<A>>(
            m, [&](auto rows) { differentiate<decltype(rows)::value>(start, before, kv_head, index, done, seen); });
        index.advance(m, group);
        done += m;
      }
      for (int64_t j = 0; j < seen; j += kRows<A>) {
        // the first row of the tile that sees key j
        const int64_t earlier = (j - before - first.token) * group - first.head;
        const int skip = earlier > 0 ? static_cast<int>(earlier) : 0;
        const int m = seen - j < kRows<A> ? static_cast<int>(seen - j) : kRows<A>;
        with_rows<kRows<A>>(m, [&](auto rows) {
          constexpr int M = decltype(rows)::value;
          gather<A, M>(ds + skip * s_stride + j, s_stride, query_rows + skip * padded, padded, count - skip,
                       dkey + j * padded);
          gather<A, M>(p + skip * s_stride + j, s_stride, dout_rows + skip * padded, padded, count - skip,
                       dvalue + j * padded);
        });
      }
    }
  }

  // The gradients of the tokens of sequence n, which begin at position `before`.
  void write_keys(int64_t n, int64_t before, int64_t kv_head) {
    for (int64_t t = a.plan.cu[n], j = before; t < a.plan.cu[n + 1]; ++t, ++j) {
      const int64_t at = (t * a.plan.K + kv_head) * E;
      each_vector(E, [&](int64_t e, int count) {
        store(V::load(dkey + j * padded + e), static_cast<S*>(a.dkey) + at + e, count);
        store(V::load(dvalue + j * padded + e), static_cast<S*>(a.dvalue) + at + e, count);
      });
    }
  }

  // p and ds of the M rows from `first` on, which become rows [slot, slot + M) of the tile, and
  // their dquery. Columns up to the block of key seen - 1 are written.
  template <int M>
  __attribute__((noinline)) void differentiate(int64_t start, int64_t before, int64_t kv_head, RowIndex first, int slot,
                                               int64_t seen) {
    RowIndex index[M];
    int64_t visible[M];
    A centre[M];
    const A *q[M], *g[M];
    index_rows(first, group, before + 1, index, visible);
    const S* query = static_cast<const S*>(a.query) + start * a.query_stride + kv_head * group * E;
    const int64_t rows = (start * a.H + kv_head * group) * E, stride = a.H * E;
    for (int m = 0; m < M; ++m) {
      const int64_t at = rows + index[m].token * stride + index[m].head * E;
      const S* q_row = query + index[m].token * a.query_stride + index[m].head * E;
      const S* dout = static_cast<const S*>(a.dout) + at;
      const S* out = static_cast<const S*>(a.out) + at;
      A* q_copy = query_rows + (slot + m) * padded;
      A* g_copy = dout_rows + (slot + m) * padded;
      V dots = V::zero();
      each_vector(E, [&](int64_t e, int n) {
        const V x = load<V>(dout + e, n);
        dots = fma(x, load<V>(out + e, n), dots);
        x.store(g_copy + e);
        load<V>(q_row + e, n).store(q_copy + e);
      });
      centre[m] = sum(dots);
      q[m] = q_copy;
      g[m] = g_copy;
    }
    const int64_t blocks = blocks_of(visible[M - 1]);
    const A scale = static_cast<A>(a.scale);
    score_rows<A, M>(q, key, kLanes, E, scale, blocks, p + slot * s_stride, s_stride);
    score_rows<A, M>(g, value, kLanes, E, A(1), blocks, ds + slot * s_stride, s_stride);
    A max[M], inverse[M];
    for (int m = 0; m < M; ++m) {
      const A* stats =
          static_cast<const A*>(a.stats) + ((start + index[m].token) * a.H + kv_head * group + index[m].head) * 2;
      max[m] = stats[0];
      inverse[m] = stats[1];
    }
    slope_rows(p + slot * s_stride, ds + slot * s_stride, s_stride, visible, max, inverse, centre, scale);
    // keys that only later rows of the tile see
    const int64_t rest = (blocks_of(seen) - blocks) * kLanes * sizeof(A);
    for (int m = 0; rest > 0 && m < M; ++m) {
      memset(p + (slot + m) * s_stride + blocks * kLanes, 0, rest);
      memset(ds + (slot + m) * s_stride + blocks * kLanes, 0, rest);
    }
    weigh_rows<S, M>(ds + slot * s_stride, s_stride, key_row, a.key_stride, E, visible,
                     [&](int m, int64_t column, int lanes, V acc) {
                       S* dquery = static_cast<S*>(a.dquery) + rows + index[m].token * stride + index[m].head * E;
                       store(acc, dquery + column, lanes);
                     });
  }

  const RaggedAttentionArgs& a;
  int64_t E, padded, group, s_stride;  // padded: E rounded up to whole vectors
  const A **key, **value;              // [blocks] -> [E][16]
  const S** key_row;                   // [blocks] -> [16][E]
  A *packed_key, *packed_value;
  S* seam;                             // [16][key_stride]
  A *p, *ds;                           // [kTile][s_stride]
  A *query_rows, *dout_rows;           // [kTile][padded], 0 past E
  A *dkey, *dvalue;                    // [max_len rounded up][padded]
};

template <typename S>
void backward(const RaggedAttentionArgs& a, int64_t begin, int64_t end) {
  Arena arena(Backward<S>::bytes(a));
  Backward<S> differentiate(a, arena);
  for (int64_t i = begin; i < end; ++i) {
    if (i + 1 < end) {
      const int64_t kv_head = (i + 1) % a.plan.K, width = a.H / a.plan.K * a.E;
      const int64_t n = first_of_group(a.plan, (i + 1) / a.plan.K), first = a.plan.cu[n];
      const int64_t len = a.plan.cu[n + 1] - first, tokens = len < kQueryChunk ? len : kQueryChunk;
      prefetch_inputs<S>(a, kv_head, first, tokens);
      prefetch_rows<S>(a.out, a.H * a.E, width, kv_head, first, tokens);
      prefetch_rows<S>(a.dout, a.H * a.E, width, kv_head, first, tokens);
    }
    differentiate(i / a.plan.K, i % a.plan.K);
  }
}

}  // namespace

void ragged_attention_forward(const RaggedAttentionArgs& args, int64_t begin, int64_t end) { GE_FOR_DTYPE(forward) }
void ragged_attention_backward(const RaggedAttentionArgs& args, int64_t begin, int64_t end) { GE_FOR_DTYPE(backward) }

}  // namespace grpo_engine::GE_ISA
