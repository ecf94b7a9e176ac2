// attention_mma.cuh -- attention of bfloat16 heads of up to 128 on the tensor cores. Both ops run these kernels.
//
// For a query row that sees keys 0 .. L-1 by position in its sequence, for each chunk of kKeyChunk keys by itself:
//
//   s_j = scale * (q . k_j)           16 elements an mma, e ascending, float32 sums
//   m = max s_j   p_j = exp(s_j - m) rounded to bfloat16   l = sum p_j
//   o_e = sum p_j v_je                16 keys an mma, j ascending, float32 sums
//
// and the chunks join in their order: M = max(M, m), L = L exp(M_before - M) + l exp(m - M), O like L; the row is O / L.
// l sums the rounded p_j that the mma takes, so the weights of a row sum to one.
//
// The arithmetic of a key depends on its position alone. An element of an mma depends on its own row and column. So the
// bits of a row do not depend on the batch, the page layout or the rows that share its tile. One block may have all chunks
// of a row, or each chunk a block of its own.
//
// A block has 64 rows (token, head of a kv head), 16 a warp, and loads each key and value once for all of them. In decoding,
// sequences that have a chunk's keys in the same pages are rows of one block.
#pragma once
#include <type_traits>

#include "core/attention.cuh"
#include "core/mma.cuh"
#include "core/tile_load.cuh"

namespace grpo_engine {

inline constexpr int kKeyChunk = 128;
inline constexpr int kMmaRows = kAttentionWarps * 16;
inline constexpr int64_t kMostMmaWidth = 128;

// Depends on the type and width alone, so both ops choose alike.
inline bool attends_by_mma(DType dtype, int64_t E) { return dtype == DType::bf16 && E <= kMostMmaWidth; }

// ---------------------------------------------------------------- tiles

// The query rows of a block: neighbours in (token, head of the kv head), from head `skip` of the first token on.
struct MmaRows {
  int64_t token, head;  // the first token; the kv head's first query head
  int skip, group, count;

  __device__ int64_t token_of(int r) const { return token + (skip + r) / group; }
  __device__ int64_t head_of(int r) const { return head + (skip + r) % group; }
};

__device__ inline MmaRows rows_of(const AttentionTile& tile, int64_t kv_head, int64_t group) {
  return {tile.first_token + tile.row / group, kv_head * group, static_cast<int>(tile.row % group), static_cast<int>(group),
          tile.count};
}

// How many keys row r of a tile sees, 0 for a row that the tile lacks. `before`: keys of its sequence before its tokens.
__device__ inline int keys_seen(const AttentionTile& tile, const MmaRows& rows, int64_t before, int r) {
  const int64_t seen = before + (rows.token_of(r) - tile.first_token) + 1;
  return r < rows.count && seen > 0 ? static_cast<int>(seen) : 0;
}

// A block fills a tile of rows. Element 0 of row r is at row_of(r), which is null for a row of zeros.
template <typename T, typename RowOf>
__device__ inline void load_rows(RowOf row_of, const bfloat16* anything, int64_t E, bool aligned, bfloat16* tile) {
  constexpr int kNeighbours = 8;  // threads that load one row: 128 bytes
  constexpr int kRowsOfThread = T::kRows * kNeighbours / kAttentionThreads;
  static_assert(kRowsOfThread * kAttentionThreads == T::kRows * kNeighbours && T::kChunks % kNeighbours == 0);
#pragma unroll 4  // addresses take registers
  for (int i = 0; i < kRowsOfThread; ++i) {
    const int row = static_cast<int>(threadIdx.x) / kNeighbours * kRowsOfThread + i;
    const bfloat16* from = row_of(row);
#pragma unroll
    for (int chunk = threadIdx.x % kNeighbours; chunk < T::kChunks; chunk += kNeighbours) {
      const int n = from ? chunk_elements(E - chunk * T::kChunk) : 0;
      load_chunk(n > 0 ? from + chunk * T::kChunk : anything, n, aligned, tile + T::offset(row, chunk));
    }
  }
}

// The tiles of a block in shared memory. Keys gives their source:
//   kAcross      whether the keys of an octet are neighbours in memory for each e, or the e of a key
//   octet(p)     the 8 keys from position p on (p % 8 = 0), of which p is seen: `known` as in KeyAddress; key(e) with
//                kAcross, else key_row(i); value_row(i) of its key i, called only if a row sees that key
//   anything     an address as aligned as theirs
template <int kWidth, typename Keys>
struct MmaTiles {
  using Query = Tile<kMmaRows, kWidth>;
  using Key = std::conditional_t<Keys::kAcross, Tile<kWidth, kKeyChunk>, Tile<kKeyChunk, kWidth>>;
  using Value = Tile<kKeyChunk, kWidth>;
  static constexpr int64_t kBytes = (kMmaRows + 2 * kKeyChunk) * kWidth * static_cast<int64_t>(sizeof(bfloat16));

  bfloat16 *query, *key, *value;

  __device__ MmaTiles() {
    SharedParts parts{dynamic_shared<unsigned char>()};
    query = parts.take<bfloat16>(kMmaRows * kWidth);
    key = parts.take<bfloat16>(kKeyChunk * kWidth);
    value = parts.take<bfloat16>(kKeyChunk * kWidth);
  }

  __device__ void load_query(const bfloat16* from, int64_t stride, const MmaRows& rows, int64_t E, bool aligned) const {
    load_rows<Query>(
        [&](int r) { return r < rows.count ? from + rows.token_of(r) * stride + rows.head_of(r) * E : nullptr; }, from, E,
        aligned, query);
  }

  // Keys and values of the positions begin .. begin + kKeyChunk - 1 below `most`. Behind them the values are 0, since the
  // memory may hold NaN. A key whose address is not known is NaN.
  __device__ void load_key(const Keys& keys, int begin, int most, int64_t E, bool aligned) const {
    if constexpr (Keys::kAcross) {
      constexpr int kRowsAtOnce = kAttentionThreads / Key::kChunks;
      const int chunk = threadIdx.x % Key::kChunks, position = begin + chunk * Key::kChunk;
      const bool there = position < most;
      const auto octet = keys.octet(there ? position : begin);
#pragma unroll 4
      for (int i = 0; i < kWidth / kRowsAtOnce; ++i) {
        const int e = static_cast<int>(threadIdx.x) / Key::kChunks + i * kRowsAtOnce;
        bfloat16* to = key + Key::offset(e, chunk);
        if (octet.known) {
          const bool read = there && e < E;
          load_chunk(read ? octet.key(e) : keys.anything, read ? Key::kChunk : 0, aligned, to);
        } else {
          Stored<bfloat16> nan;
#pragma unroll
          for (int j = 0; j < Key::kChunk; ++j) nan.v[j].bits = 0x7FFF;
          store16(nan, to);
        }
      }
    } else {
      load_rows<Key>([&](int r) { return begin + r < most ? keys.octet(begin + r / 8 * 8).key_row(r % 8) : nullptr; },
                     keys.anything, E, aligned, key);
    }
  }
  __device__ void load_value(const Keys& keys, int begin, int most, int64_t E, bool aligned) const {
    constexpr int kRowsOfThread = 8;  // of load_rows: an octet
    const int position = begin + static_cast<int>(threadIdx.x) / 8 * kRowsOfThread;
    const auto octet = keys.octet(position < most ? position : begin);
    load_rows<Value>([&](int r) { return begin + r < most && octet.known ? octet.value_row(r % 8) : nullptr; },
                     keys.anything, E, aligned, value);
  }
};

// ---------------------------------------------------------------- one chunk of a warp's 16 rows

// A lane has rows lane / 4 and lane / 4 + 8 of its warp's and, of eight columns, 2 (lane % 4) and the next (mma.cuh).
struct MmaLane {
  int warp, row, column;

  __device__ MmaLane()
      : warp(threadIdx.x / kWarpSize), row(warp * 16 + threadIdx.x % kWarpSize / 4), column(threadIdx.x % 4 * 2) {}
  __device__ int row_of(int x) const { return row + x * 8; }  // of the block
};

// The lanes that share a row.
template <typename Op>
__device__ inline float row_reduce(float x, Op op) {
  x = op(x, __shfl_xor_sync(kAllLanes, x, 1));
  return op(x, __shfl_xor_sync(kAllLanes, x, 2));
}

// exp(x - max). 0 where nothing is seen so far: both are -inf then.
__device__ inline float exp_below(float x, float max) {
  constexpr float kLog2E = 1.4426950408889634f;
  return exp2f((x - (max == -infinity<float>() ? 0.f : max)) * kLog2E);
}

inline constexpr int kHalfChunk = kKeyChunk / 2;  // a half of which nobody in the block sees a key is left out

// out[n] = 16 rows of `a` from `row` on times the transposed columns first + n * 8 .. of `b`, kWidth elements each. kAcross:
// a row of `b` has one element of all columns. Columns from `limit` on are not needed.
template <typename A, typename B, bool kAcross, int kWidth, int kTiles>
__device__ inline void row_matmul(const bfloat16* a, int row, const bfloat16* b, int first, int limit,
                                  float (&out)[kTiles][4]) {
  constexpr int kColumns = kTiles * 8, kPart = kColumns < kHalfChunk ? kColumns : kHalfChunk;
#pragma unroll
  for (int part = 0; part < kColumns; part += kPart) {
#pragma unroll
    for (int n = part / 8; n < (part + kPart) / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[n][i] = 0;
    }
    if (part >= limit) continue;
#pragma unroll
    for (int k = 0; k < kWidth; k += 16) {
      uint32_t of_a[4];
      load_a<A, false>(a, row, k, of_a);
#pragma unroll
      for (int n = part; n < part + kPart; n += 16) {
        uint32_t of_b[4];
        load_two_b<B, kAcross>(b, first + n, k, of_b);
        mma_bf16_16x8x16(out[n / 8], of_a, {of_b[0], of_b[1]});
        mma_bf16_16x8x16(out[n / 8 + 1], of_a, {of_b[2], of_b[3]});
      }
    }
  }
}

// The results of a chunk for a lane's two rows.
struct ChunkSums {
  float max[2], sum[2];
};

// Turns dots into weights p. Row x sees seen[x] keys from the chunk's first on.
__device__ inline ChunkSums chunk_weights(const float (&dots)[kKeyChunk / 8][4], float scale, const int (&seen)[2],
                                          uint32_t (&weights)[kKeyChunk / 8][2]) {
  const MmaLane lane;
  ChunkSums sums;
#pragma unroll
  for (int x = 0; x < 2; ++x) {
    const auto score = [&](int n, int i) {
      return n * 8 + lane.column + i < seen[x] ? dots[n][2 * x + i] * scale : -infinity<float>();
    };
    float max = -infinity<float>();
#pragma unroll
    for (int n = 0; n < kKeyChunk / 8; ++n) max = Max{}(Max{}(max, score(n, 0)), score(n, 1));
    max = row_reduce(max, Max{});
    float sum = 0;
#pragma unroll
    for (int n = 0; n < kKeyChunk / 8; ++n) {
      const uint32_t two = pack_two(exp_below(score(n, 0), max), exp_below(score(n, 1), max));
      weights[n][x] = two;
      sum = sum + first_of(two);
      sum = sum + second_of(two);
    }
    sums.max[x] = max;
    sums.sum[x] = row_reduce(sum, Add{});
  }
  return sums;
}

// sums += weights (16 rows, kTiles * 8 keys) times the rows of `b`, for keys < limit.
template <typename B, int kWidth, int kTiles>
__device__ inline void weighted_rows(const uint32_t (&weights)[kTiles][2], const bfloat16* b, int limit,
                                     float (&sums)[kWidth / 8][4]) {
#pragma unroll
  for (int part = 0; part < kTiles * 8; part += kHalfChunk) {
    if (part >= limit) continue;
#pragma unroll
    for (int j = part; j < part + kHalfChunk; j += 16) {
      const uint32_t of_a[4] = {weights[j / 8][0], weights[j / 8][1], weights[j / 8 + 1][0], weights[j / 8 + 1][1]};
#pragma unroll
      for (int n = 0; n < kWidth; n += 16) {
        uint32_t of_b[4];
        load_two_b<B, true>(b, n, j, of_b);
        mma_bf16_16x8x16(sums[n / 8], of_a, {of_b[0], of_b[1]});
        mma_bf16_16x8x16(sums[n / 8 + 1], of_a, {of_b[2], of_b[3]});
      }
    }
  }
}

// ---------------------------------------------------------------- joining chunks

// The maximum and sum of a row so far. `join` takes in a chunk. It returns the factors of the sums before and of the chunk.
struct RowTotal {
  float max = -infinity<float>(), sum = 0;

  struct Factors {
    float before, chunk;
    __device__ float operator()(float total, float of_chunk) const { return fma(of_chunk, chunk, total * before); }
  };
  __device__ Factors join(float chunk_max, float chunk_sum) {
    const float top = Max{}(max, chunk_max);
    const Factors factors{exp_below(max, top), exp_below(chunk_max, top)};
    max = top;
    sum = factors(sum, chunk_sum);
    return factors;
  }
};

// Elements column and column + 1 of a row of E.
__device__ inline void store_columns(bfloat16* row, int column, int64_t E, float first, float second) {
  if (column + 1 < E && E % 2 == 0) {
    *reinterpret_cast<uint32_t*>(row + column) = pack_two(first, second);
    return;
  }
  if (column < E) from_arith(first, row + column);
  if (column + 1 < E) from_arith(second, row + column + 1);
}

__device__ inline bool is_finite(bfloat16 x) { return (x.bits & 0x7F80u) != 0x7F80u; }

// Calls use(chunk with 0 for every value that is not finite, its address) for each chunk of a tile that needs it. The
// threads of a block share the tile.
template <typename T, typename Use>
__device__ inline void each_not_finite(bfloat16* tile, Use use) {
  for (int i = threadIdx.x; i < T::kRows * T::kChunks; i += kAttentionThreads) {
    Stored<bfloat16> chunk = load16<Stored<bfloat16>>(tile + i * T::kChunk);
    bool finite = true;
#pragma unroll
    for (int j = 0; j < T::kChunk; ++j) {
      if (is_finite(chunk.v[j])) continue;
      finite = false;
      chunk.v[j].bits = 0;
    }
    if (!finite) use(chunk, tile + i * T::kChunk);
  }
}
template <typename T>
__device__ inline void clear_not_finite(bfloat16* tile) {
  each_not_finite<T>(tile, [](const Stored<bfloat16>& chunk, bfloat16* at) { store16(chunk, at); });
}

// For a chunk that some rows see in part. 0 * NaN is NaN, so values that are not finite may not go through the
// matmuls. Adds their terms to `sums` and replaces them by 0 in `value`, a tile of which `limit` rows count.
// `memory` takes the weights, [kMmaRows, kKeyChunk]. All threads of the block call this.
template <typename T, int kWidth>
__device__ inline void take_out_not_finite(const uint32_t (&weights)[kKeyChunk / 8][2], const int (&seen)[2], int limit,
                                           bfloat16* memory, bfloat16* value, float (&sums)[kWidth / 8][4]) {
  int found = 0;
  each_not_finite<T>(value, [&](const Stored<bfloat16>&, bfloat16*) { found = 1; });
  if (block_reduce(found, Max{}, 0) == 0) return;
  const MmaLane lane;
#pragma unroll
  for (int n = 0; n < kKeyChunk / 8; ++n) {
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      *reinterpret_cast<uint32_t*>(memory + lane.row_of(x) * kKeyChunk + n * 8 + lane.column) = weights[n][x];
    }
  }
  __syncwarp();
  for (int j = 0; j < limit; ++j) {
#pragma unroll
    for (int n = 0; n < kWidth / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const bfloat16 v = value[T::offset(j, n) + lane.column + i];
        if (is_finite(v)) continue;
#pragma unroll
        for (int x = 0; x < 2; ++x) {
          if (j >= seen[x]) continue;
          sums[n][2 * x + i] = fma(to_arith(memory[lane.row_of(x) * kKeyChunk + j]), to_arith(v), sums[n][2 * x + i]);
        }
      }
    }
  }
  __syncthreads();
  clear_not_finite<T>(value);
  __syncthreads();
}

// ---------------------------------------------------------------- the kernels

// The row (sequence, query head) of `partial`. It has E sums for each chunk, then the chunk's maximum and sum.
__device__ inline float* partial_of(const AttentionRows& a, int64_t sequence, int64_t head) {
  return static_cast<float*>(a.partial) + (sequence * a.H + head) * a.stretches * (a.E + 2);
}

// The rows of a sequence's one token, from their chunks.
__device__ inline void join_chunks(const AttentionRows& a, int64_t sequence, const MmaRows& rows, int64_t seen) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  constexpr int kColumns = static_cast<int>(kMostMmaWidth / kWarpSize);
  for (int r = warp; r < rows.count; r += kAttentionWarps) {
    const int64_t head = rows.head_of(r);
    const float* chunk = partial_of(a, sequence, head);
    RowTotal total;
    float out[kColumns] = {};
    for (int64_t begin = 0; begin < seen; begin += kKeyChunk, chunk += a.E + 2) {
      const auto factors = total.join(chunk[a.E], chunk[a.E + 1]);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        const int column = i * kWarpSize + lane;
        if (column < a.E) out[i] = factors(out[i], chunk[column]);
      }
    }
    const float inverse = 1.f / total.sum;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const int column = i * kWarpSize + lane;
      if (column < a.E)
        from_arith(out[i] * inverse, static_cast<bfloat16*>(a.out) + (rows.token * a.H + head) * a.E + column);
    }
  }
}

// A block has 64 rows of one sequence and kv head, over all their keys. Where `partial` has the chunks of a sequence's one
// token, the block joins them. The blocks past the tiles look for tokens without a sequence.
template <int kWidth, typename Source>
__global__ void __launch_bounds__(kAttentionThreads, kWidth == 64 ? 3 : 2)
    attention_mma_kernel(Source source, AttentionRows a) {
  using Keys = decltype(source.template open<bfloat16>(0, 0, 0));
  using Tiles = MmaTiles<kWidth, Keys>;
  const int64_t group = a.H / a.K, tiles = tile_number<kMmaRows>(a.T, a.N, group), index = blockIdx.x;
  if (index >= a.K * tiles) {
    const int64_t t = (index - a.K * tiles) * kAttentionThreads + threadIdx.x;
    if (t < a.T && !has_tile(a.cu, a.N, a.T, t)) poison_token<bfloat16>(a, t);
    return;
  }
  const int64_t late_first = a.K * tiles - 1 - index, kv_head = late_first / tiles;  // late tokens see more
  const AttentionTile tile = find_tile<kMmaRows>(a.cu, a.N, a.T, group, late_first % tiles);
  if (tile.count == 0) return;
  const Keys keys = source.template open<bfloat16>(tile.sequence, kv_head, tile.tokens);
  const MmaRows rows = rows_of(tile, kv_head, group);
  const auto sees = [&](int r) { return keys_seen(tile, rows, keys.before, r); };
  const int least = sees(0), most = sees(rows.count - 1);
  if (a.partial && tile.tokens == 1) return join_chunks(a, tile.sequence, rows, most);

  const MmaLane lane;
  const Tiles shared;
  const int seen[2] = {sees(lane.row_of(0)), sees(lane.row_of(1))};
  const bool works = lane.warp * 16 < rows.count;
  RowTotal total[2];
  float out[kWidth / 8][4] = {};
  if (most > 0) {
    shared.load_query(static_cast<const bfloat16*>(a.query), a.query_stride, rows, a.E, source.query_aligned);
    shared.load_key(keys, 0, most, a.E, source.key_aligned);
    end_copies();
    shared.load_value(keys, 0, most, a.E, source.value_aligned);
    end_copies();
  }
  for (int begin = 0; begin < most; begin += kKeyChunk) {
    const int end = begin + kKeyChunk, limit = (most < end ? most : end) - begin;
    const bool mixed = least < begin + limit;  // some row does not see every key
    const auto load_next_key = [&] {
      if (end < most) shared.load_key(keys, end, most, a.E, source.key_aligned);
      end_copies();  // an empty group keeps the count
    };
    const int seen_here[2] = {seen[0] - begin, seen[1] - begin};
    ChunkSums sums{};
    uint32_t weights[kKeyChunk / 8][2] = {};
    copies_landed<1>();
    __syncthreads();  // keys are there, the values of this chunk on their way
    if (works) {
      float dots[kKeyChunk / 8][4];
      row_matmul<typename Tiles::Query, typename Tiles::Key, Keys::kAcross, kWidth>(shared.query, lane.warp * 16, shared.key,
                                                                                    0, limit, dots);
      sums = chunk_weights(dots, static_cast<float>(a.scale), seen_here, weights);
    }
    __syncthreads();  // the keys are read
    mixed ? end_copies() : load_next_key();
    copies_landed<1>();
    __syncthreads();  // values are there
    float of_chunk[kWidth / 8][4] = {};
    if (mixed) {
      take_out_not_finite<typename Tiles::Value, kWidth>(weights, seen_here, limit, shared.key, shared.value, of_chunk);
    }
    if (works) {
      weighted_rows<typename Tiles::Value, kWidth>(weights, shared.value, limit, of_chunk);
#pragma unroll
      for (int x = 0; x < 2; ++x) {
        if (seen_here[x] <= 0) continue;
        const auto factors = total[x].join(sums.max[x], sums.sum[x]);
#pragma unroll
        for (int n = 0; n < kWidth / 8; ++n) {
          out[n][2 * x] = factors(out[n][2 * x], of_chunk[n][2 * x]);
          out[n][2 * x + 1] = factors(out[n][2 * x + 1], of_chunk[n][2 * x + 1]);
        }
      }
    }
    __syncthreads();  // the values are read
    if (mixed) load_next_key();
    if (end < most) shared.load_value(keys, end, most, a.E, source.value_aligned);
    end_copies();
  }
#pragma unroll
  for (int x = 0; x < 2; ++x) {
    const int r = lane.row_of(x);
    if (r >= rows.count) continue;
    const int64_t at = rows.token_of(r) * a.H + rows.head_of(r);
    const float inverse = 1.f / total[x].sum;  // of no key 1 / 0: the row becomes 0 * inf = NaN
#pragma unroll
    for (int n = 0; n < kWidth / 8; ++n) {
      store_columns(static_cast<bfloat16*>(a.out) + at * a.E, n * 8 + lane.column, a.E, out[n][2 * x] * inverse,
                    out[n][2 * x + 1] * inverse);
    }
    if (a.stats && lane.column == 0) {
      static_cast<float*>(a.stats)[at * 2] = total[x].max;
      static_cast<float*>(a.stats)[at * 2 + 1] = inverse;
    }
  }
}

// How many consecutive sequences from `first` on, in steps of 1 or -1, share the pages of the keys begin .. end - 1 with
// their successor, at most kWarpSize. All lanes of a warp call this.
template <typename Source>
__device__ inline int count_sharing(const Source& source, int64_t first, int step, int begin) {
  const int lane = threadIdx.x % kWarpSize;
  const unsigned votes = __ballot_sync(kAllLanes, source.same_pages(first + step * lane, begin, begin + kKeyChunk));
  return votes == kAllLanes ? kWarpSize : __ffs(static_cast<int>(~votes)) - 1;
}

// For decoding, where the tiles of attention_mma_kernel are few. A block has one chunk of keys at a time, of a run of
// sequences that share its pages and have one new token each. The kernel finds the runs in the page table, which is small
// beside the keys. A host that planned them would wait for the table, and could not see that of a recorded graph.
template <int kWidth, typename Source>
__global__ void __launch_bounds__(kAttentionThreads, kWidth == 64 ? 3 : 2)
    attention_chunk_kernel(Source source, AttentionRows a) {
  using Keys = decltype(source.template open<bfloat16>(0, 0, 0));
  using Tiles = MmaTiles<kWidth, Keys>;
  const int group = static_cast<int>(a.H / a.K), pieces = (group + kMmaRows - 1) / kMmaRows;
  const int64_t sequence = blockIdx.x % a.N, piece = blockIdx.x / a.N % pieces, kv_head = blockIdx.x / a.N / pieces % a.K;
  const int first_chunk = static_cast<int>(blockIdx.x / a.N / pieces / a.K);
  const int step = static_cast<int>(gridDim.x / a.N / pieces / a.K);  // chunks that are at work together
  const int64_t token = a.cu[sequence];
  if (token < 0 || token >= a.T || a.cu[sequence + 1] != token + 1) return;
  const Keys keys = source.template open<bfloat16>(sequence, kv_head, 1);
  const int most = keys.before < 0 ? 0 : static_cast<int>(keys.before) + 1;
  const int fit = kMmaRows / group, skip = static_cast<int>(piece) * kMmaRows;  // sequences that a block has room for
  const MmaLane lane;
  const Tiles shared;
  for (int chunk = first_chunk; chunk * kKeyChunk < most; chunk += step) {
    const int begin = chunk * kKeyChunk, limit = most - begin < kKeyChunk ? most - begin : kKeyChunk;
    int sequences = 1;
    if (fit > 1 && limit == kKeyChunk) {
      int64_t before = 0;
      for (int more = kWarpSize; more == kWarpSize; before += more)
        more = count_sharing(source, sequence - 1 - before, -1, begin);
      if (before % fit != 0) continue;  // an earlier sequence's block has this one
      for (int more = kWarpSize; more == kWarpSize && sequences < fit; sequences += more) {
        more = count_sharing(source, sequence + sequences - 1, 1, begin);
      }
      if (sequences > fit) sequences = fit;
    }
    const int left = sequences * group - skip;
    const MmaRows rows{token, kv_head * group, skip, group, left < kMmaRows ? left : kMmaRows};
    __syncthreads();  // the chunk before is read
    shared.load_query(static_cast<const bfloat16*>(a.query), a.query_stride, rows, a.E, source.query_aligned);
    shared.load_key(keys, begin, most, a.E, source.key_aligned);
    end_copies();
    shared.load_value(keys, begin, most, a.E, source.value_aligned);
    end_copies();
    const bool works = lane.warp * 16 < rows.count;
    const int seen[2] = {limit, limit};
    ChunkSums sums{};
    uint32_t weights[kKeyChunk / 8][2];
    copies_landed<1>();
    __syncthreads();
    if (works) {
      float dots[kKeyChunk / 8][4];
      row_matmul<typename Tiles::Query, typename Tiles::Key, Keys::kAcross, kWidth>(shared.query, lane.warp * 16, shared.key,
                                                                                    0, limit, dots);
      sums = chunk_weights(dots, static_cast<float>(a.scale), seen, weights);
    }
    copies_landed<0>();
    __syncthreads();
    if (!works) continue;
    float out[kWidth / 8][4] = {};
    weighted_rows<typename Tiles::Value, kWidth>(weights, shared.value, limit, out);
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      const int r = lane.row_of(x);
      if (r >= rows.count) continue;
      float* to = partial_of(a, sequence + rows.token_of(r) - token, rows.head_of(r)) + chunk * (a.E + 2);
#pragma unroll
      for (int n = 0; n < kWidth / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int column = n * 8 + lane.column + i;
          if (column < a.E) to[column] = out[n][2 * x + i];
        }
      }
      if (lane.column == 0) {
        to[a.E] = sums.max[x];
        to[a.E + 1] = sums.sum[x];
      }
    }
  }
}

// Calls function.operator()<kWidth>() with the width of a tile that holds E columns.
template <typename Function>
void for_mma_width(int64_t E, Function function) {
  E <= 64 ? function.template operator()<64>() : function.template operator()<static_cast<int>(kMostMmaWidth)>();
}

// A Source also has query_aligned, ...: whether the addresses of queries, keys and values are aligned to 16 bytes.
template <typename Source>
void launch_attention_mma(const char* name, const Source& source, const AttentionRows& a, CudaStream stream) {
  const int64_t tiles = a.K * tile_number<kMmaRows>(a.T, a.N, a.H / a.K);
  for_mma_width(a.E, [&]<int kWidth>() {
    using Keys = decltype(source.template open<bfloat16>(0, 0, 0));
    launch({.name = name,
            .blocks = tiles + ceil_div(a.T, kAttentionThreads),
            .threads = kAttentionThreads,
            .stream = stream,
            .shared_bytes = MmaTiles<kWidth, Keys>::kBytes},
           attention_mma_kernel<kWidth, Source>, source, a);
  });
}

inline constexpr int64_t kManyBlocks = 2048;  // four rounds of a large GPU; blocks that find no chunk take time too

// The chunks of all sequences with one new token, into a.partial. A Source also has
//   same_pages(n, begin, end)   whether sequences n and n + 1 have one new token each and see all keys of the positions
//     begin .. end - 1, in the same pages; false where either is not there
template <typename Source>
void launch_attention_chunks(const char* name, const Source& source, const AttentionRows& a, CudaStream stream) {
  const int64_t each = a.N * ceil_div(a.H / a.K, kMmaRows) * a.K, wanted = ceil_div(kManyBlocks, each);
  for_mma_width(a.E, [&]<int kWidth>() {
    using Keys = decltype(source.template open<bfloat16>(0, 0, 0));
    launch({.name = name,
            .blocks = each * (wanted < a.stretches ? wanted : a.stretches),
            .threads = kAttentionThreads,
            .stream = stream,
            .shared_bytes = MmaTiles<kWidth, Keys>::kBytes},
           attention_chunk_kernel<kWidth, Source>, source, a);
  });
}

}  // namespace grpo_engine
