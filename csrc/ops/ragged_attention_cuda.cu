#include "ops/ragged_attention.h"

#include "ops/ragged_attention_mma.cuh"
#include "ops/ragged_groups.cuh"

namespace grpo_engine {
namespace {

// ---------------------------------------------------------------- rows side by side

// to[head][e][row]: lanes that have a row each then read side by side. Row i of a head has group rows a token:
// (token i / group, head * group + i % group).
constexpr int kTransposeRows = 8;  // of a block of 32 x 8 threads

template <typename S>
__global__ void __launch_bounds__(kWarpSize* kTransposeRows)
    transpose_kernel(const S* from, int64_t token_stride, int64_t rows, int64_t group, int64_t E, S* to) {
  __shared__ S tile[kWarpSize][kWarpSize + 1];
  const int x = threadIdx.x % kWarpSize, y = threadIdx.x / kWarpSize;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kWarpSize, column_blocks = (E + kWarpSize - 1) / kWarpSize;
  const int64_t head = blockIdx.y / column_blocks, e0 = blockIdx.y % column_blocks * kWarpSize;
  for (int k = y; k < kWarpSize; k += kTransposeRows) {
    const int64_t row = row0 + k, e = e0 + x;
    if (row < rows && e < E) tile[k][x] = from[row / group * token_stride + (head * group + row % group) * E + e];
  }
  __syncthreads();
  for (int k = y; k < kWarpSize; k += kTransposeRows) {
    const int64_t row = row0 + x, e = e0 + k;
    if (row < rows && e < E) to[(head * E + e) * rows + row] = tile[x][k];
  }
}

template <typename S>
void transpose(const RaggedAttentionArgs& a, const void* from, int64_t token_stride, int64_t group, void* to,
               CudaStream stream) {
  const int64_t rows = a.T * group;
  launch({.name = "ragged_attention_transpose",
          .blocks = ceil_div(rows, kWarpSize),
          .threads = kWarpSize * kTransposeRows,
          .stream = stream,
          .blocks_y = a.plan.K * ceil_div(a.E, kWarpSize)},
         transpose_kernel<S>, static_cast<const S*>(from), token_stride, rows, group, a.E, static_cast<S*>(to));
}

// ---------------------------------------------------------------- keys by position

// Keys and what is summed by their weights.
template <typename S>
struct RaggedKeys : RaggedTokens {
  const S* key;                  // [E][T] of the kv head
  const S* value;                // first row of the kv head
  int64_t key_stride, value_stride;

  __device__ KeyAddress<S> at(int position) const {
    const int64_t t = token(position);
    return {key + t, value + t * value_stride, key_stride, true};
  }
};

// key: transposed [K, E, T]; value: rows value_stride apart.
struct RaggedSource {
  RaggedAttentionArgs a;

  template <typename S>
  __device__ RaggedKeys<S> open(int64_t sequence, int64_t kv_head, int64_t tokens) const {
    return {RaggedTokens(a, sequence, tokens), static_cast<const S*>(a.key_t) + kv_head * a.E * a.T,
            static_cast<const S*>(a.value) + kv_head * a.E, a.T, a.value_stride};
  }
};

AttentionRows rows_of(const RaggedAttentionArgs& a) {
  AttentionRows rows{};
  rows.N = a.plan.N;
  rows.T = a.T;
  rows.H = a.H;
  rows.K = a.plan.K;
  rows.E = a.E;
  rows.query_stride = a.query_stride;
  rows.scale = a.scale;
  rows.cu = a.plan.cu;
  rows.query = a.query;
  rows.out = a.out;
  rows.stats = a.stats;
  return rows;
}

// ---------------------------------------------------------------- backward

// centre[t, h] = dout[t, h] . out[t, h]; a warp a row.
template <typename S>
__global__ void __launch_bounds__(kAttentionThreads) centre_kernel(RaggedAttentionArgs a) {
  using A = Arith<S>;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kAttentionWarps + warp;
  if (row >= a.T * a.H) return;
  const S* dout = static_cast<const S*>(a.dout) + row * a.E;
  const S* out = static_cast<const S*>(a.out) + row * a.E;
  A sum = 0;
  for (int64_t e = lane; e < a.E; e += kWarpSize) sum = fma(to_arith(dout[e]), to_arith(out[e]), sum);
  sum = warp_reduce(sum, Add{});
  if (lane == 0) static_cast<A*>(a.centre)[row] = sum;
}

// What the backward pass needs of a query row beside its vectors.
template <typename A>
struct RowStats {
  A max, inverse, centre;
};
template <typename A>
__device__ inline RowStats<A> stats_of(const RaggedAttentionArgs& a, int64_t row) {
  const A* stats = static_cast<const A*>(a.stats) + row * 2;
  return {stats[0], stats[1], static_cast<const A*>(a.centre)[row]};
}
// dots: query . key and dout . value of one pair.
template <typename A>
__device__ inline A probability(const RowStats<A>& row, A dot, A scale) {
  return exp(dot * scale - row.max) * row.inverse;
}
template <typename A>
__device__ inline A slope(const RowStats<A>& row, A p, A dout_value, A scale) {
  return p * (dout_value - row.centre) * scale;
}

// The memory of one warp in dquery_kernel, and of a block and each of its warps in dkey_kernel.
template <typename A>
int64_t dquery_shared(int64_t E) {
  return (2 * E + kKeyBlock) * kTileRows * static_cast<int64_t>(sizeof(A)) + kKeyBlock * static_cast<int64_t>(sizeof(void*));
}
template <typename A>
int64_t dkey_shared_of_warp() {
  return 2 * kKeyBlock * (kTileRows * static_cast<int64_t>(sizeof(A)) + static_cast<int64_t>(sizeof(void*)));
}
template <typename A>
int64_t dkey_shared(int64_t E) {
  return 2 * E * kTileRows * static_cast<int64_t>(sizeof(A)) + kAttentionWarps * dkey_shared_of_warp<A>();
}

// dquery of a tile: the blocks of keys in order, with the scores of the forward pass.
template <typename S, int C>
__global__ void __launch_bounds__(kAttentionThreads, 2) dquery_kernel(RaggedAttentionArgs a, int64_t shared_of_warp) {
  using A = Arith<S>;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t group = a.H / a.plan.K, tiles = tile_number(a.T, a.plan.N, group), items = a.plan.K * tiles;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kAttentionWarps + warp;
  S* dquery = static_cast<S*>(a.dquery);
  if (item >= items) {
    const int64_t t = (item - items) * kWarpSize + lane;
    if (blockIdx.y != 0 || t >= a.T || has_tile(a.plan.cu, a.plan.N, a.T, t)) return;
    for (int64_t i = 0; i < a.H * a.E; ++i) from_arith(not_a_number<A>(), dquery + t * a.H * a.E + i);
    return;
  }
  const int64_t index = items - 1 - item, kv_head = index / tiles;
  const AttentionTile tile = find_tile(a.plan.cu, a.plan.N, a.T, group, index % tiles);
  if (tile.count == 0) return;
  RaggedSource source{a};
  source.a.value = a.key;  // what ds weighs
  source.a.value_stride = a.key_stride;
  const RaggedKeys<S> keys = source.template open<S>(tile.sequence, kv_head, tile.tokens);
  const S* value_t = static_cast<const S*>(a.value_t) + kv_head * a.E * a.T;
  const auto row_of = [&](int r) {
    const int64_t row = tile.row + r;
    return (tile.first_token + row / group) * a.H + kv_head * group + row % group;
  };
  int seen[kTileRows], most = 0;
  RowStats<A> stats[kTileRows];
  A sums[kTileRows][C];
#pragma unroll
  for (int r = 0; r < kTileRows; ++r) {
    const int64_t sees = keys.before + (tile.row + r) / group + 1;
    seen[r] = r < tile.count && sees > 0 ? static_cast<int>(sees) : 0;
    most = seen[r] > most ? seen[r] : most;
    stats[r] = stats_of<A>(a, row_of(r < tile.count ? r : 0));
#pragma unroll
    for (int i = 0; i < C; ++i) sums[r][i] = seen[r] > 0 ? A(0) : not_a_number<A>();
  }
  const LaneColumns<C> columns(static_cast<int64_t>(blockIdx.y) * C * kWarpSize, a.E);
  SharedParts parts{dynamic_shared<unsigned char>() + warp * shared_of_warp};
  A* query = parts.take<A>(a.E * kTileRows);
  A* dout = parts.take<A>(a.E * kTileRows);
  A* weights = parts.take<A>(kKeyBlock * kTileRows);
  const S** key_rows = parts.take<const S*>(kKeyBlock);
  load_tile(
      [&](int r) {
        const int64_t row = tile.row + r;
        return static_cast<const S*>(a.query) + (tile.first_token + row / group) * a.query_stride +
               (kv_head * group + row % group) * a.E;
      },
      tile.count, a.E, lane, kWarpSize, query);
  load_tile([&](int r) { return static_cast<const S*>(a.dout) + row_of(r) * a.E; }, tile.count, a.E, lane, kWarpSize, dout);
  __syncwarp();
  const A scale = static_cast<A>(a.scale);
  for (int first = 0; first < most; first += kKeyBlock) {
    LaneVectors<S> key, value;
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      const int position = first + x * kWarpSize + lane;
      const KeyAddress<S> address = keys.at(position < most ? position : first);
      key.at[x] = address.key;
      value.at[x] = value_t + (address.key - keys.key);
      key.stride[x] = value.stride[x] = address.stride;
      key_rows[x * kWarpSize + lane] = address.value;
    }
    A s[kTileRows][2], ds[kTileRows][2];
    lane_dots<S>(query, key, a.E, s);
    lane_dots<S>(dout, value, a.E, ds);
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) {
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        const A g = slope(stats[r], probability(stats[r], s[r][x], scale), ds[r][x], scale);
        ds[r][x] = first + x * kWarpSize + lane < seen[r] ? g : A(0);
      }
    }
    store_lane_columns(ds, weights);
    __syncwarp();
    if (first + kKeyBlock <= seen[0]) {
      add_weighted<S>(weights, key_rows, kKeyBlock, columns, [](int, int) { return true; }, sums);
    } else {
      const int count = most - first < kKeyBlock ? most - first : kKeyBlock;
      add_weighted<S>(weights, key_rows, count, columns, [&](int r, int j) { return first + j < seen[r]; }, sums);
    }
    __syncwarp();
  }
#pragma unroll
  for (int r = 0; r < kTileRows; ++r) {
    if (r >= tile.count) break;
#pragma unroll
    for (int i = 0; i < C; ++i) {
      if (columns.inside[i]) from_arith(sums[r][i], dquery + row_of(r) * a.E + columns.at[i]);
    }
  }
}

// The query rows of one sequence and kv head, token-major, from `first` on: p and ds of a tile of keys, and what they
// add to dvalue and dkey. With `own` the rows are those of the keys' own sequence, whose first key is number `key`.
template <typename S, int C>
__device__ inline void add_query_block(const RaggedAttentionArgs& a, int64_t kv_head, int64_t begin, int64_t first,
                                       int64_t rows, bool own, int64_t key, int keys, const Arith<S>* key_tile,
                                       const Arith<S>* value_tile, Arith<S>* p_columns, Arith<S>* ds_columns,
                                       const S** query_rows, const S** dout_rows, const LaneColumns<C>& columns,
                                       Arith<S> (&dkey)[kTileRows][C], Arith<S> (&dvalue)[kTileRows][C]) {
  using A = Arith<S>;
  const int lane = threadIdx.x % kWarpSize, group = static_cast<int>(a.H / a.plan.K);
  const int64_t all_rows = a.T * group, plane = kv_head * a.E * all_rows;
  const A scale = static_cast<A>(a.scale);
  LaneVectors<S> query, dout;
  RowStats<A> stats[2];
#pragma unroll
  for (int x = 0; x < 2; ++x) {
    const int64_t wanted = first + x * kWarpSize + lane, row = wanted < rows ? wanted : first;
    const int64_t token = begin + row / group, head = kv_head * group + row % group, at = token * a.H + head;
    query.at[x] = static_cast<const S*>(a.query_t) + plane + begin * group + row;
    dout.at[x] = static_cast<const S*>(a.dout_t) + plane + begin * group + row;
    query.stride[x] = dout.stride[x] = all_rows;
    query_rows[x * kWarpSize + lane] = static_cast<const S*>(a.query) + token * a.query_stride + head * a.E;
    dout_rows[x * kWarpSize + lane] = static_cast<const S*>(a.dout) + at * a.E;
    stats[x] = stats_of<A>(a, at);
  }
  A p[kTileRows][2], ds[kTileRows][2];
  lane_dots<S>(key_tile, query, a.E, p);
  lane_dots<S>(value_tile, dout, a.E, ds);
  // row first + j sees key r if it is not before the first row of that key's token
  const bool all_see = !own || first >= (key + keys - 1) * group;
  const int ahead = all_see ? 0 : static_cast<int>(first - key * group);
  const auto sees = [&](int r, int j) { return all_see || j + ahead >= r * group; };
#pragma unroll
  for (int r = 0; r < kTileRows; ++r) {
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      const int j = x * kWarpSize + lane;
      const A weight = probability(stats[x], p[r][x], scale), g = slope(stats[x], weight, ds[r][x], scale);
      const bool pair = first + j < rows && r < keys && sees(r, j);
      p[r][x] = pair ? weight : A(0);
      ds[r][x] = pair ? g : A(0);
    }
  }
  store_lane_columns(p, p_columns);
  store_lane_columns(ds, ds_columns);
  __syncwarp();
  const int count = static_cast<int>(rows - first < kKeyBlock ? rows - first : kKeyBlock);
  const auto add = [&](const A* weights, const S* const* vectors, A(&total)[kTileRows][C]) {
    A sums[kTileRows][C]{};  // of this block: one chain over all rows would be less exact
    if (all_see) {
      add_weighted<S>(weights, vectors, count, columns, [](int, int) { return true; }, sums);
    } else {
      add_weighted<S>(weights, vectors, count, columns, sees, sums);
    }
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) {
#pragma unroll
      for (int i = 0; i < C; ++i) total[r][i] = total[r][i] + sums[r][i];
    }
  };
  add(p_columns, dout_rows, dvalue);
  add(ds_columns, query_rows, dkey);
  __syncwarp();  // the next block writes the columns again
}

// dkey and dvalue of a tile of kTileRows keys, a block each. The query rows of each sequence that sees them are cut into
// blocks of kKeyBlock, from the tile's first token or the beginning of a response on; warp w has the blocks w,
// w + kAttentionWarps, ... of all sequences in their order, and the sums of the warps join in order.
template <typename S, int C>
__global__ void __launch_bounds__(kAttentionThreads, 2) dkey_kernel(RaggedAttentionArgs a, int64_t shared_of_warp) {
  using A = Arith<S>;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t group = a.H / a.plan.K, tiles = tile_number(a.T, a.plan.N, 1), K = a.plan.K;
  S *dkey_out = static_cast<S*>(a.dkey), *dvalue_out = static_cast<S*>(a.dvalue);
  const auto poison = [&](int64_t token, int64_t first_head, int64_t end_head) {
    for (int64_t i = (token * K + first_head) * a.E; i < (token * K + end_head) * a.E; ++i) {
      from_arith(not_a_number<A>(), dkey_out + i);
      from_arith(not_a_number<A>(), dvalue_out + i);
    }
  };
  const int64_t index = blockIdx.x;
  if (index >= K * tiles) {
    const int64_t t = (index - K * tiles) * kAttentionThreads + threadIdx.x;
    if (blockIdx.y == 0 && t < a.T && !has_tile(a.plan.cu, a.plan.N, a.T, t)) poison(t, 0, K);
    return;
  }
  const int64_t kv_head = index / tiles;
  const AttentionTile tile = find_tile(a.plan.cu, a.plan.N, a.T, 1, index % tiles);
  if (tile.count == 0) return;
  const int64_t first_token = tile.first_token + tile.row;
  const RaggedGroup sequences = group_of(a, tile.sequence);
  if (!sequences.known) {
    const int t = threadIdx.x;
    if (t < tile.count && blockIdx.y == 0) poison(first_token + t, kv_head, kv_head + 1);
    return;
  }
  SharedParts shared{dynamic_shared<unsigned char>()};
  A* key_tile = shared.take<A>(a.E * kTileRows);
  A* value_tile = shared.take<A>(a.E * kTileRows);
  SharedParts parts{shared.next + warp * shared_of_warp};
  A* p_columns = parts.take<A>(kKeyBlock * kTileRows);
  A* ds_columns = parts.take<A>(kKeyBlock * kTileRows);
  const S** query_rows = parts.take<const S*>(kKeyBlock);
  const S** dout_rows = parts.take<const S*>(kKeyBlock);
  const auto rows_from = [&](const void* p, int64_t stride) {
    return [=](int r) { return static_cast<const S*>(p) + (first_token + r) * stride + kv_head * a.E; };
  };
  load_tile(rows_from(a.key, a.key_stride), tile.count, a.E, threadIdx.x, kAttentionThreads, key_tile);
  load_tile(rows_from(a.value, a.value_stride), tile.count, a.E, threadIdx.x, kAttentionThreads, value_tile);
  __syncthreads();
  const LaneColumns<C> columns(static_cast<int64_t>(blockIdx.y) * C * kWarpSize, a.E);
  A dkey[kTileRows][C], dvalue[kTileRows][C];
#pragma unroll
  for (int r = 0; r < kTileRows; ++r) {
#pragma unroll
    for (int i = 0; i < C; ++i) dkey[r][i] = dvalue[r][i] = 0;
  }
  const int64_t end_sequence = sequences.prompt == tile.sequence ? sequences.end : tile.sequence + 1;
  for (int64_t n = tile.sequence; n < end_sequence; ++n) {
    const int64_t begin = a.plan.cu[n], end = a.plan.cu[n + 1], rows = (end - begin) * group;
    if (begin < 0 || end > a.T) continue;  // not a sequence of this batch
    const bool own = n == tile.sequence;
    const int64_t start = (own ? tile.row * group : 0) + static_cast<int64_t>(warp) * kKeyBlock;
    for (int64_t first = start; first < rows; first += kAttentionWarps * kKeyBlock) {
      add_query_block<S>(a, kv_head, begin, first, rows, own, tile.row, tile.count, key_tile, value_tile, p_columns,
                         ds_columns, query_rows, dout_rows, columns, dkey, dvalue);
    }
  }
  __syncthreads();  // nobody needs the tiles any more: their memory takes the sums, each lane its own columns
  for (int w = 0; w < kAttentionWarps; ++w) {
    if (warp == w) {
#pragma unroll
      for (int i = 0; i < C; ++i) {
        if (!columns.inside[i]) continue;
        A *dkey_sum = key_tile + (i * kWarpSize + lane) * kTileRows,
          *dvalue_sum = value_tile + (i * kWarpSize + lane) * kTileRows;
        A dk[kTileRows]{}, dv[kTileRows]{};
        if (w > 0) {
          load_column(dkey_sum, dk);
          load_column(dvalue_sum, dv);
        }
#pragma unroll
        for (int r = 0; r < kTileRows; ++r) {
          dk[r] = dk[r] + dkey[r][i];
          dv[r] = dv[r] + dvalue[r][i];
          if (w + 1 < kAttentionWarps || r >= tile.count) continue;
          const int64_t at = ((first_token + r) * K + kv_head) * a.E + columns.at[i];
          from_arith(dk[r], dkey_out + at);
          from_arith(dv[r], dvalue_out + at);
        }
        store_column(dk, dkey_sum);
        store_column(dv, dvalue_sum);
      }
    }
    __syncthreads();
  }
}

}  // namespace

bool ragged_attention_transposes(const RaggedAttentionArgs& args) { return !attends_by_mma(args.dtype, args.E); }

void ragged_attention_forward_cuda(const RaggedAttentionArgs& args, CudaStream stream) {
  if (!ragged_attention_transposes(args)) {
    return launch_attention_mma("ragged_attention_forward", RaggedRowSource(args), rows_of(args), stream);
  }
  for_dtype(args.dtype, [&]<typename S>() {
    transpose<S>(args, args.key, args.key_stride, 1, args.key_t, stream);
    launch_attention<Attend::whole, S>("ragged_attention_forward", RaggedSource{args}, rows_of(args), stream);
  });
}

void ragged_attention_backward_cuda(const RaggedAttentionArgs& args, CudaStream stream) {
  for_dtype(args.dtype, [&]<typename S>() {
    using A = Arith<S>;
    const RaggedAttentionArgs& a = args;
    const int64_t group = a.H / a.plan.K;
    launch({"ragged_attention_centre", ceil_div(a.T * a.H, kAttentionWarps), kAttentionThreads, stream}, centre_kernel<S>,
           a);
    if (!ragged_attention_transposes(a)) return ragged_attention_backward_mma(a, stream);
    transpose<S>(a, a.key, a.key_stride, 1, a.key_t, stream);
    transpose<S>(a, a.value, a.value_stride, 1, a.value_t, stream);
    transpose<S>(a, a.query, a.query_stride, group, a.query_t, stream);
    transpose<S>(a, a.dout, a.H * a.E, group, a.dout_t, stream);
    const int64_t tiles = a.plan.K * tile_number(a.T, a.plan.N, group), warps = tiles + ceil_div(a.T, kWarpSize);
    const int64_t key_tiles = a.plan.K * tile_number(a.T, a.plan.N, 1);
    for_columns<S>(a.E, [&]<int C>() {
      const int64_t column_blocks = ceil_div(a.E, C * kWarpSize);
      launch({.name = "ragged_attention_dquery",
              .blocks = ceil_div(warps, kAttentionWarps),
              .threads = kAttentionThreads,
              .stream = stream,
              .shared_bytes = kAttentionWarps * dquery_shared<A>(a.E),
              .blocks_y = column_blocks},
             dquery_kernel<S, C>, a, dquery_shared<A>(a.E));
      launch({.name = "ragged_attention_dkey",
              .blocks = key_tiles + ceil_div(a.T, kAttentionThreads),
              .threads = kAttentionThreads,
              .stream = stream,
              .shared_bytes = dkey_shared<A>(a.E),
              .blocks_y = column_blocks},
             dkey_kernel<S, C>, a, dkey_shared_of_warp<A>());
    });
  });
}

}  // namespace grpo_engine
