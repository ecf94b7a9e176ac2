// rope_table.h -- the cosines and sines that rope's kernel reads.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

namespace grpo_engine {

struct RopeTable {
  std::shared_ptr<const std::vector<float>> rows;
  int64_t first_position;  // as in RopeArgs
};

// The table for T >= 1 tokens at `position`. Throws in the name of `op` when a position is below 0. Tables of low positions
// are kept, because every layer of every step needs the same angles. `frequency` [E/2] replaces those of theta, unless null.
// Safe to call from any thread.
RopeTable rope_table(const char* op, const int64_t* position, int64_t T, int64_t E, double theta,
                     const float* frequency = nullptr);

}  // namespace grpo_engine
