#include "core/scratch.h"

#include <cstdlib>
#include <new>

namespace grpo_engine {

Scratch::Scratch() : data_(nullptr), bytes_(0) {}

Scratch::Scratch(int64_t bytes) : Scratch() { reserve(bytes); }

Scratch::~Scratch() { std::free(data_); }

void* Scratch::reserve(int64_t bytes) {
  if (data_ != nullptr && bytes <= bytes_) return data_;
  std::free(data_);
  // aligned_alloc takes a multiple of the alignment, and 0 would be no memory
  const std::size_t size = (static_cast<std::size_t>(bytes) + 64) / 64 * 64;
  data_ = std::aligned_alloc(64, size);
  if (data_ == nullptr) throw std::bad_alloc();
  bytes_ = static_cast<int64_t>(size);
  return data_;
}

void* Scratch::data() const { return data_; }

void* thread_scratch_bytes(ScratchUse use, int64_t bytes) {
  constexpr int kUses = static_cast<int>(ScratchUse::logits_tile) + 1;
  static thread_local Scratch blocks[kUses];
  return blocks[static_cast<int>(use)].reserve(bytes);
}

}  // namespace grpo_engine
