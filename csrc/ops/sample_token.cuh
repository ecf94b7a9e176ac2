// sample_token.cuh -- floats as integers in the same order, for the search of a threshold on CPU and GPU.
#pragma once
#include <string.h>

#include "core/dtype.h"

namespace grpo_engine {

// Unsigned integers in the order of the floats. Neighbours differ by 1.
GE_HOST_DEVICE static inline uint32_t key_of(float f) {
  uint32_t u;
  f += 0.f;  // -0 and 0 are one value
  memcpy(&u, &f, 4);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}
GE_HOST_DEVICE static inline float float_of(uint32_t key) {
  const uint32_t u = key & 0x80000000u ? key ^ 0x80000000u : ~key;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

}  // namespace grpo_engine
