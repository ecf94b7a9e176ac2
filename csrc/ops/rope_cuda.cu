#include "ops/rope.h"

#include "core/cuda_values.cuh"
#include "ops/rope.cuh"

namespace grpo_engine {
namespace {

constexpr int kThreads = 128;

// One pair (i, i + E/2) of one token a thread, for all heads: they share its angle, which costs more than they do.
// Neighbouring threads have neighbouring i.
template <typename S>
__global__ void __launch_bounds__(kThreads) rope_kernel(RopeArgs a) {
  using A = Arith<S>;
  const int64_t half = a.E / 2, index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= a.T * half) return;
  const int64_t t = index / half, i = index % half, position = a.position[t];
  const float frequency = a.frequency ? a.frequency[i] : rope_frequency(a.theta, i, a.E);
  const double angle = position < 0 ? not_a_number<double>() : rope_angle(position, frequency);
  const A c = static_cast<A>(static_cast<float>(cos(angle)));
  const A s = static_cast<A>(static_cast<float>(a.inverse ? -sin(angle) : sin(angle)));
  const S* x = static_cast<const S*>(a.x) + t * a.x_stride + i;
  S* y = static_cast<S*>(a.y) + t * a.y_stride + i;
#pragma unroll 4
  for (int64_t h = 0; h < a.H; ++h) {
    const A low = to_arith(x[h * a.E]), high = to_arith(x[h * a.E + half]);
    from_arith(low * c - high * s, y + h * a.E);
    from_arith(high * c + low * s, y + h * a.E + half);
  }
}

}  // namespace

void rope_cuda(const RopeArgs& args, CudaStream stream) {
  for_dtype(args.dtype, [&]<typename S>() {
    launch({"rope", ceil_div(args.T * (args.E / 2), kThreads), kThreads, stream}, rope_kernel<S>, args);
  });
}

}  // namespace grpo_engine
