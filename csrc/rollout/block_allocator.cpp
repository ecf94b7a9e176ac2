#include "rollout/block_allocator.h"

#include <stdexcept>
#include <string>

namespace grpo_engine {

BlockAllocator::BlockAllocator(int32_t num_pages) {
  if (num_pages < 1) {
    throw std::invalid_argument("BlockAllocator: num_pages must be at least 1, got " + std::to_string(num_pages));
  }
  refs_.assign(num_pages, 0);
  free_.reserve(num_pages);
  for (int32_t page = num_pages - 1; page >= 0; --page) free_.push_back(page);
}

std::optional<int32_t> BlockAllocator::acquire() {
  if (free_.empty()) return std::nullopt;
  const int32_t page = free_.back();
  free_.pop_back();
  refs_[page] = 1;
  return page;
}

void BlockAllocator::release(int32_t page) {
  if (--used(page) == 0) free_.push_back(page);
}

int32_t BlockAllocator::refs(int32_t page) const {
  if (page < 0 || page >= num_pages()) {
    throw std::invalid_argument("BlockAllocator: page must be in [0, " + std::to_string(num_pages()) + "), got " +
                                std::to_string(page));
  }
  return refs_[page];
}

int32_t& BlockAllocator::used(int32_t page) {
  if (refs(page) == 0) {
    throw std::invalid_argument("BlockAllocator: page " + std::to_string(page) +
                                " is not in use: it was freed before, or never acquired");
  }
  return refs_[page];
}

void BlockAllocator::check() const {
  std::vector<int32_t> listed(refs_.size(), 0);
  for (int32_t page : free_) ++listed.at(page);
  for (size_t page = 0; page < refs_.size(); ++page) {
    if (refs_[page] < 0 || listed[page] != (refs_[page] == 0)) {
      throw std::logic_error("BlockAllocator: page " + std::to_string(page) + " has refs " + std::to_string(refs_[page]) +
                             " and is listed free " + std::to_string(listed[page]) + " times");
    }
  }
}

}  // namespace grpo_engine
