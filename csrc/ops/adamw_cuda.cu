#include "ops/adamw.h"

#include "core/cuda_values.cuh"
#include "core/reduce.cuh"

namespace grpo_engine {
namespace {

constexpr int kThreads = 256;
constexpr int kNormThreads = 1024;

// The parameter that a block belongs to: the last whose first block is not behind it.
__device__ inline const AdamwParam& param_of(const AdamwCudaArgs& a, int64_t block) {
  int64_t low = 0, high = a.P;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (a.params[middle].first_block <= block ? low : high) = middle;
  }
  return a.params[low];
}

// use(i, n) for each pack of this thread: elements i .. i + n - 1 of the parameter.
template <typename S, typename Use>
__device__ inline void each_pack_of_block(const AdamwParam& p, int64_t block, Use use) {
  const int64_t first = (block - p.first_block) * kAdamwBlock;
  const int64_t last = p.count - first < kAdamwBlock ? p.count : first + kAdamwBlock;
#pragma unroll 4
  for (int64_t i = first + static_cast<int64_t>(threadIdx.x) * kPack<S>; i < last; i += kThreads * kPack<S>) use(i, last - i);
}

__device__ inline bool aligned_to_packs(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <typename S>
__device__ inline double squares_of(const AdamwParam& p, int64_t block) {
  using A = Arith<S>;
  const S* grad = static_cast<const S*>(p.grad);
  const bool aligned = aligned_to_packs(grad);
  A sum = 0;
  each_pack_of_block<S>(p, block, [&](int64_t i, int64_t n) {
    const Pack<S> g = load_pack(grad + i, n, aligned);
#pragma unroll
    for (int k = 0; k < kPack<S>; ++k) sum = fma(g.v[k], g.v[k], sum);
  });
  return block_reduce(static_cast<double>(sum), Add{}, 0.0);
}

template <typename S>
__device__ inline void update(const AdamwCudaArgs& a, const AdamwParam& p, int64_t block, double norm) {
  using A = Arith<S>;
  const double limit = a.clip_norm / (norm + 1e-6);
  const A scale = static_cast<A>(limit < 1.0 ? limit : 1.0), keep = static_cast<A>(1.0 - a.decay), eps = static_cast<A>(a.eps);
  const A new1 = static_cast<A>(1.0 - a.beta1), beta2 = static_cast<A>(a.beta2), new2 = static_cast<A>(1.0 - a.beta2);
  const A rate = static_cast<A>(-p.rate), root = static_cast<A>(p.root);
  S *param = static_cast<S*>(p.param), *ms = static_cast<S*>(p.m), *vs = static_cast<S*>(p.v);
  const S* grad = static_cast<const S*>(p.grad);
  const bool aligned = aligned_to_packs(grad) && aligned_to_packs(param) && aligned_to_packs(ms) && aligned_to_packs(vs);
  each_pack_of_block<S>(p, block, [&](int64_t i, int64_t n) {
    const Pack<S> g = load_pack(grad + i, n, aligned);
    Pack<S> m = load_pack(ms + i, n, aligned), v = load_pack(vs + i, n, aligned), x = load_pack(param + i, n, aligned);
#pragma unroll
    for (int k = 0; k < kPack<S>; ++k) {
      const A scaled = g.v[k] * scale;
      m.v[k] = fma(new1, scaled - m.v[k], m.v[k]);
      v.v[k] = fma(new2 * scaled, scaled, beta2 * v.v[k]);
      x.v[k] = fma(rate, m.v[k] / fma(sqrt(v.v[k]), root, eps), x.v[k] * keep);
    }
    store_pack(m, ms + i, n, aligned);
    store_pack(v, vs + i, n, aligned);
    store_pack(x, param + i, n, aligned);
  });
}

// One block, kAdamwBlock elements of one parameter.
__global__ void __launch_bounds__(kThreads) adamw_squares_kernel(AdamwCudaArgs a) {
  const int64_t block = blockIdx.x;
  const AdamwParam& p = param_of(a, block);
  const double sum = p.dtype == DType::f32    ? squares_of<float>(p, block)
                     : p.dtype == DType::bf16 ? squares_of<bfloat16>(p, block)
                                              : squares_of<double>(p, block);
  if (threadIdx.x == 0) a.squares[block] = sum;
}

// One block: the norm; where it is finite, the numbers of each parameter's step, which counts now.
__global__ void __launch_bounds__(kNormThreads) adamw_norm_kernel(AdamwCudaArgs a) {
  double sum = 0.0;
  for (int64_t b = threadIdx.x; b < a.num_blocks; b += kNormThreads) sum += a.squares[b];
  const double norm = sqrt(block_reduce(sum, Add{}, 0.0));
  if (threadIdx.x == 0) *a.norm = norm;
  if (!(norm < infinity<double>())) return;
  for (int64_t i = threadIdx.x; i < a.P; i += kNormThreads) {
    AdamwParam& p = a.params[i];
    *p.step += 1.f;
    const double step = *p.step;
    p.rate = a.lr / (1.0 - pow(a.beta1, step));
    p.root = 1.0 / sqrt(1.0 - pow(a.beta2, step));
  }
}

__global__ void __launch_bounds__(kThreads) adamw_update_kernel(AdamwCudaArgs a) {
  const double norm = *a.norm;
  if (!(norm < infinity<double>())) return;
  const int64_t block = blockIdx.x;
  const AdamwParam& p = param_of(a, block);
  switch (p.dtype) {
    case DType::f32: return update<float>(a, p, block, norm);
    case DType::bf16: return update<bfloat16>(a, p, block, norm);
    case DType::f64: return update<double>(a, p, block, norm);
  }
}

}  // namespace

void adamw_cuda(const AdamwCudaArgs& args, CudaStream stream) {
  launch({"adamw_squares", args.num_blocks, kThreads, stream}, adamw_squares_kernel, args);
  launch({"adamw_norm", 1, kNormThreads, stream}, adamw_norm_kernel, args);
  launch({"adamw_update", args.num_blocks, kThreads, stream}, adamw_update_kernel, args);
}

}  // namespace grpo_engine
