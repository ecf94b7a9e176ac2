// cuda_call.h -- the Torch side of a launch: which kernels an op runs, on which device and stream.
//
// An op's x.cpp has one implementation for CPU and CUDA, registered by GE_DEVICE_IMPL. It starts its kernel like this:
//
//   if (cuda_call(x, [&](auto stream) { swiglu_forward_cuda(args, stream); })) return y;
//   parallel_items(swiglu_forward_cpu, args, args.T, kCost * args.F);
//
// With GE_CUDA the extension has CUDA kernels. GE_CUDA_EMULATED makes the extension of the tests, in which CPU tensors go
// through the emulated kernels. Without either, the launch is never instantiated and needs no CUDA.
#pragma once
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "core/cuda_stream.h"
#ifdef GE_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace grpo_engine {

// Whether an op on t runs CUDA kernels. If so, the host does not read its values.
inline bool on_cuda([[maybe_unused]] const at::Tensor& t) {
#if defined(GE_CUDA_EMULATED)
  return true;
#elif defined(GE_CUDA)
  return t.is_cuda();
#else
  return false;
#endif
}

// If t is on CUDA: calls launch(current stream of its device) and returns true.
template <typename Launch>
bool cuda_call([[maybe_unused]] const at::Tensor& t, [[maybe_unused]] Launch launch) {
#if defined(GE_CUDA_EMULATED)
  launch(CudaStream{});
  return true;
#elif defined(GE_CUDA)
  if (!t.is_cuda()) return false;
  const c10::cuda::CUDAGuard guard(t.device());
  launch(CudaStream{c10::cuda::getCurrentCUDAStream().stream()});
  return true;
#else
  return false;
#endif
}

}  // namespace grpo_engine

// GE_DEVICE_IMPL(m) { m.impl(...); } registers the implementations of a file's ops for each device of the build.
#ifdef GE_CUDA
#define GE_CUDA_IMPL \
  TORCH_LIBRARY_IMPL(grpo_engine, CUDA, m) { device_impl(m); }
#else
#define GE_CUDA_IMPL
#endif
#define GE_DEVICE_IMPL(m)                                     \
  static void device_impl(torch::Library& m);                 \
  TORCH_LIBRARY_IMPL(grpo_engine, CPU, m) { device_impl(m); } \
  GE_CUDA_IMPL                                                \
  static void device_impl(torch::Library& m)
