// The emulator must fail, and say where, on a kernel that a GPU would hang on or miscompute.
#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <vector>

#define GE_CUDA_EMULATED
#include "core/mma.cuh"
#include "core/reduce.cuh"

namespace grpo_engine {
namespace {

void run(int64_t blocks, int threads, const std::function<void()>& thread, int64_t shared_bytes = 0) {
  cuda_emulator::launch("kernel", dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)),
                        static_cast<std::size_t>(shared_bytes), [&] { thread(); });
}

std::string error_of(int threads, const std::function<void()>& thread) {
  try {
    run(1, threads, thread);
  } catch (const std::runtime_error& e) {
    return e.what();
  }
  return "no error";
}

TEST(CudaEmulator, runs_every_thread_of_every_block_once) {
  std::vector<int> count(5 * 96);
  run(5, 96, [&] { ++count[blockIdx.x * blockDim.x + threadIdx.x]; });
  EXPECT_EQ(count, std::vector<int>(5 * 96, 1));
}

TEST(CudaEmulator, barriers_order_shared_memory) {
  std::vector<int> out(64), shared(64);
  run(1, 64, [&] {
    for (int round = 0; round < 3; ++round) {
      shared[threadIdx.x] = static_cast<int>(threadIdx.x) + round;
      __syncthreads();
      out[threadIdx.x] += shared[63 - threadIdx.x];
      __syncthreads();
    }
  });
  for (int i = 0; i < 64; ++i) EXPECT_EQ(out[i], 3 * (63 - i) + 3);
}

TEST(CudaEmulator, shuffles_and_votes_follow_cuda) {
  run(1, 64, [] {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    EXPECT_EQ(__shfl_sync(kAllLanes, lane + 100 * warp, 7), 7 + 100 * warp);
    EXPECT_EQ(__shfl_xor_sync(kAllLanes, lane, 5), lane ^ 5);
    EXPECT_EQ(__shfl_down_sync(kAllLanes, lane, 4), lane + 4 < 32 ? lane + 4 : lane);
    EXPECT_EQ(__shfl_up_sync(kAllLanes, lane, 4), lane >= 4 ? lane - 4 : lane);
    EXPECT_EQ(__shfl_down_sync(kAllLanes, lane, 4, 8), lane % 8 + 4 < 8 ? lane + 4 : lane);
    EXPECT_EQ(__ballot_sync(kAllLanes, lane % 2 == 0), 0x55555555u);
    if (lane < 16) {
      EXPECT_EQ(__shfl_xor_sync(0xFFFFu, lane, 8), lane ^ 8);
    }
    EXPECT_TRUE(__any_sync(kAllLanes, lane == 3));
    EXPECT_FALSE(__all_sync(kAllLanes, lane == 3));
  });
}

TEST(CudaEmulator, reductions_give_every_thread_the_same) {
  for (int threads : {32, 96, 1024}) {
    run(3, threads, [&] {
      const int mine = static_cast<int>(threadIdx.x);
      EXPECT_EQ(block_reduce(mine, Add{}, 0), threads * (threads - 1) / 2);
      EXPECT_EQ(block_reduce(static_cast<float>(mine), Max{}, 0.f), static_cast<float>(threads - 1));
    });
  }
}

TEST(CudaEmulator, an_mma_of_the_tensor_cores_is_the_matmul_of_its_matrices) {
  // small integers: exact in bfloat16 and float32
  const auto A = [](int row, int k) { return static_cast<float>((row * 7 + k * 3) % 11 - 5); };
  const auto B = [](int k, int column) { return static_cast<float>((k * 5 + column) % 13 - 6); };
  const auto two = [](float low, float high) { return __float_as_uint(low) >> 16 | (__float_as_uint(high) & 0xFFFF0000u); };
  float product[16][8];
  run(1, 32, [&] {
    const int g = threadIdx.x / 4, q = threadIdx.x % 4 * 2;
    uint32_t a[4], b[2];
    for (int i = 0; i < 4; ++i) {
      const int row = g + i % 2 * 8, k = q + i / 2 * 8;
      a[i] = two(A(row, k), A(row, k + 1));
    }
    for (int i = 0; i < 2; ++i) b[i] = two(B(q + i * 8, g), B(q + i * 8 + 1, g));
    float d[4] = {1.f, 1.f, 1.f, 1.f};
    mma_bf16_16x8x16(d, a, b);
    for (int i = 0; i < 4; ++i) product[g + i / 2 * 8][q + i % 2] = d[i];
  });
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      float want = 1.f;
      for (int k = 0; k < 16; ++k) want += A(row, k) * B(k, column);
      EXPECT_EQ(product[row][column], want) << row << ", " << column;
    }
  }
}

TEST(CudaEmulator, dynamic_shared_memory_starts_as_nan_in_every_block) {
  run(
      2, 32,
      [] {
        float* memory = dynamic_shared<float>();
        EXPECT_TRUE(isnan(memory[threadIdx.x]));
        memory[threadIdx.x] = 0.f;
      },
      32 * sizeof(float));
}

TEST(CudaEmulator, a_barrier_that_some_threads_miss_is_an_error) {
  const std::string error = error_of(64, [] {
    if (threadIdx.x < 40) __syncthreads();
  });
  EXPECT_NE(error.find("kernel: __syncthreads() is reached by 40 of 64 threads of block 0"), std::string::npos) << error;
}

TEST(CudaEmulator, a_missing_lane_is_an_error) {
  const std::string error = error_of(32, [] {
    if (threadIdx.x != 9) __shfl_xor_sync(kAllLanes, 1, 1);
  });
  EXPECT_NE(error.find("waits in __shfl_xor_sync for lanes 9 that never come"), std::string::npos) << error;
}

TEST(CudaEmulator, a_barrier_against_a_shuffle_is_an_error) {
  const std::string error = error_of(32, [] {
    if (threadIdx.x < 16) __syncthreads();
    else __shfl_xor_sync(kAllLanes, 1, 1);
  });
  EXPECT_NE(error.find("that never come"), std::string::npos) << error;
}

TEST(CudaEmulator, different_collectives_and_masks_are_errors) {
  std::string error = error_of(32, [] {
    if (threadIdx.x < 16) __shfl_xor_sync(kAllLanes, 1, 1);
    else __ballot_sync(kAllLanes, true);
  });
  EXPECT_NE(error.find("__ballot_sync meets lane 0 in __shfl_xor_sync"), std::string::npos) << error;
  error = error_of(32, [] { __shfl_xor_sync(threadIdx.x < 16 ? kAllLanes : 0xFFFFFFFEu, 1, 1); });
  EXPECT_NE(error.find("with another mask"), std::string::npos) << error;
  error = error_of(32, [] { __ballot_sync(1u, true); });
  EXPECT_NE(error.find("thread 1 of block 0: __ballot_sync is called by a lane outside its mask"), std::string::npos)
      << error;
}

TEST(CudaEmulator, an_unaligned_wide_access_and_an_odd_block_are_errors) {
  alignas(16) static char memory[32];
  std::string error = error_of(32, [] { cuda_emulator::require_aligned(memory + 4, 16); });
  EXPECT_NE(error.find("an access of 16 bytes is not aligned"), std::string::npos) << error;
  EXPECT_NE(error_of(33, [] {}).find("a block of 33 threads"), std::string::npos);
  run(1, 32, [] {});  // an error leaves nothing behind
}

}  // namespace
}  // namespace grpo_engine
