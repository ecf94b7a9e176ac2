// ragged_attention_mma.cuh -- ragged_attention of bfloat16 heads of up to 128 on the tensor cores: the addresses of its
// keys, and the backward pass.
//
// Each row has a max, an inverse and a centre (dout . out). Then p = exp(scale q . k - max) inverse and
// ds = p (dout . v - centre) scale. Both are rounded to bfloat16 for the second matmuls. Sums are float32 chains over keys
// (dquery) or rows (dkey, dvalue), in order.
#pragma once
#include "core/attention_mma.cuh"
#include "ops/ragged_groups.cuh"

namespace grpo_engine {

// Keys and values in the order of the tensors.
template <typename S>
struct RaggedRows : RaggedTokens {
  const S *key, *value;  // first rows of the kv head
  int64_t key_stride, value_stride;

  static constexpr bool kAcross = false;
  const S* anything = key;
  struct Octet {
    bool known;
    const RaggedRows& keys;
    int position;

    __device__ const S* key_row(int i) const { return keys.key + keys.token(position + i) * keys.key_stride; }
    __device__ const S* value_row(int i) const { return keys.value + keys.token(position + i) * keys.value_stride; }
  };
  __device__ Octet octet(int position) const { return {true, *this, position}; }
};
struct RaggedRowSource {
  RaggedAttentionArgs a;
  bool query_aligned, key_aligned, value_aligned, dout_aligned;

  explicit RaggedRowSource(const RaggedAttentionArgs& args) : a(args) {
    const bool columns = a.E % kPack<bfloat16> == 0;
    query_aligned = columns && rows_aligned<bfloat16>(a.query, a.query_stride);
    key_aligned = columns && rows_aligned<bfloat16>(a.key, a.key_stride);
    value_aligned = columns && rows_aligned<bfloat16>(a.value, a.value_stride);
    dout_aligned = columns && rows_aligned<bfloat16>(a.dout, a.H * a.E);
  }

  template <typename S>
  __device__ RaggedRows<S> open(int64_t sequence, int64_t kv_head, int64_t tokens) const {
    return {RaggedTokens(a, sequence, tokens), static_cast<const S*>(a.key) + kv_head * a.E,
            static_cast<const S*>(a.value) + kv_head * a.E, a.key_stride, a.value_stride};
  }
};

// ---------------------------------------------------------------- backward

inline constexpr int kBackwardRows = 64;  // of a block, and of what it meets at a time: keys or query rows
inline constexpr int kBackwardPart = 32;  // of those, whose two matmuls are in registers
static_assert(kBackwardRows == kMmaRows);

template <int kWidth>
using BackwardTile = Tile<kBackwardRows, kWidth>;

// Two tiles that stay and two that change, the latter twice: one pair is loaded while the other is multiplied. Behind them
// lie the statistics of the rows that change, three for each.
template <int kWidth>
struct BackwardTiles {
  static constexpr int64_t kElements = kBackwardRows * kWidth;
  static constexpr int64_t kBytes =
      6 * kElements * static_cast<int64_t>(sizeof(bfloat16)) + 2 * 3 * kBackwardRows * static_cast<int64_t>(sizeof(float));

  bfloat16 *first, *second, *moving;
  float* stats;

  __device__ BackwardTiles() {
    SharedParts parts{dynamic_shared<unsigned char>()};
    first = parts.take<bfloat16>(kElements);
    second = parts.take<bfloat16>(kElements);
    moving = parts.take<bfloat16>(4 * kElements);
    stats = parts.take<float>(2 * 3 * kBackwardRows);
  }
  __device__ bfloat16* moving_first(int side) const { return moving + 2 * side * kElements; }
  __device__ bfloat16* moving_second(int side) const { return moving + (2 * side + 1) * kElements; }
  __device__ float* stats_of(int side) const { return stats + side * 3 * kBackwardRows; }
};

template <int kWidth>
__device__ inline void load_query_rows(const void* from, int64_t stride, const MmaRows& rows, int64_t E, bool aligned,
                                       bfloat16* tile) {
  const auto* first = static_cast<const bfloat16*>(from);
  load_rows<BackwardTile<kWidth>>(
      [&](int r) { return r < rows.count ? first + rows.token_of(r) * stride + rows.head_of(r) * E : nullptr; }, first, E,
      aligned, tile);
}

// dquery of 64 rows. The block takes the blocks of keys in order.
template <int kWidth>
__global__ void __launch_bounds__(kAttentionThreads, 2) dquery_mma_kernel(RaggedRowSource source) {
  using T = BackwardTile<kWidth>;
  const RaggedAttentionArgs& a = source.a;
  const int64_t group = a.H / a.plan.K, tiles = tile_number<kMmaRows>(a.T, a.plan.N, group), index = blockIdx.x;
  auto* dquery = static_cast<bfloat16*>(a.dquery);
  if (index >= a.plan.K * tiles) {
    const int64_t t = (index - a.plan.K * tiles) * kAttentionThreads + threadIdx.x;
    if (t >= a.T || has_tile(a.plan.cu, a.plan.N, a.T, t)) return;
    for (int64_t i = 0; i < a.H * a.E; ++i) from_arith(not_a_number<float>(), dquery + t * a.H * a.E + i);
    return;
  }
  const int64_t late_first = a.plan.K * tiles - 1 - index, kv_head = late_first / tiles;
  const AttentionTile tile = find_tile<kMmaRows>(a.plan.cu, a.plan.N, a.T, group, late_first % tiles);
  if (tile.count == 0) return;
  const auto keys = source.template open<bfloat16>(tile.sequence, kv_head, tile.tokens);
  const MmaRows rows = rows_of(tile, kv_head, group);
  const auto sees = [&](int r) { return keys_seen(tile, rows, keys.before, r); };
  const int least = sees(0), most = sees(rows.count - 1);
  const MmaLane lane;
  const BackwardTiles<kWidth> shared;
  const bool works = lane.warp * 16 < rows.count;
  int seen[2];
  float max[2], inverse[2], centre[2];
#pragma unroll
  for (int x = 0; x < 2; ++x) {
    const int r = lane.row_of(x) < rows.count ? lane.row_of(x) : 0;
    const int64_t at = rows.token_of(r) * a.H + rows.head_of(r);
    seen[x] = sees(lane.row_of(x));
    max[x] = static_cast<const float*>(a.stats)[at * 2];
    inverse[x] = static_cast<const float*>(a.stats)[at * 2 + 1];
    centre[x] = static_cast<const float*>(a.centre)[at];
  }
  const auto scale = static_cast<float>(a.scale);
  const auto load = [&](int begin, int side) {
    if (begin < most) {
      const auto row_from = [&](const bfloat16* first, int64_t stride) {
        return [=, &keys](int r) { return begin + r < most ? first + keys.token(begin + r) * stride : nullptr; };
      };
      load_rows<T>(row_from(keys.key, keys.key_stride), keys.key, a.E, source.key_aligned, shared.moving_first(side));
      load_rows<T>(row_from(keys.value, keys.value_stride), keys.value, a.E, source.value_aligned,
                   shared.moving_second(side));
    }
    end_copies();
  };
  if (most > 0) {
    load_query_rows<kWidth>(a.query, a.query_stride, rows, a.E, source.query_aligned, shared.first);
    load_query_rows<kWidth>(a.dout, a.H * a.E, rows, a.E, source.dout_aligned, shared.second);
    load(0, 0);
  }
  float sums[kWidth / 8][4] = {};
  for (int begin = 0, side = 0; begin < most; begin += kBackwardRows, side ^= 1) {
    load(begin + kBackwardRows, side ^ 1);
    copies_landed<1>();
    __syncthreads();
    bfloat16* const key = shared.moving_first(side);
    uint32_t slopes[kBackwardRows / 8][2];
    if (works) {
#pragma unroll
      for (int part = 0; part < kBackwardRows; part += kBackwardPart) {
        float dots[kBackwardPart / 8][4], douts[kBackwardPart / 8][4];
        row_matmul<T, T, false, kWidth>(shared.first, lane.warp * 16, key, part, kBackwardPart, dots);
        row_matmul<T, T, false, kWidth>(shared.second, lane.warp * 16, shared.moving_second(side), part, kBackwardPart,
                                        douts);
#pragma unroll
        for (int n = 0; n < kBackwardPart / 8; ++n) {
#pragma unroll
          for (int x = 0; x < 2; ++x) {
            float ds[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const float p = exp_below(dots[n][2 * x + i] * scale, max[x]) * inverse[x];
              const float g = p * (douts[n][2 * x + i] - centre[x]) * scale;
              ds[i] = begin + part + n * 8 + lane.column + i < seen[x] ? g : 0.f;
            }
            slopes[part / 8 + n][x] = pack_two(ds[0], ds[1]);
          }
        }
      }
    }
    if (least < begin + kBackwardRows) {  // a row that sees a key with NaN has NaN slopes; the others must not meet it
      __syncthreads();
      clear_not_finite<T>(key);
      __syncthreads();
    }
    if (works) weighted_rows<T, kWidth>(slopes, key, kBackwardRows, sums);
    __syncthreads();  // this side is read
  }
#pragma unroll
  for (int x = 0; x < 2; ++x) {
    const int r = lane.row_of(x);
    if (r >= rows.count) continue;
    const float nothing = seen[x] > 0 ? 0.f : not_a_number<float>();
#pragma unroll
    for (int n = 0; n < kWidth / 8; ++n) {
      store_columns(dquery + (rows.token_of(r) * a.H + rows.head_of(r)) * a.E, n * 8 + lane.column, a.E,
                    sums[n][2 * x] + nothing, sums[n][2 * x + 1] + nothing);
    }
  }
}

// dkey and dvalue of 64 keys. For each sequence that sees the keys, the block takes its query rows in blocks of 64. They are
// token-major, from the tile's first token or the beginning of a response on.
template <int kWidth>
__global__ void __launch_bounds__(kAttentionThreads, 2) dkey_mma_kernel(RaggedRowSource source) {
  using T = BackwardTile<kWidth>;
  const RaggedAttentionArgs& a = source.a;
  const int64_t tiles = tile_number<kBackwardRows>(a.T, a.plan.N, 1), K = a.plan.K, index = blockIdx.x;
  auto *dkey = static_cast<bfloat16*>(a.dkey), *dvalue = static_cast<bfloat16*>(a.dvalue);
  const auto poison = [&](int64_t token, int64_t first_head, int64_t end_head) {
    for (int64_t i = (token * K + first_head) * a.E; i < (token * K + end_head) * a.E; ++i) {
      from_arith(not_a_number<float>(), dkey + i);
      from_arith(not_a_number<float>(), dvalue + i);
    }
  };
  if (index >= K * tiles) {
    const int64_t t = (index - K * tiles) * kAttentionThreads + threadIdx.x;
    if (t < a.T && !has_tile(a.plan.cu, a.plan.N, a.T, t)) poison(t, 0, K);
    return;
  }
  const int64_t kv_head = index / tiles;
  const AttentionTile tile = find_tile<kBackwardRows>(a.plan.cu, a.plan.N, a.T, 1, index % tiles);
  if (tile.count == 0) return;
  const int64_t first_token = tile.first_token + tile.row;
  const RaggedGroup sequences = group_of(a, tile.sequence);
  if (!sequences.known) {
    const int t = threadIdx.x;
    if (t < tile.count) poison(first_token + t, kv_head, kv_head + 1);
    return;
  }
  const MmaLane lane;
  const BackwardTiles<kWidth> shared;
  const int group = static_cast<int>(a.H / K);
  const int64_t end_sequence = sequences.prompt == tile.sequence ? sequences.end : tile.sequence + 1;
  const auto rows_of_sequence = [&](int64_t n) {  // 0 for what is not a sequence of this batch
    const int64_t begin = a.plan.cu[n], end = a.plan.cu[n + 1];
    return begin < 0 || end > a.T ? 0 : (end - begin) * group;
  };
  struct Block {
    int64_t sequence, first;  // row of the sequence
  };
  // The block itself if it has rows, else the next one with rows. Past end_sequence there are none.
  const auto settle = [&](Block b) {
    while (b.sequence < end_sequence && b.first >= rows_of_sequence(b.sequence)) b = {b.sequence + 1, 0};
    return b;
  };
  const auto rows_of_block = [&](const Block& b) {
    const int64_t left = rows_of_sequence(b.sequence) - b.first;
    return MmaRows{a.plan.cu[b.sequence] + b.first / group, kv_head * group, static_cast<int>(b.first % group), group,
                   static_cast<int>(left < kBackwardRows ? left : kBackwardRows)};
  };
  const auto load = [&](const Block& b, int side) {
    if (b.sequence < end_sequence) {
      const MmaRows rows = rows_of_block(b);
      load_query_rows<kWidth>(a.query, a.query_stride, rows, a.E, source.query_aligned, shared.moving_first(side));
      load_query_rows<kWidth>(a.dout, a.H * a.E, rows, a.E, source.dout_aligned, shared.moving_second(side));
      const int r = threadIdx.x;
      if (r < rows.count) {
        const int64_t at = rows.token_of(r) * a.H + rows.head_of(r);
        const float centre = static_cast<const float*>(a.centre)[at];
        float* to = shared.stats_of(side) + r;
        to[0] = static_cast<const float*>(a.stats)[at * 2];
        // a dout that is not finite shows here: it makes the gradients of all keys that the row sees NaN
        to[kBackwardRows] = isfinite(centre) ? static_cast<const float*>(a.stats)[at * 2 + 1] : not_a_number<float>();
        to[2 * kBackwardRows] = centre;
      }
    }
    end_copies();
  };
  const auto row_from = [&](const void* p, int64_t stride) {
    return [&tile, from = static_cast<const bfloat16*>(p) + first_token * stride + kv_head * a.E, stride](int r) {
      return r < tile.count ? from + r * stride : nullptr;
    };
  };
  load_rows<T>(row_from(a.key, a.key_stride), static_cast<const bfloat16*>(a.key), a.E, source.key_aligned, shared.first);
  load_rows<T>(row_from(a.value, a.value_stride), static_cast<const bfloat16*>(a.value), a.E, source.value_aligned,
               shared.second);
  Block block = settle({tile.sequence, tile.row * group});
  load(block, 0);
  const auto scale = static_cast<float>(a.scale);
  float key_sums[kWidth / 8][4] = {}, value_sums[kWidth / 8][4] = {};
  for (int side = 0; block.sequence < end_sequence; side ^= 1) {
    const Block next = settle({block.sequence, block.first + kBackwardRows});
    load(next, side ^ 1);
    copies_landed<1>();
    __syncthreads();
    bfloat16 *const query = shared.moving_first(side), *const dout = shared.moving_second(side);
    const float* const stats = shared.stats_of(side);
    const bool own = block.sequence == tile.sequence;
    const int64_t left = rows_of_sequence(block.sequence) - block.first;
    const int count = static_cast<int>(left < kBackwardRows ? left : kBackwardRows);
    const int ahead = own ? static_cast<int>(block.first - tile.row * group) : 0;
    int first_row[2];  // of the block that sees the lane's keys
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      const int key = lane.row_of(x);
      first_row[x] = key >= tile.count ? kBackwardRows : own ? key * group - ahead : 0;
    }
    uint32_t weights[kBackwardRows / 8][2], slopes[kBackwardRows / 8][2];
#pragma unroll
    for (int part = 0; part < kBackwardRows; part += kBackwardPart) {
      float dots[kBackwardPart / 8][4], douts[kBackwardPart / 8][4];
      row_matmul<T, T, false, kWidth>(shared.first, lane.warp * 16, query, part, kBackwardPart, dots);
      row_matmul<T, T, false, kWidth>(shared.second, lane.warp * 16, dout, part, kBackwardPart, douts);
#pragma unroll
      for (int n = 0; n < kBackwardPart / 8; ++n) {
#pragma unroll
        for (int x = 0; x < 2; ++x) {
          float p[2], ds[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int r = part + n * 8 + lane.column + i;
            const float weight = exp_below(dots[n][2 * x + i] * scale, stats[r]) * stats[kBackwardRows + r];
            const float slope = weight * (douts[n][2 * x + i] - stats[2 * kBackwardRows + r]) * scale;
            const bool pair = r >= first_row[x] && r < count;
            p[i] = pair ? weight : 0.f;
            ds[i] = pair ? slope : 0.f;
          }
          weights[part / 8 + n][x] = pack_two(p[0], p[1]);
          slopes[part / 8 + n][x] = pack_two(ds[0], ds[1]);
        }
      }
    }
    if (own && ahead < (tile.count - 1) * group) {  // see dquery_mma_kernel
      __syncthreads();
      clear_not_finite<T>(query);
      clear_not_finite<T>(dout);
      __syncthreads();
    }
    weighted_rows<T, kWidth>(weights, dout, kBackwardRows, value_sums);
    weighted_rows<T, kWidth>(slopes, query, kBackwardRows, key_sums);
    __syncthreads();  // this side is read
    block = next;
  }
#pragma unroll
  for (int x = 0; x < 2; ++x) {
    const int key = lane.row_of(x);
    if (key >= tile.count) continue;
    const int64_t at = ((first_token + key) * K + kv_head) * a.E;
#pragma unroll
    for (int n = 0; n < kWidth / 8; ++n) {
      store_columns(dkey + at, n * 8 + lane.column, a.E, key_sums[n][2 * x], key_sums[n][2 * x + 1]);
      store_columns(dvalue + at, n * 8 + lane.column, a.E, value_sums[n][2 * x], value_sums[n][2 * x + 1]);
    }
  }
}

// Needs a.centre.
inline void ragged_attention_backward_mma(const RaggedAttentionArgs& a, CudaStream stream) {
  const RaggedRowSource source(a);
  const int64_t tiles = a.plan.K * tile_number<kMmaRows>(a.T, a.plan.N, a.H / a.plan.K);
  const int64_t key_tiles = a.plan.K * tile_number<kBackwardRows>(a.T, a.plan.N, 1), lost = ceil_div(a.T, kAttentionThreads);
  for_mma_width(a.E, [&]<int kWidth>() {
    const int64_t bytes = BackwardTiles<kWidth>::kBytes;
    launch({"ragged_attention_dquery", tiles + lost, kAttentionThreads, stream, bytes}, dquery_mma_kernel<kWidth>, source);
    launch({"ragged_attention_dkey", key_tiles + lost, kAttentionThreads, stream, bytes}, dkey_mma_kernel<kWidth>, source);
  });
}

}  // namespace grpo_engine
