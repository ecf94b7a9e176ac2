// reduce.cuh -- reductions of a warp and of a block, by one fixed tree.
//
// Every lane gets the result, with the same bits. `op` must be commutative in its bits, as a sum is, or a maximum without
// NaN. The tree depends on the number of threads alone.
#pragma once
#include "core/cuda_launch.h"

namespace grpo_engine {

struct Add {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
// NaN loses against a number; two NaN stay NaN.
struct Max {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a > b || b != b ? a : b;
  }
};

template <typename T, typename Op>
__device__ inline T warp_reduce(T value, Op op) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value = op(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

// All threads of the block call this. `identity` replaces the warps that the block does not have.
template <typename T, typename Op>
__device__ inline T block_reduce(T value, Op op, T identity) {
  __shared__ T partial[kWarpSize];
  const unsigned lane = threadIdx.x % kWarpSize, warps = blockDim.x / kWarpSize;
  value = warp_reduce(value, op);
  if (warps == 1) return value;
  if (lane == 0) partial[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  value = warp_reduce(lane < warps ? partial[lane] : identity, op);
  __syncthreads();  // the next call writes partial again
  return value;
}

}  // namespace grpo_engine
