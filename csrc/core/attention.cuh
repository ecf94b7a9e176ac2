// attention.cuh -- attention on CUDA: the rows of a tile, and the row algorithm without tensor cores. The latter serves
// float32, float64, and bfloat16 heads that are too wide for attention_mma.cuh. Both ops run this kernel.
//
// For a query row that sees keys 0 .. L-1 by position in its sequence (that of a response begins with its prompt):
//
//   s_j = scale * (q . k_j)          chain of fma over e ascending, as on the CPU
//   stretch by stretch of kStretch keys, block by block of kKeyBlock keys: m is the maximum so far in the stretch,
//     l_x = l_x exp(m_before - m) + p_x + p_(x+32)      one l for each lane x, p_j = exp(s_j - m)
//     o_e = o_e exp(m_before - m), then a chain of fma of p_j v_je over j ascending
//   the l_x of a stretch join by the tree of warp_reduce, the stretches in their order
//
// The arithmetic of a key depends on its position alone. So the batch, the page layout, the chunks of a prompt and the warp
// of a stretch change no bit of a row. For decoding each stretch is a warp of its own, and a second launch of this kernel
// joins the stretches.
//
// A warp has kTileRows rows: tokens and the heads that share a kv head, token-major. So every key and value that it loads
// serves that many rows. For the scores lanes are keys, which needs keys side by side. Pages have them so, and
// ragged_attention transposes. For the weighted sum of values lanes are columns. A select masks a key that a row does not
// see, since the key may be NaN.
#pragma once
#include "core/cuda_values.cuh"
#include "core/reduce.cuh"

namespace grpo_engine {

inline constexpr int kTileRows = 8;
inline constexpr int kKeyBlock = 2 * kWarpSize;  // two keys a lane
inline constexpr int kStretch = 256;             // keys that a warp of its own may have
inline constexpr int kAttentionWarps = 4;        // of a block; neighbours read the same keys, from L1
inline constexpr int kAttentionThreads = kAttentionWarps * kWarpSize;
inline constexpr int64_t kMostColumns = 128;     // of the output that one warp has; blockIdx.y takes the next ones

// ---------------------------------------------------------------- the rows of a warp

// The last i in [low, high) with start(i) <= x, found by a whole warp; start never falls.
template <typename Start>
__device__ inline int64_t warp_find(int64_t low, int64_t high, int64_t x, Start start) {
  const int lane = threadIdx.x % kWarpSize;
  while (high - low > 1) {
    const int64_t step = (high - low + kWarpSize - 1) / kWarpSize, at = low + lane * step;
    const int found = __popc(__ballot_sync(kAllLanes, at < high && start(at) <= x));
    low += (found > 0 ? found - 1 : 0) * step;
    high = low + step < high ? low + step : high;
  }
  return low;
}

// Up to kTileRows (or kRows) consecutive rows of one sequence; count is 0 where there are none.
struct AttentionTile {
  int64_t sequence, first_token, tokens;  // of the sequence; its first token counts from that of the batch
  int64_t row;                            // of the sequence, the tile's first
  int count;
};

// Tiles are numbered without knowledge of the lengths. Those of sequence n begin at cu[n] * rows / kRows + n, which leaves
// room for its last, shorter tile. Some numbers stay unused.
template <int kRows = kTileRows>
__host__ __device__ inline int64_t tile_number(int64_t token, int64_t n, int64_t rows_of_token) {
  return token * rows_of_token / kRows + n;
}

// cu [N + 1] is not trusted. A sequence that is not within [0, T) has no tiles.
template <int kRows = kTileRows>
__device__ inline AttentionTile find_tile(const int32_t* cu, int64_t N, int64_t T, int64_t rows_of_token, int64_t number) {
  AttentionTile tile{};
  if (N == 0) return tile;
  const int64_t n = warp_find(0, N, number, [&](int64_t i) { return tile_number<kRows>(cu[i], i, rows_of_token); });
  const int64_t begin = cu[n], end = cu[n + 1];
  if (begin < 0 || begin > end || end > T) return tile;
  tile.sequence = n;
  tile.first_token = begin;
  tile.tokens = end - begin;
  tile.row = (number - tile_number<kRows>(begin, n, rows_of_token)) * kRows;
  const int64_t left = tile.tokens * rows_of_token - tile.row;
  if (tile.row >= 0 && left > 0) tile.count = static_cast<int>(left < kRows ? left : kRows);
  return tile;
}

// Whether find_tile gives token t to a tile, if cu never falls.
__device__ inline bool has_tile(const int32_t* cu, int64_t N, int64_t T, int64_t t) {
  int64_t low = 0, high = N;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (cu[middle] <= t ? low : high) = middle;
  }
  return N > 0 && cu[low] >= 0 && cu[low] <= t && t < cu[low + 1] && cu[low + 1] <= T;
}

// ---------------------------------------------------------------- the two matmuls

// Columns of one head that a lane has: column, column + 32, ... Those past the width read column 0 and are not stored.
template <int C>
struct LaneColumns {
  int64_t at[C];
  bool inside[C];

  __device__ LaneColumns(int64_t first, int64_t width) {
#pragma unroll
    for (int i = 0; i < C; ++i) {
      const int64_t column = first + i * kWarpSize + threadIdx.x % kWarpSize;
      inside[i] = column < width;
      at[i] = inside[i] ? column : 0;
    }
  }
};

// Shared memory, handed out in order. All parts are multiples of 16 bytes.
struct SharedParts {
  unsigned char* next;

  template <typename T>
  __device__ T* take(int64_t count) {
    T* part = reinterpret_cast<T*>(next);
    next += count * static_cast<int64_t>(sizeof(T));
    return part;
  }
};

// A matrix of kTileRows rows in shared memory, rows innermost: one column of it is read at once by all lanes.
template <typename A>
__device__ inline void load_column(const A* column, A (&v)[kTileRows]) {
#pragma unroll
  for (int r = 0; r < kTileRows; r += kPack<A>) {
    const Stored<A> part = load16<Stored<A>>(column + r);
#pragma unroll
    for (int i = 0; i < kPack<A>; ++i) v[r + i] = part.v[i];
  }
}
template <typename A>
__device__ inline void store_column(const A (&v)[kTileRows], A* column) {
#pragma unroll
  for (int r = 0; r < kTileRows; r += kPack<A>) {
    Stored<A> part;
#pragma unroll
    for (int i = 0; i < kPack<A>; ++i) part.v[i] = v[r + i];
    store16(part, column + r);
  }
}

// What a lane has of its two vectors, as columns lane and lane + 32.
template <typename A>
__device__ inline void store_lane_columns(const A (&v)[kTileRows][2], A* columns) {
#pragma unroll
  for (int x = 0; x < 2; ++x) {
    A column[kTileRows];
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) column[r] = v[r][x];
    store_column(column, columns + (x * kWarpSize + threadIdx.x % kWarpSize) * kTileRows);
  }
}

// tile[e][r] = element e of row(r) for r < count, 0 for the others; by threads first, first + step, ...
template <typename A, typename Row>
__device__ inline void load_tile(Row row, int count, int64_t E, int64_t first, int64_t step, A* tile) {
  for (int r = 0; r < kTileRows; ++r) {
    const auto* from = row(r < count ? r : 0);
    for (int64_t e = first; e < E; e += step) tile[e * kTileRows + r] = r < count ? to_arith(from[e]) : A(0);
  }
}

// The two vectors (keys, or query rows) of a lane: element e of one is at[e * stride].
template <typename S>
struct LaneVectors {
  const S* at[2];
  int64_t stride[2];  // 0 for a vector that is not there: `at` is then any element
};

// dots[r][x] = sum_e tile[e][r] * vector x of this lane [e].
template <typename S>
__device__ inline void lane_dots(const Arith<S>* tile, const LaneVectors<S>& lane, int64_t E,
                                 Arith<S> (&dots)[kTileRows][2]) {
  using A = Arith<S>;
#pragma unroll
  for (int r = 0; r < kTileRows; ++r) dots[r][0] = dots[r][1] = 0;
#pragma unroll 8
  for (int64_t e = 0; e < E; ++e) {  // many loads in flight: few warps fit in a multiprocessor
    const A a = to_arith(lane.at[0][e * lane.stride[0]]), b = to_arith(lane.at[1][e * lane.stride[1]]);
    A row[kTileRows];
    load_column(tile + e * kTileRows, row);
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) {
      dots[r][0] = fma(row[r], a, dots[r][0]);
      dots[r][1] = fma(row[r], b, dots[r][1]);
    }
  }
}

// sums[r][i] += weights[j][r] * vectors[j][columns.at[i]], j ascending in [0, count), where sees(r, j).
template <typename S, int C, typename Sees>
__device__ inline void add_weighted(const Arith<S>* weights, const S* const* vectors, int count,
                                    const LaneColumns<C>& columns, Sees sees, Arith<S> (&sums)[kTileRows][C]) {
  using A = Arith<S>;
#pragma unroll 8
  for (int j = 0; j < count; ++j) {
    const S* vector = vectors[j];
    A v[C], weight[kTileRows];
#pragma unroll
    for (int i = 0; i < C; ++i) v[i] = to_arith(vector[columns.at[i]]);
    load_column(weights + j * kTileRows, weight);
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) {
#pragma unroll
      for (int i = 0; i < C; ++i) sums[r][i] = sees(r, j) ? fma(weight[r], v[i], sums[r][i]) : sums[r][i];
    }
  }
}

// ---------------------------------------------------------------- the forward kernel

template <typename S>
struct KeyAddress {
  const S* key;    // element e at key[e * stride]
  const S* value;  // element e at value[e]
  int64_t stride;
  bool known;      // whether the caller's index was in range; if not, rows that see the key become NaN
};

// The arguments that both ops share. A Source gives the addresses of keys:
//   source.open<S>(sequence, kv_head, tokens)   has `before`, how many keys come before those of the sequence's
//     tokens (below -tokens: they see nothing, and become NaN), and KeyAddress<S> at(position)
struct AttentionRows {
  int64_t N, T, H, K, E, query_stride;
  double scale;
  const int32_t* cu;       // [N + 1]
  const void* query;       // [T, H, E]
  void* out;               // [T, H, E]
  void* stats;             // [T, H, 2] max and 1 / sum, or null
  void* partial;           // [K * tiles, stretches, E + 2, kTileRows], or null
  int64_t stretches;       // the most that a row can have; with partial only
  int64_t shared_of_warp;  // bytes

  __host__ __device__ int64_t tiles() const { return tile_number(T, N, H / K); }  // of one kv head
};

// whole: a warp has all stretches of its rows. part: it has one of them, into partial. join: it has those of partial.
enum class Attend { whole, part, join };

// The softmax of a tile's rows over some keys: maximum, sum and weighted sum of values.
template <typename A, int C>
struct AttentionState {
  A max[kTileRows], sum[kTileRows], out[kTileRows][C];

  __device__ AttentionState() {
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) {
      max[r] = -infinity<A>();
      sum[r] = 0;
#pragma unroll
      for (int i = 0; i < C; ++i) out[r][i] = 0;
    }
  }
};

// exp(x - max). 0 where nothing is seen so far: both are -inf then.
template <typename A>
__device__ inline A weight_below(A x, A max) {
  return exp(x - (max == -infinity<A>() ? A(0) : max));
}

// Takes in the block of keys from `first` on. Row r sees seen[r] keys in all. The first row sees the fewest, and no row more
// than `most`. sum stays a sum for each lane.
template <typename S, int C, typename Keys>
__device__ inline void attend_block(const Keys& keys, int first, const int (&seen)[kTileRows], int most, const S* anything,
                                    int64_t E, Arith<S> scale, const Arith<S>* query, const LaneColumns<C>& columns,
                                    Arith<S>* weights, const S** values, AttentionState<Arith<S>, C>& state) {
  using A = Arith<S>;
  const int lane = threadIdx.x % kWarpSize;
  LaneVectors<S> mine;
  bool known[2];
#pragma unroll
  for (int x = 0; x < 2; ++x) {
    const int position = first + x * kWarpSize + lane;
    KeyAddress<S> address{anything, anything, 0, false};
    if (position < most) address = keys.at(position);
    known[x] = address.known;
    mine.at[x] = known[x] ? address.key : anything;
    mine.stride[x] = known[x] ? address.stride : 0;
    values[x * kWarpSize + lane] = known[x] ? address.value : anything;
  }
  A s[kTileRows][2];
  lane_dots<S>(query, mine, E, s);
#pragma unroll
  for (int r = 0; r < kTileRows; ++r) {
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      const A score = known[x] ? s[r][x] * scale : not_a_number<A>();
      s[r][x] = first + x * kWarpSize + lane < seen[r] ? score : -infinity<A>();
    }
    const A max = Max{}(state.max[r], warp_reduce(Max{}(s[r][0], s[r][1]), Max{}));
    const A before = weight_below(state.max[r], max);
    state.max[r] = max;
    s[r][0] = weight_below(s[r][0], max);
    s[r][1] = weight_below(s[r][1], max);
    state.sum[r] = fma(state.sum[r], before, s[r][0] + s[r][1]);
#pragma unroll
    for (int i = 0; i < C; ++i) state.out[r][i] = state.out[r][i] * before;
  }
  store_lane_columns(s, weights);
  __syncwarp();
  if (first + kKeyBlock <= seen[0]) {
    add_weighted<S>(weights, values, kKeyBlock, columns, [](int, int) { return true; }, state.out);
  } else {
    const int count = most - first < kKeyBlock ? most - first : kKeyBlock;
    add_weighted<S>(weights, values, count, columns, [&](int r, int j) { return first + j < seen[r]; }, state.out);
  }
  __syncwarp();  // the next block writes weights and values again
}

// The row of a token that no sequence has.
template <typename S>
__device__ inline void poison_token(const AttentionRows& a, int64_t t) {
  using A = Arith<S>;
  for (int64_t i = 0; i < a.H * a.E; ++i) from_arith(not_a_number<A>(), static_cast<S*>(a.out) + t * a.H * a.E + i);
  for (int64_t i = 0; a.stats && i < a.H * 2; ++i) static_cast<A*>(a.stats)[t * a.H * 2 + i] = not_a_number<A>();
}

// A warp has one tile of one kv head. The warps past the tiles look for tokens without a sequence, one a lane. The number of
// blocks of a multiprocessor tells ptxas how many registers it may take. Left alone it takes fewer and spills.
template <typename S, int C, Attend kMode, typename Source>
__global__ void __launch_bounds__(kAttentionThreads, kMode == Attend::part ? 3 : 2)
    attention_kernel(Source source, AttentionRows a) {
  using A = Arith<S>;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t splits = kMode == Attend::part ? a.stretches : 1, tiles = a.tiles(), group = a.H / a.K;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kAttentionWarps + warp, items = a.K * tiles * splits;
  if (item >= items) {
    const int64_t t = (item - items) * kWarpSize + lane;
    if (kMode != Attend::part && blockIdx.y == 0 && t < a.T && !has_tile(a.cu, a.N, a.T, t)) poison_token<S>(a, t);
    return;
  }
  const int64_t index = a.K * tiles - 1 - item / splits;  // late tokens see more: they start first
  const int64_t kv_head = index / tiles;
  const AttentionTile tile = find_tile(a.cu, a.N, a.T, group, index % tiles);
  if (tile.count == 0) return;
  const auto keys = source.template open<S>(tile.sequence, kv_head, tile.tokens);
  int seen[kTileRows], most = 0;
#pragma unroll
  for (int r = 0; r < kTileRows; ++r) {
    const int64_t sees = keys.before + (tile.row + r) / group + 1;
    seen[r] = r < tile.count && sees > 0 ? static_cast<int>(sees) : 0;
    most = seen[r] > most ? seen[r] : most;
  }
  const int first_stretch = kMode == Attend::part ? static_cast<int>(item % splits) : 0;
  if (kMode == Attend::part && first_stretch * kStretch >= most) return;
  const int end_stretch = kMode == Attend::part ? first_stretch + 1 : (most + kStretch - 1) / kStretch;

  const LaneColumns<C> columns(static_cast<int64_t>(blockIdx.y) * C * kWarpSize, a.E);
  SharedParts parts{dynamic_shared<unsigned char>() + warp * a.shared_of_warp};
  A* query = parts.take<A>(a.E * kTileRows);
  A* total = parts.take<A>((a.E < kMostColumns ? a.E : kMostColumns) * kTileRows);  // each lane has its own columns
  A* weights = parts.take<A>(kKeyBlock * kTileRows);
  const S** values = parts.take<const S*>(kKeyBlock);
  const S* all_queries = static_cast<const S*>(a.query);
  if (kMode != Attend::join) {
    load_tile(
        [&](int r) {
          const int64_t row = tile.row + r;
          return all_queries + (tile.first_token + row / group) * a.query_stride + (kv_head * group + row % group) * a.E;
        },
        tile.count, a.E, lane, kWarpSize, query);
    __syncwarp();
  }
  A max[kTileRows], sum[kTileRows];
#pragma unroll
  for (int r = 0; r < kTileRows; ++r) {
    max[r] = -infinity<A>();
    sum[r] = 0;
  }
#pragma unroll
  for (int i = 0; i < C; ++i) {
    const A zero[kTileRows]{};
    if (columns.inside[i]) store_column(zero, total + (i * kWarpSize + lane) * kTileRows);
  }
  for (int stretch = first_stretch; stretch < end_stretch; ++stretch) {
    const int begin = stretch * kStretch, end = begin + kStretch < most ? begin + kStretch : most;
    A* partial = static_cast<A*>(a.partial) + (index * a.stretches + stretch) * (a.E + 2) * kTileRows;
    AttentionState<A, C> state;
    if (kMode == Attend::join) {
      load_column(partial + a.E * kTileRows, state.max);
      load_column(partial + (a.E + 1) * kTileRows, state.sum);
    } else {
      for (int first = begin; first < end; first += kKeyBlock) {
        attend_block<S>(keys, first, seen, most, all_queries, a.E, static_cast<A>(a.scale), query, columns, weights, values,
                        state);
      }
#pragma unroll
      for (int r = 0; r < kTileRows; ++r) state.sum[r] = warp_reduce(state.sum[r], Add{});
    }
    if (kMode == Attend::part && lane == 0 && blockIdx.y == 0) {
      store_column(state.max, partial + a.E * kTileRows);
      store_column(state.sum, partial + (a.E + 1) * kTileRows);
    }
    A earlier[kTileRows], now[kTileRows];  // factors of what was summed before and of this stretch
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) {
      const A top = Max{}(max[r], state.max[r]);
      earlier[r] = weight_below(max[r], top);
      now[r] = weight_below(state.max[r], top);
      if (begin < seen[r]) {
        max[r] = top;
        sum[r] = fma(state.sum[r], now[r], sum[r] * earlier[r]);
      }
    }
#pragma unroll
    for (int i = 0; i < C; ++i) {
      if (!columns.inside[i]) continue;
      A out[kTileRows], before[kTileRows];
#pragma unroll
      for (int r = 0; r < kTileRows; ++r) out[r] = state.out[r][i];
      if (kMode == Attend::part) {
        store_column(out, partial + columns.at[i] * kTileRows);
        continue;
      }
      if (kMode == Attend::join) load_column(partial + columns.at[i] * kTileRows, out);
      load_column(total + (i * kWarpSize + lane) * kTileRows, before);
#pragma unroll
      for (int r = 0; r < kTileRows; ++r) {
        out[r] = begin < seen[r] ? fma(out[r], now[r], before[r] * earlier[r]) : before[r];
      }
      store_column(out, total + (i * kWarpSize + lane) * kTileRows);
    }
  }
  if (kMode == Attend::part) return;
#pragma unroll
  for (int r = 0; r < kTileRows; ++r) {
    if (r >= tile.count) break;
    const int64_t row = tile.row + r;
    const int64_t at = (tile.first_token + row / group) * a.H + kv_head * group + row % group;
    const A inverse = A(1) / sum[r];  // of no key 1 / 0: the row becomes 0 * inf = NaN
#pragma unroll
    for (int i = 0; i < C; ++i) {
      if (!columns.inside[i]) continue;
      from_arith(total[(i * kWarpSize + lane) * kTileRows + r] * inverse, static_cast<S*>(a.out) + at * a.E + columns.at[i]);
    }
    if (a.stats && lane == 0 && blockIdx.y == 0) {
      static_cast<A*>(a.stats)[at * 2] = max[r];
      static_cast<A*>(a.stats)[at * 2 + 1] = inverse;
    }
  }
}

// Calls function.operator()<C>() with the columns of a lane. Only float32 is compiled for several C: float64 is there for
// gradcheck, and of bfloat16 only wide heads come here (attention_mma.cuh).
template <typename S, typename Function>
void for_columns(int64_t E, Function function) {
  constexpr int kMost = static_cast<int>(kMostColumns / kWarpSize);
  if constexpr (sizeof(S) == sizeof(double)) return function.template operator()<1>();
  if constexpr (sizeof(S) == sizeof(float)) {
    if (E <= kWarpSize) return function.template operator()<1>();
    if (E <= 2 * kWarpSize) return function.template operator()<2>();
  }
  if constexpr (sizeof(S) < sizeof(double)) function.template operator()<kMost>();
}

template <Attend kMode, typename S, typename Source>
void launch_attention(const char* name, const Source& source, AttentionRows a, CudaStream stream) {
  using A = Arith<S>;
  const int64_t columns = a.E < kMostColumns ? a.E : kMostColumns;
  a.shared_of_warp = (a.E + columns + kKeyBlock) * kTileRows * static_cast<int64_t>(sizeof(A)) +
                     kKeyBlock * static_cast<int64_t>(sizeof(void*));
  const int64_t tiles = a.K * a.tiles();
  const int64_t warps = kMode == Attend::part ? tiles * a.stretches : tiles + ceil_div(a.T, kWarpSize);
  for_columns<S>(a.E, [&]<int C>() {
    launch({.name = name,
            .blocks = ceil_div(warps, kAttentionWarps),
            .threads = kAttentionThreads,
            .stream = stream,
            .shared_bytes = kAttentionWarps * a.shared_of_warp,
            .blocks_y = ceil_div(a.E, C * kWarpSize)},
           attention_kernel<S, C, kMode, Source>, source, a);
  });
}

}  // namespace grpo_engine
