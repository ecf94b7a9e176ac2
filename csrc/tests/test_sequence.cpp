// Sequence: tokens, finishing, pages, and how computed tokens are counted.
#include <gtest/gtest.h>

#include <memory>
#include <stdexcept>
#include <vector>

#include "rollout/block_allocator.h"
#include "rollout/sequence.h"

namespace grpo_engine {
namespace {

constexpr int32_t kPageSize = 4;

std::shared_ptr<const Request> request_of(int64_t prompt_length, int64_t max_new_tokens) {
  Request request{.id = 10, .prompt = {}, .seeds = {7, 8, 9}, .stop_ids = {0, 2}, .max_new_tokens = max_new_tokens};
  for (int64_t i = 0; i < prompt_length; ++i) request.prompt.push_back(100 + i);
  return std::make_shared<const Request>(request);
}

TEST(Sequence, TokensAreThePromptAndThenTheResponse) {
  Sequence sequence(request_of(3, 5), 1, kPageSize);
  EXPECT_EQ(sequence.id(), 11);
  EXPECT_EQ(sequence.length(), 3);
  sequence.append(55);
  EXPECT_EQ(sequence.length(), 4);
  EXPECT_EQ(sequence.token(2), 102);
  EXPECT_EQ(sequence.token(3), 55);
}

TEST(Sequence, StopTokenIsPartOfTheResponse) {
  for (int64_t stop : {0, 2}) {
    Sequence sequence(request_of(3, 5), 0, kPageSize);
    sequence.append(1);
    EXPECT_EQ(sequence.finish(), Finish::none);
    EXPECT_EQ(finish_name(sequence.finish()), nullptr);
    sequence.append(stop);
    EXPECT_STREQ(finish_name(sequence.finish()), "stop");
    EXPECT_EQ(sequence.response(), (std::vector<int64_t>{1, stop}));
    EXPECT_THROW(sequence.append(1), std::logic_error);
  }
}

TEST(Sequence, StopsAtTheLengthLimitAndStopWinsOverLength) {
  Sequence sequence(request_of(3, 2), 0, kPageSize);
  sequence.append(1);
  sequence.append(1);
  EXPECT_STREQ(finish_name(sequence.finish()), "length");
  Sequence both(request_of(3, 1), 0, kPageSize);
  both.append(2);
  EXPECT_STREQ(finish_name(both.finish()), "stop");
}

TEST(Sequence, SlotsFollowThePages) {
  BlockAllocator pages(8);
  Sequence sequence(request_of(6, 2), 0, kPageSize);
  sequence.add_page(5);
  sequence.add_page(1);
  EXPECT_EQ(sequence.slot(0), 20);
  EXPECT_EQ(sequence.slot(3), 23);
  EXPECT_EQ(sequence.slot(4), 4);
  EXPECT_THROW(sequence.add_page(2), std::logic_error);  // 6 + 2 tokens never need a third
}

TEST(Sequence, SlotDoesNotOverflow32Bits) {
  Sequence sequence(request_of(3, 1), 0, 1 << 16);
  sequence.add_page((1 << 20) + 3);
  EXPECT_EQ(sequence.slot(2), (((int64_t{1} << 20) + 3) << 16) + 2);
}

TEST(Sequence, AdvanceStaysWithinTokensAndPages) {
  Sequence sequence(request_of(6, 2), 0, kPageSize);
  sequence.add_page(0);
  EXPECT_THROW(sequence.advance(5), std::logic_error);  // one page holds four
  sequence.advance(4);
  sequence.add_page(1);
  EXPECT_THROW(sequence.advance(3), std::logic_error);  // two tokens are left
  sequence.advance(2);
  EXPECT_EQ(sequence.pending(), 0);
}

TEST(Sequence, EachTokenIsCountedAsNewOnceAndAsRecomputedAfterwards) {
  BlockAllocator allocator(8);
  Sequence sequence(request_of(5, 4), 0, kPageSize);
  const auto take = [&](int n) {
    for (int i = 0; i < n; ++i) sequence.add_page(*allocator.acquire());
  };
  take(2);
  const auto compute = [&](int64_t count) {
    sequence.advance(count);
    return sequence.settle(sequence.computed() - count, count);
  };
  TokenCounts counts = compute(3);
  EXPECT_EQ(counts.prefill, 3);
  sequence.release_pages(allocator);  // preempted in the middle of the prompt
  EXPECT_EQ(sequence.computed(), 0);
  take(2);
  counts = compute(5);
  EXPECT_EQ(counts.recomputed, 3);
  EXPECT_EQ(counts.prefill, 2);
  sequence.append(50);
  compute(1);
  sequence.append(51);
  sequence.release_pages(allocator);
  take(2);
  counts = compute(7);
  EXPECT_EQ(counts.recomputed, 6);
  EXPECT_EQ(counts.prefill, 0);
  EXPECT_EQ(counts.decode, 1);
  EXPECT_EQ(counts.total(), 7);
}

TEST(Sequence, WhatWasNotSettledIsNotRecomputed) {
  BlockAllocator allocator(8);
  Sequence sequence(request_of(3, 4), 0, kPageSize);
  for (int i = 0; i < 2; ++i) {
    sequence.add_page(*allocator.acquire());
    sequence.advance(3);
    EXPECT_EQ(sequence.classify(0, 3).prefill, 3);
    sequence.release_pages(allocator);
  }
}

TEST(Sequence, ExpectedTokensCountInItsLengthUntilTheyAreKnown) {
  Sequence sequence(request_of(3, 3), 0, kPageSize);
  EXPECT_FALSE(sequence.begun());
  sequence.expect();
  sequence.expect();
  EXPECT_TRUE(sequence.begun());
  EXPECT_EQ(sequence.known(), 3);
  EXPECT_EQ(sequence.length(), 5);
  sequence.append(50);
  EXPECT_EQ(sequence.known(), 4);
  EXPECT_EQ(sequence.length(), 5);
  EXPECT_EQ(sequence.token(3), 50);
  sequence.expect();
  EXPECT_TRUE(sequence.complete());
  EXPECT_THROW(sequence.expect(), std::logic_error);
  sequence.append(2);  // a stop token: the last one will not come
  EXPECT_STREQ(finish_name(sequence.finish()), "stop");
  EXPECT_EQ(sequence.length(), 5);
  EXPECT_FALSE(sequence.complete());
}

TEST(Sequence, SharesAndForksWithoutLosingPages) {
  BlockAllocator allocator(8);
  const auto request = request_of(6, 4);
  Sequence parent(request, 0, kPageSize), child(request, 1, kPageSize);
  parent.add_page(*allocator.acquire());
  parent.add_page(*allocator.acquire());
  EXPECT_THROW(child.share_prefix(parent, 4, allocator), std::logic_error);  // not computed yet
  parent.advance(6);
  child.share_prefix(parent, 6, allocator);
  EXPECT_EQ(child.pages(), parent.pages());
  EXPECT_EQ(child.computed(), 6);
  EXPECT_EQ(allocator.refs(0), 2);
  EXPECT_THROW(child.share_prefix(parent, 6, allocator), std::logic_error);  // it has pages

  child.replace_page(1, *allocator.acquire(), allocator);
  EXPECT_EQ(child.pages(), (std::vector<int32_t>{0, 2}));
  EXPECT_EQ(allocator.refs(1), 1);

  parent.release_pages(allocator);  // the parent goes first
  EXPECT_EQ(allocator.refs(0), 1);
  EXPECT_EQ(allocator.refs(2), 1);
  EXPECT_EQ(allocator.num_free(), 6);
  child.release_pages(allocator);
  EXPECT_EQ(allocator.num_free(), 8);
  allocator.check();
}

TEST(Sequence, SharesOnlyPromptTokensOfItsOwnRequest) {
  BlockAllocator allocator(8);
  const auto request = request_of(3, 4);
  Sequence parent(request, 0, kPageSize), child(request, 1, kPageSize);
  Sequence stranger(request_of(3, 4), 1, kPageSize);
  parent.add_page(*allocator.acquire());
  parent.advance(3);
  parent.append(60);
  parent.advance(1);
  EXPECT_THROW(child.share_prefix(parent, 4, allocator), std::logic_error);
  EXPECT_THROW(stranger.share_prefix(parent, 3, allocator), std::logic_error);
  EXPECT_EQ(allocator.refs(0), 1);
}

}  // namespace
}  // namespace grpo_engine
