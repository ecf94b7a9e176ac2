#include "ops/token_logprob.h"

#include "core/row_stats.cuh"

namespace grpo_engine {
namespace {

static_assert(kVocabBlock == kRowBlock, "a block of the vocabulary is one of row_stats.cuh");

constexpr int kThreads = 256;

// 1 / temperature as sample_token divides: in float32 for float32 logits.
template <typename A>
__device__ inline A inverse(double temperature) {
  if constexpr (sizeof(A) == sizeof(float)) return finite_inverse(static_cast<float>(temperature));
  return static_cast<A>(1.0 / temperature);
}

// One warp, one block of the vocabulary of one row of the window.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    token_logprob_blocks_kernel(TokenLogprobArgs a, int64_t blocks_of_row, bool aligned) {
  const int64_t item = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarpSize) + threadIdx.x / kWarpSize;
  const int64_t row = item / blocks_of_row, t = a.first_row + row, first = item % blocks_of_row * kRowBlock;
  if (row >= a.num_rows) return;
  const A* x = static_cast<const A*>(a.dlogits) + row * a.num_ids + first;
  const int64_t n = a.num_ids - first < kRowBlock ? a.num_ids - first : kRowBlock;
  const BlockStats<A> b = block_stats(x, n, inverse<A>(a.temperature), aligned);
  if (threadIdx.x % kWarpSize != 0) return;
  const int64_t num_blocks = (a.V + kRowBlock - 1) / kRowBlock, column = a.target[t] - a.first_id - first;
  b.write(static_cast<A*>(a.blocks) + (t * num_blocks + (a.first_id + first) / kRowBlock) * 3);
  if (column >= 0 && column < n) static_cast<A*>(a.target_logit)[t] = x[column];
}

// One block, one row.
template <typename A>
__global__ void __launch_bounds__(kRowThreads) token_logprob_join_kernel(TokenLogprobArgs a) {
  const int64_t t = blockIdx.x, target = a.target[t], num_blocks = (a.V + kRowBlock - 1) / kRowBlock;
  const A* const blocks = static_cast<const A*>(a.blocks) + t * num_blocks * 3;
  const A scale = inverse<A>(a.temperature);
  const RowStats r = join_row(num_blocks, scale, [&](int64_t block) { return BlockStats<A>::read(blocks + block * 3); });
  if (threadIdx.x != 0) return;
  const bool known = target >= 0 && target < a.V;
  const double z = known ? scaled(static_cast<const A*>(a.target_logit)[t], scale) : not_a_number<double>();
  write_row<A>(r, z, t, a.logprob, a.entropy, a.saved);
}

constexpr int kPacks = 4;  // of a thread

struct alignas(8) Four {
  bfloat16 v[4];
};

// values[0 .. n) to p; `aligned`: four may be written at once.
__device__ inline void store_four(const Four& values, bfloat16* p, int64_t n, bool aligned) {
  if (aligned && n >= 4) {
    *reinterpret_cast<Four*>(p) = values;
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i < n) p[i] = values.v[i];
  }
}

// A stretch of one row of the window: its logits become their gradient, in place or, for bfloat16, rounded or in two
// parts.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    token_logprob_dlogits_kernel(TokenLogprobArgs a, unsigned blocks_of_row, bool aligned) {
  const int64_t row = blockIdx.x / blocks_of_row, t = a.first_row + row, target = a.target[t], at = row * a.num_ids;
  A* x = static_cast<A*>(a.dlogits) + at;
  const bool known = target >= 0 && target < a.V;
  const LogitGradient<A> gradient(a.saved + t * 3, known ? static_cast<const A*>(a.g_logprob)[t] : not_a_number<A>(),
                                  static_cast<const A*>(a.g_entropy)[t], inverse<A>(a.temperature));
  const int64_t first = static_cast<int64_t>(blockIdx.x % blocks_of_row) * kThreads * kPacks;
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const int64_t v = (first + k * kThreads + threadIdx.x) * kPack<A>, n = a.num_ids - v;
    if (n <= 0) continue;
    Pack<A> pack = load_pack(x + v, n, aligned);
#pragma unroll
    for (int i = 0; i < kPack<A>; ++i) {
      pack.v[i] = gradient(pack.v[i], a.first_id + v + i == target);
    }
    if constexpr (sizeof(A) == sizeof(float)) {
      if (a.high) {
        Four high, low;
#pragma unroll
        for (int i = 0; i < kPack<A>; ++i) {
          a.low ? split_in_two(pack.v[i], high.v + i, low.v + i) : from_arith(pack.v[i], high.v + i);
        }
        store_four(high, a.high + at + v, n, aligned);
        if (a.low) store_four(low, a.low + at + v, n, aligned);
        continue;
      }
    }
    store_pack(pack, x + v, n, aligned);
  }
}

template <typename Function>
void for_arithmetic(DType dtype, Function function) {
  dtype == DType::f64 ? function.template operator()<double>() : function.template operator()<float>();
}

}  // namespace

void token_logprob_blocks_cuda(const TokenLogprobArgs& args, CudaStream stream) {
  for_arithmetic(args.dtype, [&]<typename A>() {
    const int64_t blocks_of_row = ceil_div(args.num_ids, kRowBlock);
    launch({"token_logprob_blocks", ceil_div(args.num_rows * blocks_of_row, kThreads / kWarpSize), kThreads, stream},
           token_logprob_blocks_kernel<A>, args, blocks_of_row, rows_aligned<A>(args.dlogits, args.num_ids));
  });
}

void token_logprob_join_cuda(const TokenLogprobArgs& args, CudaStream stream) {
  for_arithmetic(args.dtype, [&]<typename A>() {
    launch({"token_logprob_join", args.T, kRowThreads, stream}, token_logprob_join_kernel<A>, args);
  });
}

void token_logprob_dlogits_cuda(const TokenLogprobArgs& args, CudaStream stream) {
  for_arithmetic(args.dtype, [&]<typename A>() {
    const int64_t blocks_of_row = ceil_div(args.num_ids, int64_t{kThreads} * kPacks * kPack<A>);
    launch({"token_logprob_dlogits", args.num_rows * blocks_of_row, kThreads, stream}, token_logprob_dlogits_kernel<A>, args,
           static_cast<unsigned>(blocks_of_row), rows_aligned<A>(args.dlogits, args.num_ids));
  });
}

}  // namespace grpo_engine
