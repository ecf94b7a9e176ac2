#include "ops/rms_norm.h"

#include "core/cuda_values.cuh"
#include "core/reduce.cuh"

namespace grpo_engine {
namespace {

// One block, one row. Each thread has the same columns in every pass, so what it stored it reads back itself.
template <typename S, bool kWithResidual>
__global__ void __launch_bounds__(512) rms_norm_forward_kernel(RmsNormArgs a, bool aligned) {
  using A = Arith<S>;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * a.D;
  const S* x = static_cast<const S*>(a.x) + row;
  const S* residual = kWithResidual ? static_cast<const S*>(a.residual) + row : nullptr;
  S* total = kWithResidual ? static_cast<S*>(a.sum) + row : nullptr;
  const S* weight = static_cast<const S*>(a.weight);
  S* y = static_cast<S*>(a.y) + row;
  A squares = 0;
  each_pack<S>(a.D, [&](int64_t d, int64_t n) {
    Pack<S> v = load_pack(x + d, n, aligned);
    if constexpr (kWithResidual) {
      const Pack<S> r = load_pack(residual + d, n, aligned);
      for (int i = 0; i < kPack<S>; ++i) v.v[i] = round_to<S>(v.v[i] + r.v[i]);
      store_pack(v, total + d, n, aligned);
    }
    for (int i = 0; i < kPack<S>; ++i) squares = fma(v.v[i], v.v[i], squares);
  });
  const A mean = block_reduce(squares, Add{}, A(0)) / static_cast<A>(a.D);
  const A rstd = A(1) / static_cast<A>(sqrt(static_cast<double>(mean) + a.eps));
  if (threadIdx.x == 0) static_cast<A*>(a.rstd)[blockIdx.x] = rstd;
  const S* normed = kWithResidual ? total : x;
  each_pack<S>(a.D, [&](int64_t d, int64_t n) {
    Pack<S> v = load_pack(normed + d, n, aligned);
    const Pack<S> w = load_pack(weight + d, n, aligned);
    for (int i = 0; i < kPack<S>; ++i) v.v[i] = round_to<S>(v.v[i] * rstd) * w.v[i];
    store_pack(v, y + d, n, aligned);
  });
}

// dx of one row.
template <typename S>
__global__ void __launch_bounds__(512) rms_norm_backward_kernel(RmsNormArgs a, bool aligned) {
  using A = Arith<S>;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * a.D;
  const S* x = static_cast<const S*>(a.x) + row;
  const S* dy = static_cast<const S*>(a.dy) + row;
  const S* dsum = a.dsum ? static_cast<const S*>(a.dsum) + row : nullptr;
  const S* weight = static_cast<const S*>(a.weight);
  S* dx = static_cast<S*>(a.dx) + row;
  const A rstd = static_cast<const A*>(a.rstd)[blockIdx.x];
  A dots = 0;
  each_pack<S>(a.D, [&](int64_t d, int64_t n) {
    const Pack<S> v = load_pack(x + d, n, aligned), g = load_pack(dy + d, n, aligned), w = load_pack(weight + d, n, aligned);
    for (int i = 0; i < kPack<S>; ++i) dots = fma(g.v[i] * w.v[i], v.v[i] * rstd, dots);
  });
  const A mean = block_reduce(dots, Add{}, A(0)) / static_cast<A>(a.D);
  each_pack<S>(a.D, [&](int64_t d, int64_t n) {
    Pack<S> v = load_pack(x + d, n, aligned);
    const Pack<S> g = load_pack(dy + d, n, aligned), w = load_pack(weight + d, n, aligned);
    for (int i = 0; i < kPack<S>; ++i) v.v[i] = (g.v[i] * w.v[i] - v.v[i] * rstd * mean) * rstd;
    if (dsum) {
      const Pack<S> s = load_pack(dsum + d, n, aligned);
      for (int i = 0; i < kPack<S>; ++i) v.v[i] = v.v[i] + s.v[i];
    }
    store_pack(v, dx + d, n, aligned);
  });
}

// dweight of one chunk of rows (blockIdx.x) and one column a thread: neighbours read neighbours.
template <typename S>
__global__ void __launch_bounds__(128) rms_norm_dweight_kernel(RmsNormArgs a) {
  using A = Arith<S>;
  const int64_t d = static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x;
  if (d >= a.D) return;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRmsNormRows;
  const int64_t last = a.T - first < kRmsNormRows ? a.T : first + kRmsNormRows;
  A total = 0;
#pragma unroll 4
  for (int64_t t = first; t < last; ++t) {
    const A v = to_arith(static_cast<const S*>(a.x)[t * a.D + d]), g = to_arith(static_cast<const S*>(a.dy)[t * a.D + d]);
    total = fma(g, v * static_cast<const A*>(a.rstd)[t], total);
  }
  static_cast<A*>(a.dweight)[blockIdx.x * a.D + d] = total;
}

// The chunks of dweight, in order, into the first.
template <typename A>
__global__ void __launch_bounds__(128) rms_norm_join_kernel(A* dweight, int64_t chunks, int64_t D) {
  const int64_t d = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (d >= D) return;
  A total = dweight[d];
#pragma unroll 8
  for (int64_t c = 1; c < chunks; ++c) total = total + dweight[c * D + d];
  dweight[d] = total;
}

template <typename S>
bool all_aligned(const RmsNormArgs& a) {
  for (const void* p : {a.x, a.residual, a.weight, a.dy, a.dsum, static_cast<const void*>(a.sum),
                        static_cast<const void*>(a.y), static_cast<const void*>(a.dx)}) {
    if (p && !rows_aligned<S>(p, a.D)) return false;
  }
  return true;
}

}  // namespace

void rms_norm_forward_cuda(const RmsNormArgs& args, CudaStream stream) {
  for_dtype(args.dtype, [&]<typename S>() {
    const Launch rows{"rms_norm_forward", args.T, threads_of_row<S>(args.D), stream};
    launch(rows, args.residual ? rms_norm_forward_kernel<S, true> : rms_norm_forward_kernel<S, false>, args,
           all_aligned<S>(args));
  });
}

void rms_norm_backward_cuda(const RmsNormArgs& args, CudaStream stream) {
  for_dtype(args.dtype, [&]<typename S>() {
    constexpr int kColumns = 128;
    const int64_t chunks = rms_norm_chunks(args.T), columns = ceil_div(args.D, kColumns);
    launch({"rms_norm_backward", args.T, threads_of_row<S>(args.D), stream}, rms_norm_backward_kernel<S>, args,
           all_aligned<S>(args));
    launch({.name = "rms_norm_dweight", .blocks = chunks, .threads = kColumns, .stream = stream, .blocks_y = columns},
           rms_norm_dweight_kernel<S>, args);
    launch({"rms_norm_join", chunks > 1 ? columns : 0, kColumns, stream}, rms_norm_join_kernel<Arith<S>>,
           static_cast<Arith<S>*>(args.dweight), chunks, args.D);
  });
}

}  // namespace grpo_engine
