// block_allocator.h -- which KV pages are free, and how many sequences hold each used one.
//
//   invariant: a page is in free_ exactly once when its refs == 0, and not at all otherwise.
//   check() proves it; tests call it after every step.
//
// The page that was freed last is taken first, so the same calls always give the same pages. No member allocates memory
// after construction. Torch-free.
#pragma once
#include <cstdint>
#include <optional>
#include <vector>

namespace grpo_engine {

class BlockAllocator {
 public:
  // Throws std::invalid_argument unless num_pages >= 1.
  explicit BlockAllocator(int32_t num_pages);

  // A page with refs == 1, or nullopt when none is free. The caller decides which sequence to preempt.
  std::optional<int32_t> acquire();

  // One more holder of a used page. Throws std::invalid_argument when the page is free.
  void share(int32_t page) { ++used(page); }

  // One holder less. The last one frees the page. Throws std::invalid_argument on a double free.
  void release(int32_t page);

  // Holders of a page, 0 when it is free. Throws std::invalid_argument for a page outside the pool.
  int32_t refs(int32_t page) const;

  int32_t num_free() const { return static_cast<int32_t>(free_.size()); }
  int32_t num_pages() const { return static_cast<int32_t>(refs_.size()); }

  // Throws std::logic_error that names the first page which breaks the invariant.
  void check() const;

 private:
  int32_t& used(int32_t page);

  std::vector<int32_t> refs_;  // [num_pages]
  std::vector<int32_t> free_;  // pages with refs == 0, most recently freed last
};

}  // namespace grpo_engine
