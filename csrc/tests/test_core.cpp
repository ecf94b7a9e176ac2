// Philox against the known answers of its authors, and what the uniforms promise.
#include <gtest/gtest.h>

#include "core/cpu_dispatch.h"
#include "core/philox.h"

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

}  // namespace grpo_engine
