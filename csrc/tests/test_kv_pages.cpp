// Addresses of the paged cache past 2^31 elements, where 32-bit arithmetic would wrap.
#include <gtest/gtest.h>

#include <vector>

#include "ops/kv_pages.cuh"

namespace grpo_engine {

constexpr KvPageShape kShape{8, 128, 16};  // 16,384 elements a page

TEST(KvPages, FirstPageBeyondTwoToThe31) {
  constexpr int64_t kElements = 8 * 128 * 16;
  const int64_t page = (int64_t{1} << 31) / kElements + 1;  // its slot number still fits in 32 bits
  EXPECT_EQ(kv_page_offset(kShape, page, 0), page * kElements);
  EXPECT_GT(kv_page_offset(kShape, page, 0), int64_t{1} << 31);
  EXPECT_EQ(key_offset(kShape, page * 16 + 5, 3), page * kElements + 3 * 128 * 16 + 5);
  EXPECT_EQ(value_offset(kShape, page * 16 + 5, 3), page * kElements + 3 * 128 * 16 + 5 * 128);
}

TEST(KvPages, SlotsBeyondTwoToThe31) {
  const int64_t slot = (int64_t{1} << 32) + 17;  // page 2^28 + 1, offset 1
  const int64_t page = (int64_t{1} << 28) + 1;
  EXPECT_EQ(key_offset(kShape, slot, 7) - kv_page_offset(kShape, page, 7), 1);
  EXPECT_EQ(value_offset(kShape, slot, 7) - kv_page_offset(kShape, page, 7), 128);
}

TEST(KvPages, EveryElementHasOneAddress) {
  const KvPageShape shape{2, 3, 16};
  std::vector<int> keys(4 * 2 * 3 * 16), values(keys.size());
  for (int64_t slot = 0; slot < 4 * 16; ++slot) {
    for (int64_t k = 0; k < 2; ++k) {
      for (int64_t e = 0; e < 3; ++e) {
        ++keys.at(key_offset(shape, slot, k) + e * shape.page);
        ++values.at(value_offset(shape, slot, k) + e);
      }
    }
  }
  EXPECT_EQ(keys, std::vector<int>(keys.size(), 1));
  EXPECT_EQ(values, std::vector<int>(values.size(), 1));
}

}  // namespace grpo_engine
