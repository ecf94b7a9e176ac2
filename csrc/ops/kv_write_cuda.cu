#include "ops/kv_write.h"

#include "core/cuda_values.cuh"

namespace grpo_engine {
namespace {

constexpr int kTokens = kWarpSize;  // of a block: one a lane
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

// A block has kTokens tokens. Lanes of a warp are tokens, which in a sequence have slots side by side: their keys
// then lie side by side too.
template <typename S>
__global__ void __launch_bounds__(kThreads) kv_write_kernel(KvWriteArgs a) {
  __shared__ int64_t slots[kTokens];  // -1: not to be written
  __shared__ int overwritten[kTokens];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTokens, t = first + lane;
  const int64_t num_slots = a.num_pages * a.shape.page, wanted = t < a.T ? a.slot[t] : -1;
  const int64_t mine = wanted < num_slots ? wanted : -1;
  if (warp == 0) {
    slots[lane] = mine;
    overwritten[lane] = 0;
  }
  __syncthreads();
  // The later of two tokens with one slot wins whatever the order of the blocks: nobody else writes. The lanes
  // of a warp read the same slots, so this takes T loads a block.
  bool later = false;
  for (int64_t other = first + 1 + warp; other < a.T; other += kWarps) later |= other > t && a.slot[other] == mine;
  if (later) overwritten[lane] = 1;
  __syncthreads();
  const int64_t E = a.shape.E, rows = a.shape.K * E;
  if (mine >= 0 && overwritten[lane] == 0) {
    const S* key = static_cast<const S*>(a.key) + t * a.key_stride;
    S* pages = static_cast<S*>(a.key_pages);
    for (int64_t r = warp; r < rows; r += kWarps) {  // r = k E + e
      pages[key_offset(a.shape, mine, r / E) + r % E * a.shape.page] = key[r];
    }
  }
  // values: lanes are elements, warps take tokens in turn
  for (int token = warp; token < kTokens; token += kWarps) {
    if (slots[token] < 0 || overwritten[token] != 0) continue;
    const S* value = static_cast<const S*>(a.value) + (first + token) * a.value_stride;
    S* pages = static_cast<S*>(a.value_pages);
    for (int64_t r = lane; r < rows; r += kWarpSize) {
      pages[value_offset(a.shape, slots[token], r / E) + r % E] = value[r];
    }
  }
}

}  // namespace

void kv_write_cuda(const KvWriteArgs& args, CudaStream stream) {
  for_dtype(args.dtype, [&]<typename S>() {
    launch({"kv_write", ceil_div(args.T, kTokens), kThreads, stream}, kv_write_kernel<S>, args);
  });
}

}  // namespace grpo_engine
