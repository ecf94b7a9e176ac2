// thread_count.h -- how many threads took part in the kernels that ran while a count was on.
//
// For tests and for `doctor`: "the same bits on n threads" means nothing if one thread did all the work. By default no count
// is on, and a kernel call reads one pointer more.
#pragma once
#include <atomic>
#include <mutex>
#include <set>
#include <thread>

namespace grpo_engine {

class ThreadCount {
 public:
  // The count that is on, or null.
  static ThreadCount* running() { return on_.load(std::memory_order_acquire); }
  // Begins at zero. Counts do not nest: a second start begins again.
  static void start();
  // Ends the count. Returns how many distinct threads took part since start(), or 0 without a start. No kernel may be
  // running.
  static int stop();

  void note_this_thread();

 private:
  static std::atomic<ThreadCount*> on_;

  std::mutex mutex_;
  std::set<std::thread::id> seen_;
};

}  // namespace grpo_engine
