// mma.cuh -- a warp's matmul of small bfloat16 matrices on the tensor cores, float32 sums.
//
//   d[16, 8] += a[16, 16] b[16, 8]        mma.sync.m16n8k16, sm_80 and later
//
// Elements of lane l, with g = l / 4 and q = 2 (l % 4). A register holds two bfloat16, the first in its lower half:
//   a[0] (g, q..q+1)   a[1] (g + 8, q..q+1)   a[2] (g, q+8..q+9)   a[3] (g + 8, q+8..q+9)     (row, k)
//   b[0] (q..q+1, g)   b[1] (q+8..q+9, g)                                                     (k, column)
//   d[0..1] (g, q..q+1)   d[2..3] (g + 8, q..q+1)                                             (row, column)
// An element of d depends on its own row of a, column of b and d alone. The emulator rounds once. The tensor cores round in
// their own way, so their bits differ from the emulator's.
#pragma once
#include "core/cuda_launch.h"

namespace grpo_engine {

#ifdef GE_CUDA_EMULATED

struct MmaPayload {
  float* d;
  const uint32_t *a, *b;
};

inline void mma_bf16_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  MmaPayload mine{d, a, b};
  cuda_emulator::warp_collective("mma", kAllLanes, &mine, [](void** payloads, unsigned) {
    const auto lane = [&](int l) { return static_cast<MmaPayload*>(payloads[l]); };
    const auto value = [](uint32_t two, int k) { return __uint_as_float(k % 2 ? two & 0xFFFF0000u : two << 16); };
    double of_a[16][16], of_b[16][8];
    for (int k = 0; k < 16; ++k) {
      for (int row = 0; row < 16; ++row) of_a[row][k] = value(lane(row % 8 * 4 + k % 8 / 2)->a[row / 8 + k / 8 * 2], k);
      for (int column = 0; column < 8; ++column) of_b[k][column] = value(lane(column * 4 + k % 8 / 2)->b[k / 8], k);
    }
    for (int row = 0; row < 16; ++row) {
      const auto to = [&](int column) -> float& { return lane(row % 8 * 4 + column / 2)->d[row / 8 * 2 + column % 2]; };
      double sum[8];
      for (int column = 0; column < 8; ++column) sum[column] = to(column);
      for (int k = 0; k < 16; ++k) {
        for (int column = 0; column < 8; ++column) sum[column] += of_a[row][k] * of_b[k][column];
      }
      for (int column = 0; column < 8; ++column) to(column) = static_cast<float>(sum[column]);
    }
  });
}

#else

__device__ inline void mma_bf16_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#endif

}  // namespace grpo_engine
