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

// The table for T >= 1 tokens at `position`; throws, in the name of `op`, where one is below 0. Tables of low
// positions are kept: every layer of every step asks for the same angles. Safe to call from any thread.
// `frequency` [E/2] takes the place of theta's, unless null.
RopeTable rope_table(const char* op, const int64_t* position, int64_t T, int64_t E, double theta,
                     const float* frequency = nullptr);

}  // namespace grpo_engine
