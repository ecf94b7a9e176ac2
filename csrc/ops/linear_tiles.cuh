// linear_tiles.cuh -- what the kernels of a bfloat16 matmul share: the tile of a block, and the writes to C.
#pragma once
#include "core/cuda_values.cuh"
#include "ops/linear.h"

namespace grpo_engine {

// The first element of a block's tile of C. Tiles start in columns of at most kTall tiles. So those in flight together share
// rows of A and columns of B in the second-level cache.
struct TileOrigin {
  int64_t m, n;  // first row and column

  __device__ TileOrigin(const GemmArgs& a, int64_t rows, int64_t columns) {
    constexpr int64_t kTall = 16;
    const int64_t down = (a.M + rows - 1) / rows, across = (a.N + columns - 1) / columns, index = blockIdx.x;
    const int64_t first = index / (kTall * across) * kTall, tall = down - first < kTall ? down - first : kTall;
    const int64_t within = index % (kTall * across);
    m = (first + within % tall) * rows;
    n = within / tall * columns;
  }
};

// The tile's shape decides which elements a block has, and nothing about their bits. Each element is one sum over k. In
// float32 and float64 the sum is a chain. In bfloat16 it is one chain for each chunk of k, from zero, then the chunks in
// ascending order. So several warps can share the k of a few rows.
template <typename Shape>
int64_t tiles_of(const GemmArgs& a) {
  return ceil_div(a.M, Shape::kM) * ceil_div(a.N, Shape::kN);
}

constexpr int kChunk = 256;  // of k
constexpr int64_t kFill = 128;  // blocks: fewer than that leave multiprocessors idle, and smaller tiles are used

struct alignas(8) Two {
  float first, second;
};

// `pairs`: two neighbours may be written at once.
__device__ inline void store_two(const GemmArgs& a, int64_t m, int64_t n, float first, float second, bool pairs) {
  if (m >= a.M || n >= a.N) return;
  const int64_t at = m * a.c_row + n;
  const bool both = n + 1 < a.N;
  if (a.c_dtype == DType::f32) {
    float* c = static_cast<float*>(a.c) + at;
    if (both && pairs) {
      *reinterpret_cast<Two*>(c) = Two{first, second};
    } else {
      c[0] = first;
      if (both) c[1] = second;
    }
    return;
  }
  bfloat16* c = static_cast<bfloat16*>(a.c) + at;
  bfloat16 low, high;
  from_arith(first, &low);
  from_arith(second, &high);
  if (both && pairs) {
    *reinterpret_cast<uint32_t*>(c) = low.bits | static_cast<uint32_t>(high.bits) << 16;
  } else {
    c[0] = low;
    if (both) c[1] = high;
  }
}

__device__ inline float bias_of(const GemmArgs& a, int64_t n) {
  return a.bias && n < a.N ? to_arith(static_cast<const bfloat16*>(a.bias)[n]) : 0.f;
}

// Whether two neighbours of C may be written at once, when the first has an even index.
inline bool pairs_aligned(const GemmArgs& a) {
  const int64_t size = a.c_dtype == DType::f32 ? 4 : 2;
  return reinterpret_cast<uintptr_t>(a.c) % (2 * size) == 0 && a.c_row % 2 == 0;
}

}  // namespace grpo_engine
