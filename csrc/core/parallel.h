// parallel.h -- spreads work items over Torch's thread pool.
//
// Kernels never see threads: each takes a range of work items (rows, tiles, sequences), and what it
// writes for one item depends on that item alone, so the split changes no bit.
#pragma once
#include <ATen/Parallel.h>

#include <cstdint>

namespace grpo_engine {

// kernel(args, begin, end) over [0, num_items). `cost` is about how many floating-point operations
// one item takes; a thread is not woken for less than kMinWork of them.
template <typename Args>
void parallel_items(void (*kernel)(const Args&, int64_t, int64_t), const Args& args,
                    int64_t num_items, double cost) {
  constexpr double kMinWork = 20000.0;  // a fork and join takes about 5 us, 20k operations
  const auto grain = static_cast<int64_t>(kMinWork / (cost > 1.0 ? cost : 1.0)) + 1;
  if (num_items <= 0) return;
  at::parallel_for(0, num_items, grain,
                   [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace grpo_engine
