// philox.h -- Philox4x32-10, a counter-based random number generator.
//
// random bits = f(key, counter). There is no state. So a sample depends on the seed of its request and the position of its
// token alone. The batch, its order, preemption and the device do not matter.
// Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3", SC'11.
#pragma once
#include <cstdint>

#include "core/dtype.h"

namespace grpo_engine {

struct PhiloxCounter {
  uint32_t c[4];
};

GE_HOST_DEVICE static inline PhiloxCounter philox4x32_10(PhiloxCounter ctr, uint64_t key) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = 0xD2511F53ull * ctr.c[0], p1 = 0xCD9E8D57ull * ctr.c[2];
    ctr = {{static_cast<uint32_t>(p1 >> 32) ^ ctr.c[1] ^ k0, static_cast<uint32_t>(p1),
            static_cast<uint32_t>(p0 >> 32) ^ ctr.c[3] ^ k1, static_cast<uint32_t>(p0)}};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return ctr;
}

// The uniform for the token at `position`: in (0, 1], 53 bits, never 0, and 1 with probability 2^-53.
GE_HOST_DEVICE static inline double philox_uniform(uint64_t seed, uint64_t position) {
  const PhiloxCounter r =
      philox4x32_10({{static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), 0u, 0u}}, seed);
  const uint64_t bits = (static_cast<uint64_t>(r.c[0]) << 32 | r.c[1]) >> 11;
  return (static_cast<double>(bits) + 0.5) * 0x1p-53;
}

}  // namespace grpo_engine
