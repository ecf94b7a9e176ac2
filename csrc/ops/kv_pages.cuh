// kv_pages.cuh -- where a key or value lies in the paged cache, defined once for all kernels.
//
//   key_pages   [num_pages, K, E, page]   a page holds its keys transposed: 16 keys side by side
//   value_pages [num_pages, K, page, E]   are what attention loads at once
//
// slot = page index * page size + offset. All arithmetic is int64: a cache of a few GiB has more
// than 2^31 elements.
#pragma once
#include <cstdint>

#include "core/dtype.h"

namespace grpo_engine {

struct KvPageShape {
  int64_t K, E, page;  // kv heads, head width, tokens of a page
};

// First element of the [E, page] keys or the [page, E] values of one page and kv head.
GE_HOST_DEVICE static inline int64_t kv_page_offset(const KvPageShape& s, int64_t page_index, int64_t kv_head) {
  return (page_index * s.K + kv_head) * s.E * s.page;
}
// Element e = 0 of the key in a slot. The next element is s.page further.
GE_HOST_DEVICE static inline int64_t key_offset(const KvPageShape& s, int64_t slot, int64_t kv_head) {
  return kv_page_offset(s, slot / s.page, kv_head) + slot % s.page;
}
// Element e = 0 of the value in a slot. The next element follows it.
GE_HOST_DEVICE static inline int64_t value_offset(const KvPageShape& s, int64_t slot, int64_t kv_head) {
  return kv_page_offset(s, slot / s.page, kv_head) + slot % s.page * s.E;
}

}  // namespace grpo_engine
