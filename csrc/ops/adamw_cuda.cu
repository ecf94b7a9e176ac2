#include "ops/adamw.h"

#include "core/cuda_values.cuh"
#include "core/reduce.cuh"
#include "ops/adamw.cuh"

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
  for (int64_t i = first + static_cast<int64_t>(threadIdx.x) * kPack<S>; i < last; i += kThreads * kPack<S>)
    use(i, last - i);
}

__device__ inline bool aligned_to_packs(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// N elements of type T, one access where they are aligned and all there.
template <typename T, int N>
struct alignas(N * sizeof(T)) Run {
  T v[N];
};
template <typename T, int N>
__device__ inline Run<T, N> load_run(const T* p, int64_t n, bool aligned) {
  if (aligned && n >= N) return *reinterpret_cast<const Run<T, N>*>(p);
  Run<T, N> run{};
#pragma unroll
  for (int k = 0; k < N; ++k) {
    if (k < n) run.v[k] = p[k];
  }
  return run;
}
template <typename T, int N>
__device__ inline void store_run(const Run<T, N>& run, T* p, int64_t n, bool aligned) {
  if (aligned && n >= N) {
    *reinterpret_cast<Run<T, N>*>(p) = run;
    return;
  }
#pragma unroll
  for (int k = 0; k < N; ++k) {
    if (k < n) p[k] = run.v[k];
  }
}

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

// The numbers of a parameter's step, and the step of one element.
template <typename A>
struct Step {
  A scale, keep, eps, new1, beta2, new2, rate, root;

  __device__ Step(const AdamwCudaArgs& a, const AdamwParam& p, double norm) {
    const double limit = a.clip_norm / (norm + 1e-6);
    scale = static_cast<A>(limit < 1.0 ? limit : 1.0), keep = static_cast<A>(1.0 - a.decay), eps = static_cast<A>(a.eps);
    new1 = static_cast<A>(1.0 - a.beta1), beta2 = static_cast<A>(a.beta2), new2 = static_cast<A>(1.0 - a.beta2);
    rate = static_cast<A>(-p.rate), root = static_cast<A>(p.root);
  }

  __device__ void operator()(A g, A& m, A& v, A& x) const {
    const A scaled = g * scale;
    m = fma(new1, scaled - m, m);
    v = fma(new2 * scaled, scaled, beta2 * v);
    x = fma(rate, m / fma(sqrt(v), root, eps), x * keep);
  }
};

template <typename S>
__device__ inline void update(const AdamwCudaArgs& a, const AdamwParam& p, int64_t block, double norm) {
  const Step<Arith<S>> step(a, p, norm);
  S *param = static_cast<S*>(p.param), *ms = static_cast<S*>(p.m), *vs = static_cast<S*>(p.v);
  const S* grad = static_cast<const S*>(p.grad);
  const bool aligned = aligned_to_packs(grad) && aligned_to_packs(param) && aligned_to_packs(ms) && aligned_to_packs(vs);
  each_pack_of_block<S>(p, block, [&](int64_t i, int64_t n) {
    const Pack<S> g = load_pack(grad + i, n, aligned);
    Pack<S> m = load_pack(ms + i, n, aligned), v = load_pack(vs + i, n, aligned), x = load_pack(param + i, n, aligned);
#pragma unroll
    for (int k = 0; k < kPack<S>; ++k) step(g.v[k], m.v[k], v.v[k], x.v[k]);
    store_pack(m, ms + i, n, aligned);
    store_pack(v, vs + i, n, aligned);
    store_pack(x, param + i, n, aligned);
  });
}

// The same of a bfloat16 parameter with a float32 master; G: storage type of the gradient.
template <typename G>
__device__ inline void update_master(const AdamwCudaArgs& a, const AdamwParam& p, int64_t block, double norm) {
  const Step<float> step(a, p, norm);
  constexpr int kRun = kPack<float>;  // elements at a time
  auto* high = static_cast<uint16_t*>(p.param);
  float *ms = static_cast<float*>(p.m), *vs = static_cast<float*>(p.v);
  const G* grad = static_cast<const G*>(p.grad);
  const bool aligned = aligned_to_packs(grad) && aligned_to_packs(high) && aligned_to_packs(p.low) && aligned_to_packs(ms) &&
                       aligned_to_packs(vs);
  each_pack_of_block<float>(p, block, [&](int64_t i, int64_t n) {
    Pack<float> m = load_pack(ms + i, n, aligned), v = load_pack(vs + i, n, aligned);
    const auto g = load_run<G, kRun>(grad + i, n, aligned);
    auto highs = load_run<uint16_t, kRun>(high + i, n, aligned);
    auto lows = load_run<int16_t, kRun>(p.low + i, n, aligned);
#pragma unroll
    for (int k = 0; k < kRun; ++k) {
      float x = join_float({highs.v[k], lows.v[k]});
      step(to_arith(g.v[k]), m.v[k], v.v[k], x);
      const SplitFloat split = split_float(x);
      highs.v[k] = split.high;
      lows.v[k] = split.low;
    }
    store_pack(m, ms + i, n, aligned);
    store_pack(v, vs + i, n, aligned);
    store_run(highs, high + i, n, aligned);
    store_run(lows, p.low + i, n, aligned);
  });
}

// One block, kAdamwBlock elements of one parameter.
__global__ void __launch_bounds__(kThreads) adamw_squares_kernel(AdamwCudaArgs a) {
  const int64_t block = blockIdx.x;
  const AdamwParam& p = param_of(a, block);
  const double sum = p.grad_dtype == DType::f32    ? squares_of<float>(p, block)
                     : p.grad_dtype == DType::bf16 ? squares_of<bfloat16>(p, block)
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

__global__ void __launch_bounds__(kThreads) adamw_update_master_kernel(AdamwCudaArgs a) {
  const double norm = *a.norm;
  if (!(norm < infinity<double>())) return;
  const int64_t block = blockIdx.x;
  const AdamwParam& p = param_of(a, block);
  if (p.grad_dtype == DType::f32) return update_master<float>(a, p, block, norm);
  return update_master<bfloat16>(a, p, block, norm);
}

}  // namespace

void adamw_cuda(const AdamwCudaArgs& args, CudaStream stream) {
  launch({"adamw_squares", args.num_blocks, kThreads, stream}, adamw_squares_kernel, args);
  launch({"adamw_norm", 1, kNormThreads, stream}, adamw_norm_kernel, args);
  launch({"adamw_update", args.num_blocks, kThreads, stream},
         args.has_low ? adamw_update_master_kernel : adamw_update_kernel, args);
}

}  // namespace grpo_engine
