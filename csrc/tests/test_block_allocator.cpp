// Block allocator: counts, order, sharing, and misuse.
#include <gtest/gtest.h>

#include <stdexcept>
#include <string>

#include "rollout/block_allocator.h"

namespace grpo_engine {
namespace {

template <typename Error, typename Call>
std::string message_of(Call call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

TEST(BlockAllocator, HandsOutEachPageOnceAndThenNone) {
  BlockAllocator pages(3);
  EXPECT_EQ(pages.acquire(), 0);
  EXPECT_EQ(pages.acquire(), 1);
  EXPECT_EQ(pages.acquire(), 2);
  EXPECT_EQ(pages.acquire(), std::nullopt);
  EXPECT_EQ(pages.num_free(), 0);
  pages.check();
}

TEST(BlockAllocator, LastFreedIsFirstTaken) {
  BlockAllocator pages(4);
  for (int i = 0; i < 4; ++i) pages.acquire();
  pages.release(2);
  pages.release(0);
  EXPECT_EQ(pages.acquire(), 0);
  EXPECT_EQ(pages.acquire(), 2);
}

TEST(BlockAllocator, AForkOutlivesTheParentThatIsFreedFirst) {
  BlockAllocator pages(2);
  const int32_t page = *pages.acquire();
  pages.share(page);
  pages.release(page);  // the parent
  EXPECT_EQ(pages.refs(page), 1);
  EXPECT_EQ(pages.num_free(), 1);
  pages.check();
  pages.release(page);  // the child
  EXPECT_EQ(pages.num_free(), 2);
  pages.check();
}

TEST(BlockAllocator, DoubleFreeAndUnderflowAreRefusedAndChangeNothing) {
  BlockAllocator pages(2);
  const int32_t page = *pages.acquire();
  pages.release(page);
  EXPECT_EQ(message_of<std::invalid_argument>([&] { pages.release(page); }),
            "BlockAllocator: page 0 is not in use: it was freed before, or never acquired");
  EXPECT_THROW(pages.release(1), std::invalid_argument);  // never acquired
  EXPECT_THROW(pages.share(page), std::invalid_argument);
  EXPECT_EQ(pages.num_free(), 2);
  pages.check();
}

TEST(BlockAllocator, PagesOutsideThePoolAreRefused) {
  BlockAllocator pages(2);
  EXPECT_THROW(pages.release(-1), std::invalid_argument);
  EXPECT_EQ(message_of<std::invalid_argument>([&] { pages.share(2); }), "BlockAllocator: page must be in [0, 2), got 2");
}

TEST(BlockAllocator, AnEmptyPoolIsRefused) {
  EXPECT_EQ(message_of<std::invalid_argument>([] { BlockAllocator pages(0); }),
            "BlockAllocator: num_pages must be at least 1, got 0");
}

}  // namespace
}  // namespace grpo_engine
