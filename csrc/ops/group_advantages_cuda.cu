#include "ops/group_advantages.h"

#include "core/cuda_values.cuh"
#include "ops/group_advantages.cuh"

namespace grpo_engine {
namespace {

// One group a thread: P is tens to thousands and G is small, so the launch is what this costs.
template <typename T>
__global__ void group_advantages_kernel(GroupAdvantagesArgs a) {
  const int64_t p = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (p >= a.P) return;
  group_advantages_row(static_cast<const T*>(a.rewards) + p * a.G, static_cast<T*>(a.advantages) + p * a.G, a.G, a.eps,
                       a.std);
}

}  // namespace

void group_advantages_cuda(const GroupAdvantagesArgs& args, CudaStream stream) {
  constexpr int kThreads = 128;
  launch({"group_advantages", ceil_div(args.P, kThreads), kThreads, stream},
         args.dtype == DType::f64 ? group_advantages_kernel<double> : group_advantages_kernel<float>, args);
}

}  // namespace grpo_engine
