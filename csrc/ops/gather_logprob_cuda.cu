#include "ops/gather_logprob.h"

#include "core/row_stats.cuh"

namespace grpo_engine {
namespace {

static_assert(kGatherBlock == kRowBlock);

constexpr int kBlocksThreads = 128;

// One warp, one block of one row.
template <typename S>
__global__ void __launch_bounds__(kBlocksThreads) gather_logprob_blocks_kernel(GatherLogprobArgs a, bool aligned) {
  using A = Arith<S>;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * (kBlocksThreads / kWarpSize) + threadIdx.x / kWarpSize;
  const int64_t num_blocks = (a.V + kRowBlock - 1) / kRowBlock, t = item / num_blocks, first = item % num_blocks * kRowBlock;
  if (t >= a.T) return;
  const S* x = static_cast<const S*>(a.logits) + t * a.V + first;
  const BlockStats<A> b = block_stats(x, a.V - first, static_cast<A>(a.inv_temperature), aligned);
  if (threadIdx.x % kWarpSize == 0) b.write(static_cast<A*>(a.blocks) + item * 3);
}

// One block, one row. A target outside [0, V) gives NaN.
template <typename S>
__global__ void __launch_bounds__(kRowThreads) gather_logprob_forward_kernel(GatherLogprobArgs a) {
  using A = Arith<S>;
  const int64_t t = blockIdx.x, target = a.target[t], num_blocks = (a.V + kRowBlock - 1) / kRowBlock;
  const A* const blocks = static_cast<const A*>(a.blocks) + t * num_blocks * 3;
  const A scale = static_cast<A>(a.inv_temperature);
  const RowStats r = join_row(num_blocks, scale, [&](int64_t block) { return BlockStats<A>::read(blocks + block * 3); });
  if (threadIdx.x != 0) return;
  const S* x = static_cast<const S*>(a.logits) + t * a.V;
  const bool known = target >= 0 && target < a.V;
  write_row<A>(r, known ? scaled(to_arith(x[target]), scale) : not_a_number<double>(), t, a.logprob, a.entropy, a.saved);
}

constexpr int kBackwardThreads = 256;
constexpr int kBackwardPacks = 4;  // of a thread

// A stretch of one row's columns a block: nothing is reduced, so a row may have many blocks.
template <typename S>
__global__ void __launch_bounds__(kBackwardThreads)
    gather_logprob_backward_kernel(GatherLogprobArgs a, unsigned blocks_of_row, bool aligned) {
  using A = Arith<S>;
  const int64_t t = blockIdx.x / blocks_of_row, target = a.target[t];
  const S* x = static_cast<const S*>(a.logits) + t * a.V;
  S* dx = static_cast<S*>(a.dlogits) + t * a.V;
  const bool known = target >= 0 && target < a.V;
  const LogitGradient<A> gradient(a.saved + t * 3, known ? static_cast<const A*>(a.g_logprob)[t] : not_a_number<A>(),
                                  static_cast<const A*>(a.g_entropy)[t], static_cast<A>(a.inv_temperature));
  const int64_t first = static_cast<int64_t>(blockIdx.x % blocks_of_row) * kBackwardThreads * kBackwardPacks;
#pragma unroll
  for (int k = 0; k < kBackwardPacks; ++k) {
    const int64_t v = (first + k * kBackwardThreads + threadIdx.x) * kPack<S>, n = a.V - v;
    if (n <= 0) continue;
    Pack<S> z = load_pack(x + v, n, aligned);
#pragma unroll
    for (int i = 0; i < kPack<S>; ++i) z.v[i] = gradient(z.v[i], v + i == target);
    store_pack(z, dx + v, n, aligned);
  }
}

}  // namespace

void gather_logprob_forward_cuda(const GatherLogprobArgs& args, CudaStream stream) {
  for_dtype(args.dtype, [&]<typename S>() {
    const int64_t blocks = args.T * ceil_div(args.V, kRowBlock);
    launch({"gather_logprob_blocks", ceil_div(blocks, kBlocksThreads / kWarpSize), kBlocksThreads, stream},
           gather_logprob_blocks_kernel<S>, args, rows_aligned<S>(args.logits, args.V));
    launch({"gather_logprob_forward", args.T, kRowThreads, stream}, gather_logprob_forward_kernel<S>, args);
  });
}

void gather_logprob_backward_cuda(const GatherLogprobArgs& args, CudaStream stream) {
  for_dtype(args.dtype, [&]<typename S>() {
    const int64_t blocks_of_row = ceil_div(args.V, kBackwardThreads * kBackwardPacks * kPack<S>);
    launch({"gather_logprob_backward", args.T * blocks_of_row, kBackwardThreads, stream}, gather_logprob_backward_kernel<S>,
           args, static_cast<unsigned>(blocks_of_row),
           rows_aligned<S>(args.logits, args.V) && rows_aligned<S>(args.dlogits, args.V));
  });
}

}  // namespace grpo_engine
