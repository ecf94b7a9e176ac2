#include "rollout/sequence.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace grpo_engine {
namespace {

// An internal error: our own caller broke a rule of the header.
void require(bool ok, const Sequence& sequence, const char* what) {
  if (!ok) throw std::logic_error("Sequence " + std::to_string(sequence.id()) + ": " + what);
}

}  // namespace

const char* finish_name(Finish finish) {
  switch (finish) {
    case Finish::stop: return "stop";
    case Finish::length: return "length";
    case Finish::none: break;
  }
  return nullptr;
}

TokenCounts& TokenCounts::operator+=(const TokenCounts& other) {
  prefill += other.prefill;
  decode += other.decode;
  recomputed += other.recomputed;
  return *this;
}

Sequence::Sequence(std::shared_ptr<const Request> request, int64_t index, int32_t page_size)
    : request_(std::move(request)), index_(index), page_size_(page_size) {
  pages_.reserve(pages_for(request_->prompt_length() + request_->max_new_tokens, page_size));
}

int64_t Sequence::token(int64_t position) const {
  const int64_t in_response = position - request_->prompt_length();
  return in_response < 0 ? request_->prompt[position] : response_[in_response];
}

int64_t Sequence::slot(int64_t position) const {
  return static_cast<int64_t>(pages_[position / page_size_]) * page_size_ + position % page_size_;
}

TokenCounts Sequence::classify(int64_t begin, int64_t count) const {
  const int64_t end = begin + count;
  TokenCounts counts;
  counts.recomputed = std::clamp<int64_t>(ever_computed_ - begin, 0, count);
  const int64_t first_new = begin + counts.recomputed;
  counts.prefill = std::clamp<int64_t>(request_->prompt_length() - first_new, 0, end - first_new);
  counts.decode = count - counts.recomputed - counts.prefill;
  return counts;
}

void Sequence::advance(int64_t count) {
  require(count > 0 && count <= pending(), *this, "advance() past its last token");
  require(computed_ + count <= static_cast<int64_t>(pages_.size()) * page_size_, *this, "advance() past its last page");
  computed_ += count;
}

TokenCounts Sequence::settle(int64_t begin, int64_t count) {
  const TokenCounts counts = classify(begin, count);
  ever_computed_ = std::max(ever_computed_, begin + count);
  return counts;
}

void Sequence::expect() {
  require(!finished() && !complete(), *this, "expect() past its last token");
  ++expected_;
}

void Sequence::reserve_token() {
  if (response_.size() == response_.capacity()) {
    response_.reserve(
        std::min<size_t>(std::max<size_t>(16, 2 * response_.size()), static_cast<size_t>(request_->max_new_tokens)));
  }
}

void Sequence::append(int64_t token) {
  require(!finished(), *this, "append() to a finished response");
  response_.push_back(token);
  expected_ = std::max<int64_t>(expected_ - 1, 0);
  const auto& stop_ids = request_->stop_ids;
  if (std::find(stop_ids.begin(), stop_ids.end(), token) != stop_ids.end()) {
    finish_ = Finish::stop;
  } else if (static_cast<int64_t>(response_.size()) == request_->max_new_tokens) {
    finish_ = Finish::length;
  }
  if (finished()) expected_ = 0;
}

void Sequence::add_page(int32_t page) {
  require(pages_.size() < pages_.capacity(), *this, "more pages than its longest response needs");
  pages_.push_back(page);
}

void Sequence::replace_page(size_t index, int32_t page, BlockAllocator& allocator) {
  require(index < pages_.size(), *this, "replace_page() past its last page");
  allocator.release(pages_[index]);
  pages_[index] = page;
}

void Sequence::share_prefix(const Sequence& from, int64_t num_tokens, BlockAllocator& allocator) {
  require(pages_.empty(), *this, "share_prefix() with pages of its own");
  require(from.request_ == request_ && num_tokens <= from.computed_ && num_tokens <= request_->prompt_length(), *this,
          "share_prefix() of tokens that the other has not computed, or that differ");
  for (int64_t i = 0; i < pages_for(num_tokens, page_size_); ++i) {
    allocator.share(from.pages_[i]);
    add_page(from.pages_[i]);
  }
  computed_ = num_tokens;
  ever_computed_ = std::max(ever_computed_, computed_);
}

void Sequence::release_pages(BlockAllocator& allocator) {
  // Last page first, so that the pages come back in the order in which they were taken.
  while (!pages_.empty()) {
    allocator.release(pages_.back());
    pages_.pop_back();
  }
  computed_ = 0;
}

}  // namespace grpo_engine
