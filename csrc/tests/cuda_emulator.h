// cuda_emulator.h -- runs CUDA kernels on the CPU, for tests on machines without a GPU.
//
// The part of CUDA C++ that our kernels use, in plain C++. A .cu that is compiled with GE_CUDA_EMULATED includes this header
// and not the CUDA runtime. The threads of a block are fibers. Blocks run one after the other, the last first. A warp runs
// as far as it can before the next one starts. Every other block takes its warps and lanes backwards. So a kernel that
// relies on an order, or lacks a barrier, gives wrong numbers. A failure repeats.
//
// The emulator finds these faults. Each is a std::runtime_error that names the kernel and its threads:
//   - a __syncthreads() that some threads of the block never reach;
//   - a warp collective whose lanes are missing, disagree about the mask or meet in different collectives;
//   - a 16-byte access that is not aligned; a launch beyond the limits of sm_90.
// Dynamic shared memory holds NaN when a block starts. The emulator does not find races that these orders do not show, or
// accesses out of bounds (compute-sanitizer does, on a GPU). It says nothing about speed.
#pragma once
#include <math.h>
#include <string.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __shared__ static  // one block runs at a time
#define __CUDA_EMULATED__ 1

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_emulator {

// Runs thread() for every thread of the grid.
void launch(const char* name, dim3 grid, dim3 block, std::size_t shared_bytes, void (*thread)(void*), void* context);
template <typename Thread>
void launch(const char* name, dim3 grid, dim3 block, std::size_t shared_bytes, Thread thread) {
  launch(name, grid, block, shared_bytes, [](void* t) { (*static_cast<Thread*>(t))(); }, &thread);
}

void* dynamic_shared();
void require_aligned(const void* p, std::size_t bytes);

// Waits until all threads of the block are here.
void block_barrier();

// A collective of the lanes of `mask`. Each brings a payload, and the last to come runs finish(payloads by lane, mask) for
// all. Lanes outside the mask have a null payload. Everything between lanes is built on this.
using Finish = void (*)(void** payloads, unsigned mask);
void warp_collective(const char* name, unsigned mask, void* payload, Finish finish);

template <typename T>
struct Exchange {
  T value, result;
  unsigned source;  // lane
};

template <typename T>
T exchange(const char* name, unsigned mask, T value, unsigned source) {
  static_assert(std::is_trivially_copyable_v<T>);
  Exchange<T> mine{value, value, source};
  warp_collective(name, mask, &mine, [](void** payloads, unsigned) {
    for (int lane = 0; lane < 32; ++lane) {
      auto* to = static_cast<Exchange<T>*>(payloads[lane]);
      if (!to) continue;
      // reading a lane that takes no part gives an undefined value: here, one that shows
      const auto* from = static_cast<Exchange<T>*>(payloads[to->source]);
      if (from) to->result = from->value;
      else memset(static_cast<void*>(&to->result), 0xFF, sizeof(T));
    }
  });
  return mine.result;
}

struct Vote {
  bool predicate;
  unsigned result;
};

inline unsigned lane() { return threadIdx.x % 32; }

}  // namespace cuda_emulator

inline void __syncthreads() { cuda_emulator::block_barrier(); }
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) {
  int nothing = 0;
  cuda_emulator::warp_collective("__syncwarp", mask, &nothing, [](void**, unsigned) {});
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const unsigned lane = cuda_emulator::lane(), first = lane / width * width;
  return cuda_emulator::exchange("__shfl_sync", mask, value, first + static_cast<unsigned>(source) % width);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int distance, int width = 32) {
  const unsigned lane = cuda_emulator::lane(), source = lane ^ static_cast<unsigned>(distance);
  return cuda_emulator::exchange("__shfl_xor_sync", mask, value, source / width == lane / width ? source : lane);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  const unsigned lane = cuda_emulator::lane(), source = lane + distance;
  return cuda_emulator::exchange("__shfl_down_sync", mask, value, source / width == lane / width ? source : lane);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  const unsigned lane = cuda_emulator::lane();
  return cuda_emulator::exchange("__shfl_up_sync", mask, value, lane % width >= distance ? lane - distance : lane);
}
inline unsigned __ballot_sync(unsigned mask, bool predicate) {
  cuda_emulator::Vote mine{predicate, 0};
  cuda_emulator::warp_collective("__ballot_sync", mask, &mine, [](void** payloads, unsigned) {
    unsigned votes = 0;
    for (int lane = 0; lane < 32; ++lane) {
      if (payloads[lane] && static_cast<cuda_emulator::Vote*>(payloads[lane])->predicate) votes |= 1u << lane;
    }
    for (int lane = 0; lane < 32; ++lane) {
      if (payloads[lane]) static_cast<cuda_emulator::Vote*>(payloads[lane])->result = votes;
    }
  });
  return mine.result;
}
inline bool __any_sync(unsigned mask, bool predicate) { return __ballot_sync(mask, predicate) != 0; }
inline bool __all_sync(unsigned mask, bool predicate) { return __ballot_sync(mask, predicate) == mask; }
// Blocks and threads take turns at known places only, so plain code is atomic.
template <typename T>
T atomicAdd(T* p, std::type_identity_t<T> x) {
  static_assert(std::is_integral_v<T>, "no float atomics: their order would show in the bits");
  const T old = *p;
  *p = old + x;
  return old;
}
template <typename T>
T atomicMax(T* p, std::type_identity_t<T> x) {
  static_assert(std::is_integral_v<T>);
  const T old = *p;
  *p = old < x ? x : old;
  return old;
}
template <typename T>
T atomicMin(T* p, std::type_identity_t<T> x) {
  static_assert(std::is_integral_v<T>);
  const T old = *p;
  *p = x < old ? x : old;
  return old;
}
template <typename T>
T atomicOr(T* p, std::type_identity_t<T> x) {
  static_assert(std::is_integral_v<T>);
  const T old = *p;
  *p = old | x;
  return old;
}
template <typename T>
T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> x) {
  static_assert(std::is_integral_v<T>);
  const T old = *p;
  if (old == expected) *p = x;
  return old;
}
inline void __threadfence() {}

template <typename T>
T __ldg(const T* p) {
  return *p;
}

inline unsigned __float_as_uint(float x) {
  unsigned u;
  memcpy(&u, &x, 4);
  return u;
}
inline float __uint_as_float(unsigned u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}
inline int __float_as_int(float x) { return static_cast<int>(__float_as_uint(x)); }
inline float __int_as_float(int i) { return __uint_as_float(static_cast<unsigned>(i)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
