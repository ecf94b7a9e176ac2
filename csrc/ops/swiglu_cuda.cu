#include "ops/swiglu.h"

#include "core/cuda_values.cuh"

namespace grpo_engine {
namespace {

constexpr int kThreads = 128;

// One pack of a row's columns a thread; `blocks_of_row` blocks share a row.
template <typename S>
struct PackIndex {
  int64_t t, i, n;  // row, first column, columns from there on (<= 0: none)

  __device__ PackIndex(const SwigluArgs& a, unsigned blocks_of_row) {
    t = blockIdx.x / blocks_of_row;
    i = (static_cast<int64_t>(blockIdx.x % blocks_of_row) * kThreads + threadIdx.x) * kPack<S>;
    n = a.F - i;
  }
};

template <typename A>
__device__ inline A sigmoid(A gate) {
  return A(1) / (A(1) + exp(-gate));
}

// gate / (1 + exp(-gate)), which unlike gate * sigmoid has no 0 * inf.
template <typename A>
__device__ inline A silu(A gate) {
  return gate / (A(1) + exp(-gate));
}

template <typename S>
__global__ void __launch_bounds__(kThreads) swiglu_forward_kernel(SwigluArgs a, unsigned blocks_of_row, bool aligned) {
  const PackIndex<S> p(a, blocks_of_row);
  if (p.n <= 0) return;
  const S* gates = static_cast<const S*>(a.gate_up) + p.t * 2 * a.F + p.i;
  Pack<S> y = load_pack(gates, p.n, aligned);
  const Pack<S> up = load_pack(gates + a.F, p.n, aligned);
  for (int k = 0; k < kPack<S>; ++k) y.v[k] = round_to<S>(silu(y.v[k])) * up.v[k];
  store_pack(y, static_cast<S*>(a.y) + p.t * a.F + p.i, p.n, aligned);
}

template <typename S>
__global__ void __launch_bounds__(kThreads) swiglu_backward_kernel(SwigluArgs a, unsigned blocks_of_row, bool aligned) {
  using A = Arith<S>;
  const PackIndex<S> p(a, blocks_of_row);
  if (p.n <= 0) return;
  const int64_t gates = p.t * 2 * a.F + p.i;
  const Pack<S> gate = load_pack(static_cast<const S*>(a.gate_up) + gates, p.n, aligned);
  const Pack<S> up = load_pack(static_cast<const S*>(a.gate_up) + gates + a.F, p.n, aligned);
  const Pack<S> dy = load_pack(static_cast<const S*>(a.dy) + p.t * a.F + p.i, p.n, aligned);
  Pack<S> dgate, dup, y;
  for (int k = 0; k < kPack<S>; ++k) {
    const A s = sigmoid(gate.v[k]), activated = silu(gate.v[k]);
    dgate.v[k] = dy.v[k] * up.v[k] * (s * fma(gate.v[k], A(1) - s, A(1)));
    dup.v[k] = dy.v[k] * activated;
    y.v[k] = round_to<S>(activated) * up.v[k];
  }
  store_pack(dgate, static_cast<S*>(a.dgate_up) + gates, p.n, aligned);
  store_pack(dup, static_cast<S*>(a.dgate_up) + gates + a.F, p.n, aligned);
  if (a.y) store_pack(y, static_cast<S*>(a.y) + p.t * a.F + p.i, p.n, aligned);
}

template <typename S>
bool all_aligned(const SwigluArgs& a) {
  for (const void* p : {a.gate_up, a.dy, static_cast<const void*>(a.y), static_cast<const void*>(a.dgate_up)}) {
    if (p && !rows_aligned<S>(p, a.F)) return false;
  }
  return true;
}

template <typename S>
void over_rows(const char* name, void (*kernel)(SwigluArgs, unsigned, bool), const SwigluArgs& args, CudaStream stream) {
  const int64_t blocks_of_row = ceil_div(args.F, kThreads * kPack<S>);
  launch({name, args.T * blocks_of_row, kThreads, stream}, kernel, args, static_cast<unsigned>(blocks_of_row),
         all_aligned<S>(args));
}

}  // namespace

void swiglu_forward_cuda(const SwigluArgs& args, CudaStream stream) {
  for_dtype(args.dtype, [&]<typename S>() { over_rows<S>("swiglu_forward", swiglu_forward_kernel<S>, args, stream); });
}

void swiglu_backward_cuda(const SwigluArgs& args, CudaStream stream) {
  for_dtype(args.dtype, [&]<typename S>() { over_rows<S>("swiglu_backward", swiglu_backward_kernel<S>, args, stream); });
}

}  // namespace grpo_engine
