#include "core/thread_count.h"

namespace grpo_engine {

std::atomic<ThreadCount*> ThreadCount::on_{nullptr};

void ThreadCount::start() { delete on_.exchange(new ThreadCount, std::memory_order_acq_rel); }

int ThreadCount::stop() {
  ThreadCount* const count = on_.exchange(nullptr, std::memory_order_acq_rel);
  const int seen = count ? static_cast<int>(count->seen_.size()) : 0;
  delete count;
  return seen;
}

void ThreadCount::note_this_thread() {
  const std::lock_guard<std::mutex> lock(mutex_);
  seen_.insert(std::this_thread::get_id());
}

}  // namespace grpo_engine
