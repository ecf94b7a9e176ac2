// parallel.h -- spreads work items over Torch's thread pool.
//
// Kernels never see threads. Each takes a range of work items (rows, tiles, sequences). What it writes for one item depends
// on that item alone, so the split changes no bit.
//
// at::parallel_for is a template of Torch's headers. It is a plain loop in a file that is compiled without OpenMP.
// CMakeLists.txt turns OpenMP on for these files, and tests count the threads that took part (ThreadCount).
//
// What a body throws reaches the caller. at::parallel_for catches it in the thread that threw, lets the others finish and
// rethrows the first exception. The results are then undefined. An exception must not leave a parallel region in any other
// way, so every kernel of the extension runs through this file (scratch.h).
#pragma once
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "core/thread_count.h"

namespace grpo_engine {

// body(begin, end) over parts of [0, num_items). `cost` is about how many floating-point operations
// one item takes; a thread is not woken for less than kMinWork of them.
//
// Each thread takes one part of its own, so `threads` threads take part. Then it takes the next free part, again and again.
// So a slower core does less, and so does one that another program uses.
template <typename Body>
void parallel_ranges(int64_t num_items, double cost, const Body& body) {
  constexpr double kMinWork = 20000.0;  // a fork and join takes about 5 us, 20k operations
  constexpr int64_t kParts = 8;         // of each thread, where they are worth being woken for
  if (num_items <= 0) return;
  const auto grain = static_cast<int64_t>(kMinWork / (cost > 1.0 ? cost : 1.0)) + 1;
  const int64_t limit = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t threads = std::min(limit, (num_items + grain - 1) / grain);
  ThreadCount* const count = ThreadCount::running();
  if (threads <= 1) {
    if (count) count->note_this_thread();
    return body(0, num_items);
  }
  const int64_t size = std::min(std::max(grain, num_items / (threads * kParts)), (num_items + threads - 1) / threads);
  std::atomic<int64_t> next{threads};
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    if (count) count->note_this_thread();
    const auto take = [&](int64_t part) {
      const int64_t begin = part * size;
      if (begin < num_items) body(begin, std::min(begin + size, num_items));
      return begin < num_items;
    };
    for (int64_t part = first; part < last; ++part) take(part);
    while (take(next.fetch_add(1, std::memory_order_relaxed))) {
    }
  });
}

// kernel(args, begin, end) over [0, num_items); see parallel_ranges.
template <typename Args>
void parallel_items(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, int64_t num_items, double cost) {
  parallel_ranges(num_items, cost, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace grpo_engine
