// dtype.h -- the element types that kernels store, without any Torch header.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define GE_HOST_DEVICE __host__ __device__
#else
#define GE_HOST_DEVICE
#endif

namespace grpo_engine {

// Storage types. Arithmetic on f32 and bf16 is float32. f64 exists so that gradcheck can run on the kernels themselves.
enum class DType : int32_t { f32, bf16, f64 };

// Brain float: the upper half of a float32. Layout-compatible with at::BFloat16.
struct bfloat16 {
  uint16_t bits;
};

// Arithmetic type of a storage type.
template <typename S>
struct ArithOf {
  using type = float;
};
template <>
struct ArithOf<double> {
  using type = double;
};
template <typename S>
using Arith = typename ArithOf<S>::type;

}  // namespace grpo_engine
