// cuda_values.cuh -- storage types in kernels: conversion to the arithmetic type, and 16 bytes at a time.
#pragma once
#include <math.h>
#include <string.h>

#include "core/cuda_launch.h"
#include "core/dtype.h"
#ifdef __CUDACC__
#include <cuda_bf16.h>
#endif

namespace grpo_engine {

__device__ inline float to_arith(float x) { return x; }
__device__ inline double to_arith(double x) { return x; }
__device__ inline float to_arith(bfloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }

__device__ inline void from_arith(float x, float* p) { *p = x; }
__device__ inline void from_arith(double x, double* p) { *p = x; }
// Round to nearest, ties to even; NaN stays NaN.
__device__ inline void from_arith(float x, bfloat16* p) {
#ifdef __CUDACC__
  p->bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
  const unsigned u = __float_as_uint(x);
  p->bits = static_cast<uint16_t>(x != x ? (u >> 16) | 0x40 : (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16);
#endif
}

// A float32 factor for the tensor cores: x = high + low but for one part in 2^16. high is cut off and not rounded, so it
// does not overflow. An infinity has low = 0.
__device__ inline void split_in_two(float x, bfloat16* high, bfloat16* low) {
  high->bits = static_cast<uint16_t>(__float_as_uint(x) >> 16);
  from_arith(fabsf(x) == INFINITY ? 0.f : x - to_arith(*high), low);
}

// Two rounded values in one register, the first in its lower half, as mma.cuh takes them, and the rounded values.
__device__ inline uint32_t pack_two(float first, float second) {
#ifdef __CUDACC__
  const __nv_bfloat162 two = __floats2bfloat162_rn(first, second);
  return __bfloat16_as_ushort(two.x) | static_cast<uint32_t>(__bfloat16_as_ushort(two.y)) << 16;
#else
  bfloat16 low, high;
  from_arith(first, &low);
  from_arith(second, &high);
  return low.bits | static_cast<uint32_t>(high.bits) << 16;
#endif
}
__device__ inline float first_of(uint32_t two) { return __uint_as_float(two << 16); }
__device__ inline float second_of(uint32_t two) { return __uint_as_float(two & 0xFFFF0000u); }

// x after a store and a load.
template <typename S>
__device__ inline Arith<S> round_to(Arith<S> x) {
  S stored;
  from_arith(x, &stored);
  return to_arith(stored);
}

template <typename A>
__host__ __device__ constexpr A infinity() {
  return static_cast<A>(INFINITY);
}
template <typename A>
__host__ __device__ constexpr A not_a_number() {
  return static_cast<A>(NAN);
}

// ---------------------------------------------------------------- 16 bytes at a time

template <typename S>
inline constexpr int kPack = 16 / static_cast<int>(sizeof(S));  // 4 float32, 8 bfloat16, 2 float64

template <typename S>
struct alignas(16) Stored {
  S v[kPack<S>];
};

template <typename S>
struct Pack {
  Arith<S> v[kPack<S>];
};

// One access of 16 bytes. p is aligned to 16 bytes, which only the emulator checks.
template <typename T>
__device__ inline T load16(const void* p) {
#ifdef GE_CUDA_EMULATED
  cuda_emulator::require_aligned(p, 16);
#endif
  return *static_cast<const T*>(p);
}
template <typename T>
__device__ inline void store16(const T& value, void* p) {
#ifdef GE_CUDA_EMULATED
  cuda_emulator::require_aligned(p, 16);
#endif
  *static_cast<T*>(p) = value;
}

// Whether rows that start at p, `stride` elements apart, may be read by whole packs.
template <typename S>
bool rows_aligned(const void* p, int64_t stride) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride % kPack<S> == 0;
}

// p[0 .. n), n <= kPack, and `fill` behind them. `aligned`: p is aligned to 16 bytes.
template <typename S>
__device__ inline Pack<S> load_pack(const S* p, int64_t n, bool aligned, Arith<S> fill = 0) {
  Pack<S> pack;
  if (aligned && n >= kPack<S>) {
    const Stored<S> stored = load16<Stored<S>>(p);
#pragma unroll
    for (int i = 0; i < kPack<S>; ++i) pack.v[i] = to_arith(stored.v[i]);
    return pack;
  }
#pragma unroll
  for (int i = 0; i < kPack<S>; ++i) pack.v[i] = i < n ? to_arith(p[i]) : fill;
  return pack;
}

template <typename S>
__device__ inline void store_pack(const Pack<S>& pack, S* p, int64_t n, bool aligned) {
  if (aligned && n >= kPack<S>) {
    Stored<S> stored;
#pragma unroll
    for (int i = 0; i < kPack<S>; ++i) from_arith(pack.v[i], &stored.v[i]);
    store16(stored, p);
    return;
  }
#pragma unroll
  for (int i = 0; i < kPack<S>; ++i) {
    if (i < n) from_arith(pack.v[i], p + i);
  }
}

// Calls use(i, n) for each pack of this thread, of a row of `length` elements that the block shares: n elements from i on.
template <typename S, typename Use>
__device__ inline void each_pack(int64_t length, Use use) {
  const int64_t step = static_cast<int64_t>(blockDim.x) * kPack<S>;
  for (int64_t i = static_cast<int64_t>(threadIdx.x) * kPack<S>; i < length; i += step) use(i, length - i);
}

// Threads of a block that has one row. The number depends on the row's length alone, and so does the sums' tree.
template <typename S>
int threads_of_row(int64_t length) {
  constexpr int64_t kMost = 512;
  const int64_t threads = ceil_div(ceil_div(length, kPack<S>), kWarpSize) * kWarpSize;
  return static_cast<int>(threads < kWarpSize ? kWarpSize : threads > kMost ? kMost : threads);
}

// Calls function.operator()<S>() with the storage type of a dtype.
template <typename Function>
void for_dtype(DType dtype, Function function) {
  switch (dtype) {
    case DType::f32: return function.template operator()<float>();
    case DType::bf16: return function.template operator()<bfloat16>();
    case DType::f64: return function.template operator()<double>();
  }
}

}  // namespace grpo_engine
