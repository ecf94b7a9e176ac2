// cuda_check.h -- turns an error of the CUDA runtime into std::runtime_error that names the call.
#pragma once
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace grpo_engine {

inline void cuda_check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  throw std::runtime_error("grpo_engine: " + std::string(call) + ": " + cudaGetErrorName(error) + ", " +
                           cudaGetErrorString(error));
}

}  // namespace grpo_engine

#define GE_CUDA_CHECK(call) ::grpo_engine::cuda_check((call), #call)
