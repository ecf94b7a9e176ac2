// parallel.h -- spreads work items over Torch's thread pool.
//
// Kernels never see threads: each takes a range of work items (rows, tiles, sequences), and what it
// writes for one item depends on that item alone, so the split changes no bit.
//
// at::parallel_for is a template of Torch's headers and a plain loop where OpenMP is off in the file that includes it.
// CMakeLists.txt turns it on for these files; tests count the threads that took part (ThreadCount).
#pragma once
#include <ATen/Parallel.h>

#include <cstdint>

#include "core/thread_count.h"

namespace grpo_engine {

// body(begin, end) over parts of [0, num_items). `cost` is about how many floating-point operations
// one item takes; a thread is not woken for less than kMinWork of them.
template <typename Body>
void parallel_ranges(int64_t num_items, double cost, const Body& body) {
  constexpr double kMinWork = 20000.0;  // a fork and join takes about 5 us, 20k operations
  const auto grain = static_cast<int64_t>(kMinWork / (cost > 1.0 ? cost : 1.0)) + 1;
  if (num_items <= 0) return;
  ThreadCount* const count = ThreadCount::running();
  at::parallel_for(0, num_items, grain, [&](int64_t begin, int64_t end) {
    if (count) count->note_this_thread();
    body(begin, end);
  });
}

// kernel(args, begin, end) over [0, num_items); see parallel_ranges.
template <typename Args>
void parallel_items(void (*kernel)(const Args&, int64_t, int64_t), const Args& args,
                    int64_t num_items, double cost) {
  parallel_ranges(num_items, cost, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace grpo_engine
