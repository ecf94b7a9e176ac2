// adamw.cuh -- splits a float32 weight into a bfloat16 and the remaining 16 bits, for the host and the device.
#pragma once
#include <cstdint>
#include <cstring>

#include "core/dtype.h"

namespace grpo_engine {

// bits(x) = (high << 16) + low. high is x rounded to nearest, ties away from zero; with that rounding low fits 16 bits.
struct SplitFloat {
  uint16_t high;
  int16_t low;
};

GE_HOST_DEVICE inline float join_float(SplitFloat s) {
  const uint32_t u = (static_cast<uint32_t>(s.high) << 16) + static_cast<uint32_t>(static_cast<int32_t>(s.low));
  float x;
  memcpy(&x, &u, sizeof x);
  return x;
}

GE_HOST_DEVICE inline SplitFloat split_float(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  // rounding must not carry a NaN into the sign
  const uint32_t high = x != x ? (u >> 16) | 0x40u : (u + 0x8000u) >> 16;
  return {static_cast<uint16_t>(high), static_cast<int16_t>(x != x ? 0u : u - (high << 16))};
}

}  // namespace grpo_engine
