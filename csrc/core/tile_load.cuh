// tile_load.cuh -- tiles of bfloat16 between global memory, shared memory and the registers of mma.cuh.
//
// A tile has kRows rows of kColumns elements, in chunks of 16 bytes. Chunk c of row r has index c ^ f(r) in its row. So the
// eight rows of a fragment at one c lie in different banks.
#pragma once
#include "core/cuda_values.cuh"

namespace grpo_engine {

template <int kRows_, int kColumns_>
struct Tile {
  static constexpr int kRows = kRows_, kColumns = kColumns_;
  static constexpr int kChunk = kPack<bfloat16>, kChunks = kColumns / kChunk;  // of a row
  static_assert(kChunks == 4 || kChunks % 8 == 0);

  // The first element of a chunk.
  __device__ static int offset(int row, int chunk) {
    return row * kColumns + (chunk ^ (kChunks == 4 ? row / 2 % 4 : row % 8)) * kChunk;
  }
};

// Copies `bytes` <= 16 and fills the rest of 16 with zeros. The copy is visible after copies_landed and a barrier.
__device__ inline void copy_async(const void* from, void* to, int bytes) {
#ifdef GE_CUDA_EMULATED
  cuda_emulator::require_aligned(from, 16);
  cuda_emulator::require_aligned(to, 16);
  memset(to, 0, 16);
  memcpy(to, from, static_cast<size_t>(bytes));
#else
  const unsigned shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from), "r"(bytes) : "memory");
#endif
}
// Closes the group of this thread's copies since the last call.
__device__ inline void end_copies() {
#ifndef GE_CUDA_EMULATED
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits for this thread's copies, except those of the last kPending groups.
template <int kPending>
__device__ inline void copies_landed() {
#ifndef GE_CUDA_EMULATED
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// Loads a chunk of a tile: n elements from `source`, then zeros. With n = 0 `source` may be any address; it is aligned if
// `aligned` says so.
__device__ inline void load_chunk(const bfloat16* source, int n, bool aligned, bfloat16* to) {
  constexpr int kChunk = kPack<bfloat16>;
  if (aligned) {
    copy_async(source, to, n * static_cast<int>(sizeof(bfloat16)));
    return;
  }
  Stored<bfloat16> values;
#pragma unroll
  for (int j = 0; j < kChunk; ++j) values.v[j].bits = j < n ? source[j].bits : uint16_t{0};
  store16(values, to);
}

// How many elements of a chunk of kPack exist when `left` are left.
__device__ inline int chunk_elements(int64_t left) {
  constexpr int kChunk = kPack<bfloat16>;
  return left <= 0 ? 0 : left < kChunk ? static_cast<int>(left) : kChunk;
}

// kThreads threads, a block if `thread` is not given, fill a tile from rows `stride` apart. Elements behind `rows` and
// `columns` become 0. `aligned`: rows_aligned(from, stride).
template <typename T, int kThreads>
__device__ inline void load_tile(const bfloat16* from, int64_t stride, int64_t rows, int64_t columns, bool aligned,
                                 bfloat16* tile, int thread = static_cast<int>(threadIdx.x)) {
  static_assert(T::kRows * T::kChunks % kThreads == 0);
#pragma unroll
  for (int k = 0; k < T::kRows * T::kChunks / kThreads; ++k) {
    const int i = k * kThreads + thread, row = i / T::kChunks, chunk = i % T::kChunks;
    const int n = row < rows ? chunk_elements(columns - chunk * T::kChunk) : 0;
    load_chunk(n > 0 ? from + row * stride + chunk * T::kChunk : from, n, aligned, tile + T::offset(row, chunk));
  }
}

#ifdef GE_CUDA_EMULATED
struct FragmentPayload {
  const bfloat16* row;
  uint32_t* out;
  bool transposed;
};
#endif

// One warp loads four 8 x 8 matrices of a tile. Lane l gives the address of row l % 8 of matrix l / 8. out[i] of lane l are
// elements (l / 4, 2 (l % 4) and the next) of matrix i, or of its transpose.
template <bool kTransposed>
__device__ inline void load_fragments(const bfloat16* row, uint32_t (&out)[4]) {
#ifdef GE_CUDA_EMULATED
  cuda_emulator::require_aligned(row, 16);
  FragmentPayload mine{row, out, kTransposed};
  cuda_emulator::warp_collective("ldmatrix", kAllLanes, &mine, [](void** payloads, unsigned) {
    const auto lane = [&](int l) { return static_cast<FragmentPayload*>(payloads[l]); };
    for (int l = 0; l < kWarpSize; ++l) {
      for (int i = 0; i < 4; ++i) {
        uint32_t two = 0;
        for (int k = 0; k < 2; ++k) {
          const int a = l / 4, b = l % 4 * 2 + k;
          const bfloat16 x = lane(l)->transposed ? lane(i * 8 + b)->row[a] : lane(i * 8 + a)->row[b];
          two |= static_cast<uint32_t>(x.bits) << (16 * k);
        }
        lane(l)->out[i] = two;
      }
    }
  });
#else
  const unsigned shared = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared)
                 : "memory");
  }
#endif
}

// a[16, 16] and two b[16, 8] as mma.cuh takes them, from row m or column n and from k on in their tiles. kAcross: the
// tile's rows are k, else m or n.
template <typename T, bool kAcross>
__device__ inline void load_a(const bfloat16* tile, int m, int k, uint32_t (&a)[4]) {
  const int lane = threadIdx.x % kWarpSize, matrix = lane / 8;
  const int along_m = m + matrix % 2 * 8, along_k = k + matrix / 2 * 8;
  load_fragments<kAcross>(
      tile + (kAcross ? T::offset(along_k + lane % 8, along_m / 8) : T::offset(along_m + lane % 8, along_k / 8)), a);
}
template <typename T, bool kAcross>
__device__ inline void load_two_b(const bfloat16* tile, int n, int k, uint32_t (&b)[4]) {
  const int lane = threadIdx.x % kWarpSize, matrix = lane / 8;
  const int along_n = n + matrix / 2 * 8, along_k = k + matrix % 2 * 8;
  load_fragments<kAcross>(
      tile + (kAcross ? T::offset(along_k + lane % 8, along_n / 8) : T::offset(along_n + lane % 8, along_k / 8)), b);
}

}  // namespace grpo_engine
