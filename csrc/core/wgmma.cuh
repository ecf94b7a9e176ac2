// wgmma.cuh -- a warpgroup's matmul of bfloat16 tiles in shared memory on Hopper's tensor cores, float32 sums.
//
//   d[64, N] = a[64, 16] b[16, N] + d      wgmma.mma_async.m64nNk16, sm_90a alone; `add`: else without d
//
// A tile is lines of 64 elements, 128 bytes. It starts at a multiple of 1,024 bytes. The chunks of 16 bytes of a line are
// permuted as in Tile (tile_load.cuh):
//   k adjacent    a line for each row of a or column of b: 64 of its k
//   k across      a line for each of 64 k: 64 rows of a or columns of b; then the next 64 rows or columns
// Warp w of the warpgroup has rows 16 w to 16 w + 15 of d. d[j] is what mma.cuh has in its columns 8 j to 8 j + 7.
//
// The matmuls run beside the threads that start them. Between wgmma_begin and wgmma_done neither d nor the tiles may be
// touched. The matmuls see what cp.async wrote after wgmma_sees_copies and a barrier. The emulator has none of this. There,
// and on other GPUs, mma.cuh computes the same sums.
#pragma once
#ifdef GE_CUDA_EMULATED
#error "not on the emulator"
#endif
#include "core/cuda_launch.h"

namespace grpo_engine {

inline constexpr int kWgmmaThreads = 128;  // of a warpgroup
inline constexpr int kWgmmaLine = 64;      // elements

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// The descriptor of a tile's lines. The next eight lines follow 1,024 bytes on. With k across the next 64 rows or columns
// follow 64 lines on.
__device__ inline uint64_t wgmma_tile(const bfloat16* first) {
  constexpr uint64_t kSwizzle128 = 1;
  const auto at = static_cast<uint64_t>(__cvta_generic_to_shared(first));
  return (at & 0x3FFFF) >> 4 | uint64_t{kWgmmaLine * 128 >> 4} << 16 | uint64_t{1024 >> 4} << 32 | kSwizzle128 << 62;
}
// From a tile to its part 16 k on.
template <bool kAcross>
inline constexpr uint64_t kWgmmaNextK = (kAcross ? 16 * 128 : 16 * 2) >> 4;

__device__ inline void wgmma_sees_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ inline void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Closes the group of matmuls since the last call.
__device__ inline void wgmma_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits for all matmuls, except those of the last kPending groups.
template <int kPending>
__device__ inline void wgmma_done() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from reading d before the wait above.
template <int kColumns>
__device__ inline void wgmma_result(float (&d)[kColumns][4]) {
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(d[j][e])::"memory");
  }
}

#define GE_OF(four) "+f"(four[0]), "+f"(four[1]), "+f"(four[2]), "+f"(four[3])

template <bool kAcrossA, bool kAcrossB>
__device__ inline void wgmma_bf16(float (&d)[8][4], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{ .reg .pred add; setp.ne.b32 add, %36, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
      "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31 "
      "}, %32, %33, add, 1, 1, %34, %35; }"
      : GE_OF(d[0]), GE_OF(d[1]), GE_OF(d[2]), GE_OF(d[3]), GE_OF(d[4]), GE_OF(d[5]), GE_OF(d[6]), GE_OF(d[7])
      : "l"(a), "l"(b), "n"(kAcrossA), "n"(kAcrossB), "r"(static_cast<int>(add)));
}

template <bool kAcrossA, bool kAcrossB>
__device__ inline void wgmma_bf16(float (&d)[16][4], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{ .reg .pred add; setp.ne.b32 add, %68, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
      "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "
      "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "
      "%62, %63 "
      "}, %64, %65, add, 1, 1, %66, %67; }"
      : GE_OF(d[0]), GE_OF(d[1]), GE_OF(d[2]), GE_OF(d[3]), GE_OF(d[4]), GE_OF(d[5]), GE_OF(d[6]), GE_OF(d[7]), GE_OF(d[8]),
        GE_OF(d[9]), GE_OF(d[10]), GE_OF(d[11]), GE_OF(d[12]), GE_OF(d[13]), GE_OF(d[14]), GE_OF(d[15])
      : "l"(a), "l"(b), "n"(kAcrossA), "n"(kAcrossB), "r"(static_cast<int>(add)));
}

#undef GE_OF
#endif

}  // namespace grpo_engine
