#include "ops/linear.h"

#include <type_traits>

#include "core/mma.cuh"
#include "core/tile_load.cuh"
#include "ops/linear_tiles.cuh"
#include "ops/linear_wgmma.cuh"

namespace grpo_engine {
namespace {

// ---------------------------------------------------------------- bfloat16: tensor cores

constexpr int kK = 32;      // of a stage
constexpr int kStages = 4;  // of shared memory: while one is multiplied the others are on their way
static_assert(kChunk % kK == 0);

template <int kM_, int kN_, int kWarpsM_, int kWarpsN_, int kResident_>
struct MmaShape {
  static constexpr int kResident = kResident_;                // blocks of a multiprocessor, at least
  static constexpr int kM = kM_, kN = kN_;                    // of a block
  static constexpr int kWarpsM = kWarpsM_, kWarpsN = kWarpsN_;
  static constexpr int kThreads = kWarpsM * kWarpsN * kWarpSize;
  static constexpr int kRows = kM / kWarpsM / 16, kColumns = kN / kWarpsN / 8;  // of a warp, in mmas of mma.cuh
  static_assert(kColumns % 2 == 0);
};
using LargeMma = MmaShape<128, 128, 2, 4, 1>;
using SmallMma = MmaShape<32, 64, 2, 2, 4>;

// kAcrossA: A is stored with m adjacent, else k; kAcrossB: B with n adjacent, else k.
template <typename Shape, bool kAcrossA, bool kAcrossB>
struct MmaTiles {
  using A = std::conditional_t<kAcrossA, Tile<kK, Shape::kM>, Tile<Shape::kM, kK>>;
  using B = std::conditional_t<kAcrossB, Tile<kK, Shape::kN>, Tile<Shape::kN, kK>>;
  static constexpr int kStage = (Shape::kM + Shape::kN) * kK;  // elements
};

template <typename Shape, bool kAcrossA, bool kAcrossB>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kResident)
    gemm_mma_kernel(GemmArgs a, bool a_aligned, bool b_aligned, bool pairs) {
  using Tiles = MmaTiles<Shape, kAcrossA, kAcrossB>;
  bfloat16* const shared = dynamic_shared<bfloat16>();
  const TileOrigin origin(a, Shape::kM, Shape::kN);
  const int64_t slices = (a.K + kK - 1) / kK, stages = a.a_low ? 2 * slices : slices;

  const auto load = [&](int64_t stage) {
    if (stage < stages) {
      const bool low = stage >= slices;
      const int64_t k = (low ? stage - slices : stage) * kK;
      const auto* from_a = static_cast<const bfloat16*>(low ? a.a_low : a.a);
      const auto* from_b = static_cast<const bfloat16*>(a.b);
      bfloat16* to = shared + stage % kStages * Tiles::kStage;
      if constexpr (kAcrossA) {
        load_tile<typename Tiles::A, Shape::kThreads>(from_a + k * a.a_col + origin.m, a.a_col, a.K - k, a.M - origin.m,
                                                      a_aligned, to);
      } else {
        load_tile<typename Tiles::A, Shape::kThreads>(from_a + origin.m * a.a_row + k, a.a_row, a.M - origin.m, a.K - k,
                                                      a_aligned, to);
      }
      to += Shape::kM * kK;
      if constexpr (kAcrossB) {
        load_tile<typename Tiles::B, Shape::kThreads>(from_b + k * a.b_row + origin.n, a.b_row, a.K - k, a.N - origin.n,
                                                      b_aligned, to);
      } else {
        load_tile<typename Tiles::B, Shape::kThreads>(from_b + origin.n * a.b_col + k, a.b_col, a.N - origin.n, a.K - k,
                                                      b_aligned, to);
      }
    }
    end_copies();  // an empty group keeps the count
  };

  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int warp_m = warp / Shape::kWarpsN * Shape::kRows * 16, warp_n = warp % Shape::kWarpsN * Shape::kColumns * 8;
  const int64_t first_m = origin.m + warp_m + lane / 4, first_n = origin.n + warp_n + lane % 4 * 2;
  float total[Shape::kRows][Shape::kColumns][4] = {}, d[Shape::kRows][Shape::kColumns][4] = {};
  if (a.accumulate) {
#pragma unroll
    for (int i = 0; i < Shape::kRows; ++i) {
#pragma unroll
      for (int j = 0; j < Shape::kColumns; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int64_t m = first_m + i * 16 + e / 2 * 8, n = first_n + j * 8 + e % 2;
          if (m < a.M && n < a.N) total[i][j][e] = static_cast<const float*>(a.c)[m * a.c_row + n];
        }
      }
    }
  }
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) load(stage);
  for (int64_t stage = 0; stage < stages; ++stage) {
    copies_landed<kStages - 2>();
    __syncthreads();  // everybody's copies of this stage are there, and the stage before is read
    load(stage + kStages - 1);
    const bfloat16* const tile_a = shared + stage % kStages * Tiles::kStage;
    const bfloat16* const tile_b = tile_a + Shape::kM * kK;
#pragma unroll
    for (int k = 0; k < kK; k += 16) {
      uint32_t of_a[Shape::kRows][4];
#pragma unroll
      for (int i = 0; i < Shape::kRows; ++i) load_a<typename Tiles::A, kAcrossA>(tile_a, warp_m + i * 16, k, of_a[i]);
#pragma unroll
      for (int j = 0; j < Shape::kColumns; j += 2) {
        uint32_t b[4];
        load_two_b<typename Tiles::B, kAcrossB>(tile_b, warp_n + j * 8, k, b);
#pragma unroll
        for (int i = 0; i < Shape::kRows; ++i) {
          mma_bf16_16x8x16(d[i][j], of_a[i], {b[0], b[1]});
          mma_bf16_16x8x16(d[i][j + 1], of_a[i], {b[2], b[3]});
        }
      }
    }
    const int64_t done = (stage < slices ? stage : stage - slices) + 1;  // slices of this part of A
    if (done % (kChunk / kK) != 0 && done != slices) continue;
#pragma unroll
    for (int i = 0; i < Shape::kRows; ++i) {
#pragma unroll
      for (int j = 0; j < Shape::kColumns; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          total[i][j][e] = total[i][j][e] + d[i][j][e];
          d[i][j][e] = 0.f;
        }
      }
    }
  }
#pragma unroll
  for (int j = 0; j < Shape::kColumns; ++j) {
    const int64_t n = first_n + j * 8;
    const float one = bias_of(a, n), two = bias_of(a, n + 1);
#pragma unroll
    for (int i = 0; i < Shape::kRows; ++i) {
      store_two(a, first_m + i * 16, n, total[i][j][0] + one, total[i][j][1] + two, pairs);
      store_two(a, first_m + i * 16 + 8, n, total[i][j][2] + one, total[i][j][3] + two, pairs);
    }
  }
}

template <typename Shape, bool kAcrossA, bool kAcrossB>
void run_mma(const GemmArgs& a, CudaStream stream) {
  const int64_t stride_a = kAcrossA ? a.a_col : a.a_row, stride_b = kAcrossB ? a.b_row : a.b_col;
  const bool a_aligned = rows_aligned<bfloat16>(a.a, stride_a) && (!a.a_low || rows_aligned<bfloat16>(a.a_low, stride_a));
  const int64_t bytes = int64_t{kStages} * MmaTiles<Shape, kAcrossA, kAcrossB>::kStage * 2;
  launch({"gemm_bf16", tiles_of<Shape>(a), Shape::kThreads, stream, bytes}, gemm_mma_kernel<Shape, kAcrossA, kAcrossB>, a,
         a_aligned, rows_aligned<bfloat16>(a.b, stride_b), pairs_aligned(a));
}

template <typename Shape>
void run_mma_for(const GemmArgs& a, CudaStream stream) {
  if (a.a_col != 1) return run_mma<Shape, true, true>(a, stream);
  a.b_row != 1 ? run_mma<Shape, false, true>(a, stream) : run_mma<Shape, false, false>(a, stream);
}

// ---------------------------------------------------------------- bfloat16: a few rows

// Decoding reads the weights once for a few rows, and what counts is how many loads are in flight. A block has all rows and
// a few columns; its warps take the chunks of k in turn, each with tiles of its own and without a barrier, and after each
// round the chunks' sums meet in shared memory.
template <int kM_, int kN_, int kStages_, int kWarps_>
struct FewRowsShape {
  static constexpr int kM = kM_, kN = kN_;                 // of a block, and of each of its warps
  static constexpr int kStages = kStages_, kWarps = kWarps_;  // warps at most
  static constexpr int kRows = kM / 16, kColumns = kN / 8;    // in mmas of mma.cuh
  using A = Tile<kM, kK>;
  using B = Tile<kN, kK>;
  static constexpr int kStage = (kM + kN) * kK;  // elements
  static constexpr int kOfWarp = kStages * kStage * static_cast<int>(sizeof(bfloat16));  // bytes
  static constexpr int kSums = kM * kN * static_cast<int>(sizeof(float));                // bytes
  static_assert(kSums <= kOfWarp, "the sums of a warp's chunk take the place of its tiles");
};
constexpr int64_t kFewRows = 64;   // more rows have the tiles above
constexpr int64_t kFewBlocks = 56;  // that keep the memory busy: with fewer, a block gets fewer columns

template <typename Shape>
__global__ void __launch_bounds__(Shape::kWarps* kWarpSize)
    gemm_few_rows_kernel(GemmArgs a, bool a_aligned, bool b_aligned, bool pairs) {
  unsigned char* const shared = dynamic_shared<unsigned char>();
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, warps = blockDim.x / kWarpSize;
  const auto sums_of = [&](int w) { return reinterpret_cast<Two*>(shared + Shape::kSums + w * Shape::kOfWarp); };
  Two* const totals = reinterpret_cast<Two*>(shared);
  bfloat16* const tiles = reinterpret_cast<bfloat16*>(sums_of(warp));
  const int64_t first_n = static_cast<int64_t>(blockIdx.x) * Shape::kN, chunks = (a.K + kChunk - 1) / kChunk;
  for (int64_t first = 0; first < chunks; first += warps) {
    if (first + warp < chunks) {
      const int64_t begin = (first + warp) * kChunk, length = a.K - begin < kChunk ? a.K - begin : kChunk;
      const int steps = static_cast<int>((length + kK - 1) / kK);
      const auto load = [&](int step) {
        if (step < steps) {
          const int64_t k = begin + step * kK;
          bfloat16* const to = tiles + step % Shape::kStages * Shape::kStage;
          load_tile<typename Shape::A, kWarpSize>(static_cast<const bfloat16*>(a.a) + k, a.a_row, a.M, a.K - k, a_aligned,
                                                  to, lane);
          load_tile<typename Shape::B, kWarpSize>(static_cast<const bfloat16*>(a.b) + first_n * a.b_col + k, a.b_col,
                                                  a.N - first_n, a.K - k, b_aligned, to + Shape::kM * kK, lane);
        }
        end_copies();  // an empty group keeps the count
      };
      float d[Shape::kRows][Shape::kColumns][4] = {};
#pragma unroll
      for (int step = 0; step < Shape::kStages - 1; ++step) load(step);
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        copies_landed<Shape::kStages - 2>();
        __syncwarp();  // all lanes' copies of this step are there, and the step before is read
        load(step + Shape::kStages - 1);
        const bfloat16* const tile_a = tiles + step % Shape::kStages * Shape::kStage;
        const bfloat16* const tile_b = tile_a + Shape::kM * kK;
#pragma unroll
        for (int k = 0; k < kK; k += 16) {
          uint32_t of_a[Shape::kRows][4];
#pragma unroll
          for (int i = 0; i < Shape::kRows; ++i) load_a<typename Shape::A, false>(tile_a, i * 16, k, of_a[i]);
#pragma unroll
          for (int j = 0; j < Shape::kColumns; j += 2) {
            uint32_t b[4];
            load_two_b<typename Shape::B, false>(tile_b, j * 8, k, b);
#pragma unroll
            for (int i = 0; i < Shape::kRows; ++i) {
              mma_bf16_16x8x16(d[i][j], of_a[i], {b[0], b[1]});
              mma_bf16_16x8x16(d[i][j + 1], of_a[i], {b[2], b[3]});
            }
          }
        }
      }
      __syncwarp();  // the last tiles are read
      Two* const mine = sums_of(warp);
#pragma unroll
      for (int i = 0; i < Shape::kRows; ++i) {
#pragma unroll
        for (int j = 0; j < Shape::kColumns; ++j) {
          const int at = ((i * 16 + lane / 4) * Shape::kN + j * 8) / 2 + lane % 4;
          mine[at] = Two{d[i][j][0], d[i][j][1]};
          mine[at + 8 * Shape::kN / 2] = Two{d[i][j][2], d[i][j][3]};
        }
      }
    }
    __syncthreads();
    const int here = static_cast<int>(chunks - first < warps ? chunks - first : warps);
    for (int i = threadIdx.x; i < static_cast<int>(a.M) * Shape::kN / 2; i += blockDim.x) {
      Two total = first == 0 ? Two{0.f, 0.f} : totals[i];
      for (int w = 0; w < here; ++w) {
        const Two part = sums_of(w)[i];
        total = Two{total.first + part.first, total.second + part.second};
      }
      totals[i] = total;
      if (first + warps < chunks) continue;
      const int64_t n = first_n + i * 2 % Shape::kN;
      store_two(a, i * 2 / Shape::kN, n, total.first + bias_of(a, n), total.second + bias_of(a, n + 1), pairs);
    }
    __syncthreads();  // the sums are read: the next round's tiles take their place
  }
}

template <typename Shape>
void run_few_rows(const GemmArgs& a, CudaStream stream) {
  const int64_t chunks = ceil_div(a.K, kChunk), rounds = ceil_div(chunks, Shape::kWarps), warps = ceil_div(chunks, rounds);
  launch({"gemm_few_rows", ceil_div(a.N, Shape::kN), static_cast<int>(warps) * kWarpSize, stream,
          Shape::kSums + warps * Shape::kOfWarp},
         gemm_few_rows_kernel<Shape>, a, rows_aligned<bfloat16>(a.a, a.a_row), rows_aligned<bfloat16>(a.b, a.b_col),
         pairs_aligned(a));
}

// Not for every matmul: rows of A and columns of B with k adjacent, into a fresh C.
bool has_few_rows(const GemmArgs& a) {
  return a.M > 0 && a.M <= kFewRows && a.K > 0 && a.a_col == 1 && a.b_row == 1 && !a.a_low && !a.accumulate;
}

void run_few_rows_for(const GemmArgs& a, CudaStream stream) {
  const bool wide = ceil_div(a.N, 64) >= kFewBlocks;
  if (a.M <= 16) {
    return wide ? run_few_rows<FewRowsShape<16, 64, 3, 8>>(a, stream) : run_few_rows<FewRowsShape<16, 16, 8, 8>>(a, stream);
  }
  if (a.M <= 32) {
    return wide ? run_few_rows<FewRowsShape<32, 64, 3, 4>>(a, stream) : run_few_rows<FewRowsShape<32, 16, 4, 8>>(a, stream);
  }
  wide ? run_few_rows<FewRowsShape<64, 32, 3, 4>>(a, stream) : run_few_rows<FewRowsShape<64, 16, 3, 8>>(a, stream);
}

// ---------------------------------------------------------------- float32 and float64: fused multiply-adds

template <typename A_, int kM_, int kN_, int kRows_, int kColumns_>
struct FmaShape {
  using A = A_;
  static constexpr int kM = kM_, kN = kN_, kK = 16;            // of a block, and of a step
  static constexpr int kRows = kRows_, kColumns = kColumns_;  // of a thread, in packs of neighbours
  static constexpr int kThreads = kM / kRows * (kN / kColumns);
  static constexpr int kPadM = kM + kPack<A>, kPadN = kN + kPack<A>;  // neighbours in k lie in different banks
};
using LargeFma = FmaShape<float, 128, 128, 8, 8>;
using SmallFma = FmaShape<float, 32, 32, 4, 4>;
using DoubleFma = FmaShape<double, 32, 32, 4, 4>;

// This thread's elements of the tile [kK, kLength] from (k, first) on; 0 behind the end of either. Neighbouring threads
// read neighbours in memory.
template <typename Shape, int kLength>
struct FmaTile {
  using A = typename Shape::A;
  static constexpr int kElements = Shape::kK * kLength / Shape::kThreads;
  static_assert(Shape::kK * kLength % Shape::kThreads == 0);
  A v[kElements];

  __device__ static int k_of(int i, bool across) { return across ? i / kLength : i % Shape::kK; }
  __device__ static int at_of(int i, bool across) { return across ? i % kLength : i / Shape::kK; }

  __device__ void load(const A* from, int64_t k_stride, int64_t stride, int64_t k, int64_t K, int64_t first, int64_t count) {
    const bool across = k_stride != 1;
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      const int i = e * Shape::kThreads + threadIdx.x;
      const int64_t at_k = k + k_of(i, across), at = first + at_of(i, across);
      v[e] = at_k < K && at < count ? from[at_k * k_stride + at * stride] : A(0);
    }
  }
  __device__ void store(A* tile, int64_t k_stride) const {
    const bool across = k_stride != 1;
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      const int i = e * Shape::kThreads + threadIdx.x;
      tile[k_of(i, across) * (kLength + kPack<A>)+at_of(i, across)] = v[e];
    }
  }
};

// Where element i of a thread's part of a tile's side is: packs of neighbours, those of other threads between them.
template <typename A, int kParts>
__device__ inline int along(int part, int i) {
  return i / kPack<A> * kParts * kPack<A> + part * kPack<A> + i % kPack<A>;
}

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads) gemm_fma_kernel(GemmArgs a) {
  using A = typename Shape::A;
  constexpr int kPartsM = Shape::kM / Shape::kRows, kPartsN = Shape::kN / Shape::kColumns, kWide = kPack<A>;
  constexpr int kSideA = Shape::kK * Shape::kPadM, kSideB = Shape::kK * Shape::kPadN;
  __shared__ Stored<A> shared_a[2 * kSideA / kWide], shared_b[2 * kSideB / kWide];
  const TileOrigin origin(a, Shape::kM, Shape::kN);
  const int part_m = threadIdx.x / kPartsN, part_n = threadIdx.x % kPartsN;
  const auto m_of = [&](int i) { return origin.m + along<A, kPartsM>(part_m, i); };
  const auto n_of = [&](int j) { return origin.n + along<A, kPartsN>(part_n, j); };
  const A* const from_a = static_cast<const A*>(a.a);
  const A* const from_b = static_cast<const A*>(a.b);
  A* const c = static_cast<A*>(a.c);

  A sum[Shape::kRows][Shape::kColumns] = {};
  if (a.accumulate) {  // the chains go on from there
#pragma unroll
    for (int i = 0; i < Shape::kRows; ++i) {
#pragma unroll
      for (int j = 0; j < Shape::kColumns; ++j) {
        if (m_of(i) < a.M && n_of(j) < a.N) sum[i][j] = c[m_of(i) * a.c_row + n_of(j)];
      }
    }
  }
  FmaTile<Shape, Shape::kM> next_a;
  FmaTile<Shape, Shape::kN> next_b;
  const auto load = [&](int64_t k) {
    next_a.load(from_a, a.a_col, a.a_row, k, a.K, origin.m, a.M);
    next_b.load(from_b, a.b_row, a.b_col, k, a.K, origin.n, a.N);
  };
  load(0);
  for (int64_t k = 0, side = 0; k < a.K; k += Shape::kK, side ^= 1) {
    A* const tile_a = shared_a[0].v + side * kSideA;
    A* const tile_b = shared_b[0].v + side * kSideB;
    next_a.store(tile_a, a.a_col);
    next_b.store(tile_b, a.b_row);
    __syncthreads();  // the other side is read, as its readers are here
    if (k + Shape::kK < a.K) load(k + Shape::kK);
#pragma unroll
    for (int step = 0; step < Shape::kK; ++step) {
      Stored<A> of_a[Shape::kRows / kWide], of_b[Shape::kColumns / kWide];
#pragma unroll
      for (int i = 0; i < Shape::kRows; i += kWide) {
        of_a[i / kWide] = load16<Stored<A>>(tile_a + step * Shape::kPadM + along<A, kPartsM>(part_m, i));
      }
#pragma unroll
      for (int j = 0; j < Shape::kColumns; j += kWide) {
        of_b[j / kWide] = load16<Stored<A>>(tile_b + step * Shape::kPadN + along<A, kPartsN>(part_n, j));
      }
#pragma unroll
      for (int i = 0; i < Shape::kRows; ++i) {
#pragma unroll
        for (int j = 0; j < Shape::kColumns; ++j) {
          sum[i][j] = fma(of_a[i / kWide].v[i % kWide], of_b[j / kWide].v[j % kWide], sum[i][j]);
        }
      }
    }
  }
  const A* bias = static_cast<const A*>(a.bias);
#pragma unroll
  for (int i = 0; i < Shape::kRows; ++i) {
#pragma unroll
    for (int j = 0; j < Shape::kColumns; ++j) {
      const int64_t m = m_of(i), n = n_of(j);
      if (m < a.M && n < a.N) c[m * a.c_row + n] = bias ? sum[i][j] + bias[n] : sum[i][j];
    }
  }
}

template <typename Shape>
void run_fma(const GemmArgs& a, CudaStream stream) {
  launch({"gemm_fma", tiles_of<Shape>(a), Shape::kThreads, stream}, gemm_fma_kernel<Shape>, a);
}

// ---------------------------------------------------------------- the rest

__global__ void __launch_bounds__(256) split_kernel(const float* x, int64_t count, bfloat16* high, bfloat16* low) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i < count) split_in_two(x[i], high + i, low + i);
}

// One column a thread, a chunk of rows (blockIdx.y); a chain of additions.
template <typename S>
__global__ void __launch_bounds__(128) column_sum_kernel(ColumnSumArgs a) {
  const int64_t o = static_cast<int64_t>(blockIdx.x) * 128 + threadIdx.x, first = blockIdx.y * kColumnSumRows;
  if (o >= a.O) return;
  const int64_t last = a.T - first < kColumnSumRows ? a.T : first + kColumnSumRows;
  Arith<S> total = 0;
#pragma unroll 8
  for (int64_t t = first; t < last; ++t) total = total + to_arith(static_cast<const S*>(a.dy)[t * a.O + o]);
  static_cast<Arith<S>*>(a.dbias)[blockIdx.y * a.O + o] = total;
}

// The chunks, in order, into the first.
template <typename A>
__global__ void __launch_bounds__(128) column_join_kernel(A* dbias, int64_t chunks, int64_t O) {
  const int64_t o = static_cast<int64_t>(blockIdx.x) * 128 + threadIdx.x;
  if (o >= O) return;
  A total = dbias[o];
#pragma unroll 8
  for (int64_t c = 1; c < chunks; ++c) total = total + dbias[c * O + o];
  dbias[o] = total;
}

}  // namespace

void gemm_cuda(const GemmArgs& a, CudaStream stream) {
  if (a.b_dtype == DType::f64) return run_fma<DoubleFma>(a, stream);
  if (a.a_dtype != a.b_dtype) throw std::runtime_error("grpo_engine: gemm_cuda: a float32 A must be split for a bfloat16 B");
  if (a.b_dtype == DType::f32) {
    return tiles_of<LargeFma>(a) < kFill ? run_fma<SmallFma>(a, stream) : run_fma<LargeFma>(a, stream);
  }
  if (has_few_rows(a)) return run_few_rows_for(a, stream);
  if (wgmma_can(a)) return run_wgmma(a, stream);
  tiles_of<LargeMma>(a) < kFill ? run_mma_for<SmallMma>(a, stream) : run_mma_for<LargeMma>(a, stream);
}

void split_cuda(const float* x, int64_t count, bfloat16* high, bfloat16* low, CudaStream stream) {
  launch({"split", ceil_div(count, 256), 256, stream}, split_kernel, x, count, high, low);
}

void column_sum_cuda(const ColumnSumArgs& args, CudaStream stream) {
  for_dtype(args.dtype, [&]<typename S>() {
    const int64_t across = ceil_div(args.O, 128), chunks = column_sum_chunks(args.T);
    launch({.name = "column_sum", .blocks = across, .threads = 128, .stream = stream, .blocks_y = chunks},
           column_sum_kernel<S>, args);
    launch({"column_join", chunks > 1 ? across : 0, 128, stream}, column_join_kernel<Arith<S>>,
           static_cast<Arith<S>*>(args.dbias), chunks, args.O);
  });
}

}  // namespace grpo_engine
