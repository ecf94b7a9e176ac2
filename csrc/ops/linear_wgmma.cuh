// linear_wgmma.cuh -- matmuls of bfloat16 by wgmma.cuh, on Hopper. The sums and their bits are those of linear_cuda.cu by
// mma.cuh: chains of kChunk terms of k from zero, added in ascending order.
#pragma once
#include "core/tile_load.cuh"
#include "ops/linear_tiles.cuh"
#ifndef GE_CUDA_EMULATED
#include "core/wgmma.cuh"
#endif

namespace grpo_engine {

#ifdef GE_CUDA_EMULATED

inline bool wgmma_can(const GemmArgs&) { return false; }
inline void run_wgmma(const GemmArgs&, CudaStream) {}

#else

// kM x kN elements of C. A warpgroup has 64 rows.
template <int kWarpgroups, int kN_, int kStages_, int kResident_>
struct WgmmaShape {
  static constexpr int kM = 64 * kWarpgroups, kN = kN_;  // of a block
  static constexpr int kThreads = kWgmmaThreads * kWarpgroups;
  static constexpr int kStages = kStages_;      // of shared memory, of kWgmmaLine of k
  static constexpr int kResident = kResident_;  // blocks of a multiprocessor, at least
  static constexpr int kColumns = kN / 8;       // of a warp, in fours of wgmma.cuh
  static constexpr int kStage = (kM + kN) * kWgmmaLine;  // elements
  static_assert(kChunk % kWgmmaLine == 0 && kStages >= 3);
};
using LargeWgmma = WgmmaShape<3, 128, 5, 1>;
using SmallWgmma = WgmmaShape<1, 64, 4, 3>;

constexpr int64_t kLongestStride = 1 << 23;  // a tile's offsets are int

// A thread's copies of one operand, the same in each stage. kAcross: lines are k, else rows or columns.
template <int kLines, bool kAcross, int kThreads>
struct WgmmaCopies {
  static constexpr int kEach = (kLines * 8 + kThreads - 1) / kThreads;  // of a thread: chunk threadIdx.x % 8 of a line
  int from[kEach], elements[kEach];  // offset, and how many elements the matrix has there, as long as there is k

  __device__ static int line(int i) { return i * (kThreads / 8) + static_cast<int>(threadIdx.x) / 8; }
  __device__ static int chunk() { return static_cast<int>(threadIdx.x) % 8; }

  // `lines`: rows or columns of the matrix from the tile's first on.
  __device__ WgmmaCopies(int64_t stride, int64_t lines) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if constexpr (kAcross) {
        const int first = line(i) / kWgmmaLine * kWgmmaLine + chunk() * 8;
        from[i] = line(i) % kWgmmaLine * static_cast<int>(stride) + first;
        elements[i] = chunk_elements(lines - first);
      } else {
        from[i] = line(i) * static_cast<int>(stride) + chunk() * 8;
        elements[i] = line(i) < lines ? 8 : 0;
      }
    }
  }

  // From `tile`, the stage's first element in the matrix. The matrix has `left` more of k.
  __device__ void start(const bfloat16* tile, int64_t left, bfloat16* to) const {
    const int in_line = kAcross ? 8 : chunk_elements(left - chunk() * 8);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if ((i + 1) * kThreads > kLines * 8 && line(i) >= kLines) break;
      int n = elements[i] < in_line ? elements[i] : in_line;
      if (kAcross && line(i) % kWgmmaLine >= left) n = 0;
      copy_async(n > 0 ? tile + from[i] : tile, to + line(i) * kWgmmaLine + (chunk() ^ line(i) % 8) * 8, n * 2);
    }
  }
};

template <typename Shape, bool kAcrossA, bool kAcrossB>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kResident) gemm_wgmma_kernel(GemmArgs a, bool pairs) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr int kStages = Shape::kStages, kColumns = Shape::kColumns, kSteps = kWgmmaLine / 16;
  bfloat16* const shared = dynamic_shared<bfloat16>();
  const TileOrigin origin(a, Shape::kM, Shape::kN);
  const int slices = static_cast<int>((a.K + kWgmmaLine - 1) / kWgmmaLine), stages = a.a_low ? 2 * slices : slices;
  const int64_t stride_a = kAcrossA ? a.a_col : a.a_row, stride_b = kAcrossB ? a.b_row : a.b_col;
  const WgmmaCopies<Shape::kM, kAcrossA, Shape::kThreads> copies_a(stride_a, a.M - origin.m);
  const WgmmaCopies<Shape::kN, kAcrossB, Shape::kThreads> copies_b(stride_b, a.N - origin.n);
  const bfloat16* const of_b = static_cast<const bfloat16*>(a.b) + origin.n * (kAcrossB ? 1 : stride_b);
  const auto load = [&](int stage) {
    if (stage < stages) {
      const bool low = stage >= slices;
      const int64_t k = static_cast<int64_t>(low ? stage - slices : stage) * kWgmmaLine;
      const auto* of_a = static_cast<const bfloat16*>(low ? a.a_low : a.a) + origin.m * (kAcrossA ? 1 : stride_a);
      bfloat16* const to = shared + stage % kStages * Shape::kStage;
      copies_a.start(of_a + k * (kAcrossA ? stride_a : 1), a.K - k, to);
      copies_b.start(of_b + k * (kAcrossB ? stride_b : 1), a.K - k, to + Shape::kM * kWgmmaLine);
    }
    end_copies();  // an empty group keeps the count
  };

  const int warpgroup = threadIdx.x / kWgmmaThreads, warp = threadIdx.x / kWarpSize % 4, lane = threadIdx.x % kWarpSize;
  const int64_t m = origin.m + warpgroup * 64 + warp * 16 + lane / 4, first_n = origin.n + lane % 4 * 2;
  float total[kColumns][4] = {}, d[kColumns][4];
  if (a.accumulate) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int64_t row = m + e / 2 * 8, n = first_n + j * 8 + e % 2;
        if (row < a.M && n < a.N) total[j][e] = static_cast<const float*>(a.c)[row * a.c_row + n];
      }
    }
  }
#pragma unroll
  for (int stage = 0; stage < kStages - 2; ++stage) load(stage);
  for (int stage = 0; stage < stages;) {
    const int first = stage, part = stage < slices ? slices : stages;  // the end of this part of A
    const int end = first + kChunk / kWgmmaLine < part ? first + kChunk / kWgmmaLine : part;
    for (; stage < end; ++stage) {
      copies_landed<kStages - 3>();
      wgmma_sees_copies();
      __syncthreads();  // all copies of this stage are there, and the matmuls of the stage before the last are done
      load(stage + kStages - 2);
      const bfloat16* const tile = shared + stage % kStages * Shape::kStage;
      const uint64_t tile_a = wgmma_tile(tile + warpgroup * 64 * kWgmmaLine);
      const uint64_t tile_b = wgmma_tile(tile + Shape::kM * kWgmmaLine);
      wgmma_begin();
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        wgmma_bf16<kAcrossA, kAcrossB>(d, tile_a + k * kWgmmaNextK<kAcrossA>, tile_b + k * kWgmmaNextK<kAcrossB>,
                                       k > 0 || stage > first);
      }
      wgmma_end();
      wgmma_done<1>();
    }
    wgmma_done<0>();
    wgmma_result(d);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        total[j][e] = total[j][e] + (d[j][e] + 0.f);  // as a chain from zero, which never ends at -0
    }
  }
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    const int64_t n = first_n + j * 8;
    const float one = bias_of(a, n), two = bias_of(a, n + 1);
    store_two(a, m, n, total[j][0] + one, total[j][1] + two, pairs);
    store_two(a, m + 8, n, total[j][2] + one, total[j][3] + two, pairs);
  }
#else
  __trap();  // wgmma_can() is false
#endif
}

template <typename Shape, bool kAcrossA, bool kAcrossB>
void run_wgmma(const GemmArgs& a, CudaStream stream) {
  launch({"gemm_wgmma", tiles_of<Shape>(a), Shape::kThreads, stream, int64_t{Shape::kStages} * Shape::kStage * 2},
         gemm_wgmma_kernel<Shape, kAcrossA, kAcrossB>, a, pairs_aligned(a));
}

template <typename Shape>
void run_wgmma_for(const GemmArgs& a, CudaStream stream) {
  if (a.a_col != 1) return run_wgmma<Shape, true, true>(a, stream);
  a.b_row != 1 ? run_wgmma<Shape, false, true>(a, stream) : run_wgmma<Shape, false, false>(a, stream);
}

// Whether this device has wgmma and the binary its machine code. Code that is compiled at load from PTX lacks wgmma.
inline bool has_wgmma() {
  static const bool has = [] {
    cudaFuncAttributes about;
    cuda_check(cudaFuncGetAttributes(&about, gemm_wgmma_kernel<LargeWgmma, false, false>), "gemm_wgmma");
    return about.ptxVersion == 90 && about.binaryVersion == 90;
  }();
  return has;
}

inline bool wgmma_can(const GemmArgs& a) {
  const int64_t stride_a = a.a_col != 1 ? a.a_col : a.a_row, stride_b = a.b_row != 1 ? a.b_row : a.b_col;
  return has_wgmma() && stride_a <= kLongestStride && stride_b <= kLongestStride && rows_aligned<bfloat16>(a.a, stride_a) &&
         (!a.a_low || rows_aligned<bfloat16>(a.a_low, stride_a)) && rows_aligned<bfloat16>(a.b, stride_b);
}

inline void run_wgmma(const GemmArgs& a, CudaStream stream) {
  tiles_of<LargeWgmma>(a) < kFill ? run_wgmma_for<SmallWgmma>(a, stream) : run_wgmma_for<LargeWgmma>(a, stream);
}

#endif

}  // namespace grpo_engine
