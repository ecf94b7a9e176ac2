// Philox against the known answers of its authors, and what its uniforms and the memory of kernels promise.
#include <gtest/gtest.h>

#include <cstring>
#include <new>
#include <thread>

#include "core/cpu_dispatch.h"
#include "core/philox.h"
#include "core/scratch.h"

namespace grpo_engine {

// kat_vectors of the Random123 distribution, philox4x32 with 10 rounds.
TEST(Philox, KnownAnswers) {
  PhiloxCounter r = philox4x32_10({{0, 0, 0, 0}}, 0);
  EXPECT_EQ(r.c[0], 0x6627e8d5u);
  EXPECT_EQ(r.c[1], 0xe169c58du);
  EXPECT_EQ(r.c[2], 0xbc57ac4cu);
  EXPECT_EQ(r.c[3], 0x9b00dbd8u);
  r = philox4x32_10({{~0u, ~0u, ~0u, ~0u}}, ~0ull);
  EXPECT_EQ(r.c[0], 0x408f276du);
  EXPECT_EQ(r.c[1], 0x41c83b0eu);
  EXPECT_EQ(r.c[2], 0xa20bc7c6u);
  EXPECT_EQ(r.c[3], 0x6d5451fdu);
}

TEST(Philox, UniformIsOpenAndDependsOnSeedAndPosition) {
  double sum = 0;
  for (uint64_t i = 0; i < 10000; ++i) {
    const double u = philox_uniform(7, i);
    ASSERT_GT(u, 0.0);
    ASSERT_LT(u, 1.0);
    sum += u;
  }
  EXPECT_NEAR(sum / 10000, 0.5, 5 * 0.2887 / 100);  // five standard errors
  EXPECT_NE(philox_uniform(7, 1), philox_uniform(8, 1));
  EXPECT_NE(philox_uniform(7, 1), philox_uniform(7, 1ull << 32 | 1));
}

TEST(CpuDispatch, GenericIsAlwaysThere) { EXPECT_TRUE(cpu_has(CpuIsa::generic)); }

constexpr int64_t kTooMuch = INT64_MAX / 2;

bool aligned(const void* memory) { return memory != nullptr && reinterpret_cast<uintptr_t>(memory) % 64 == 0; }

TEST(Scratch, GrowsAndKeepsItsBlockForSmallerRequests) {
  Scratch scratch;
  EXPECT_EQ(scratch.data(), nullptr);
  EXPECT_TRUE(aligned(scratch.reserve(0)));
  for (int64_t bytes : {1, 64, 1000, 100000}) {
    void* memory = scratch.reserve(bytes);
    EXPECT_TRUE(aligned(memory));
    std::memset(memory, 7, bytes);
    EXPECT_EQ(scratch.reserve(1), memory);
    EXPECT_EQ(scratch.data(), memory);
  }
}

TEST(Scratch, TooMuchMemoryIsAnExceptionAndTheNextRequestIsMet) {
  EXPECT_THROW(Scratch{kTooMuch}, std::bad_alloc);
  EXPECT_THROW(Arena{kTooMuch}, std::bad_alloc);
  Scratch scratch(10);
  EXPECT_THROW(scratch.reserve(kTooMuch), std::bad_alloc);
  EXPECT_EQ(scratch.data(), nullptr);
  std::memset(scratch.reserve(10), 7, 10);
  EXPECT_THROW(thread_scratch<double>(ScratchUse::gemm_a, kTooMuch / 8), std::bad_alloc);
  std::memset(thread_scratch<double>(ScratchUse::gemm_a, 3), 7, 24);
}

TEST(Scratch, AThreadHasABlockForEachUse) {
  float* a = thread_scratch<float>(ScratchUse::gemm_a, 100);
  EXPECT_EQ(thread_scratch<double>(ScratchUse::gemm_a, 50), static_cast<void*>(a));
  EXPECT_NE(thread_scratch<float>(ScratchUse::gemm_b, 100), a);
  std::thread([&] { EXPECT_NE(thread_scratch<float>(ScratchUse::gemm_a, 100), a); }).join();
}

TEST(Arena, ArraysAreAlignedAndLieBehindEachOther) {
  Arena arena(Arena::bytes<float>(3) + Arena::bytes<double>(9));
  float* first = arena.take<float>(3);
  double* second = arena.take<double>(9);
  EXPECT_TRUE(aligned(first));
  EXPECT_EQ(static_cast<void*>(second), reinterpret_cast<char*>(first) + 64);
  std::memset(second, 7, 72);
}

}  // namespace grpo_engine
