// cuda_launch.h -- the header of every .cu: the CUDA runtime, or its emulator, and launch().
//
// nvcc compiles a .cu for the GPU. For the tests the C++ compiler compiles it with GE_CUDA_EMULATED
// (csrc/tests/cuda_emulator.h). So a .cu has no <<<>>> and takes its dynamic shared memory by dynamic_shared().
//
// Rules of all kernels:
//   - What a block writes for a row depends on that row alone. Sums have one fixed tree (core/reduce.cuh), whose shape
//     depends on the row's length. There are no float atomics.
//   - Index arithmetic is int64_t.
//   - nvcc runs with --fmad=false: a fused multiply-add happens only where a kernel calls fma. So two instantiations of one
//     arithmetic have the same bits.
//   - Launchers (x_cuda in x.h) neither allocate nor synchronise, so a CUDA graph can record them. Scratch is a tensor of
//     the Torch side.
//   - Values of tensors are not read back to be checked. An index outside its range is never followed: its row becomes NaN
//     (or -1 where it holds token ids), and a write to it does not happen.
#pragma once
#ifdef GE_CUDA_EMULATED
#include "tests/cuda_emulator.h"
#else
#include <cuda_runtime.h>

#include "core/cuda_check.h"
#endif
#include <cstdint>
#include <stdexcept>
#include <string>

#include "core/cuda_stream.h"

namespace grpo_engine {

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kAllLanes = 0xFFFFFFFFu;

struct Launch {
  const char* name;  // for errors
  int64_t blocks;    // gridDim.x; nothing is launched for 0
  int threads;       // of a block, a multiple of 32
  CudaStream stream;
  int64_t shared_bytes = 0;  // dynamic
  int64_t blocks_y = 1;
};

template <typename... Params, typename... Args>
void launch(const Launch& l, void (*kernel)(Params...), const Args&... args) {
  if (l.blocks == 0 || l.blocks_y == 0) return;
  if (l.blocks > INT32_MAX || l.blocks_y > 65535) {
    throw std::runtime_error("grpo_engine: " + std::string(l.name) + ": a grid of " + std::to_string(l.blocks) + " x " +
                             std::to_string(l.blocks_y) + " blocks is too large");
  }
  const dim3 grid(static_cast<unsigned>(l.blocks), static_cast<unsigned>(l.blocks_y));
  const auto shared = static_cast<std::size_t>(l.shared_bytes);
#ifdef GE_CUDA_EMULATED
  cuda_emulator::launch(l.name, grid, dim3(l.threads), shared, [&] { kernel(args...); });
#else
  constexpr int64_t kUnasked = 48 * 1024;  // more must be asked for
  if (l.shared_bytes > kUnasked) {
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)), l.name);
  }
  // clang-format off: it takes the end of the launch for three templates'
  kernel<<<grid, l.threads, shared, l.stream>>>(args...);
  // clang-format on
  cuda_check(cudaGetLastError(), l.name);
#endif
}

// The block's dynamic shared memory, aligned to 1,024 bytes.
template <typename T>
__device__ inline T* dynamic_shared() {
#ifdef GE_CUDA_EMULATED
  return static_cast<T*>(cuda_emulator::dynamic_shared());
#else
  extern __shared__ __align__(1024) unsigned char ge_dynamic_shared[];
  return reinterpret_cast<T*>(ge_dynamic_shared);
#endif
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace grpo_engine
