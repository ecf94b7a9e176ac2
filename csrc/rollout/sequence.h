// sequence.h -- one unfinished or finished response: its tokens, and the KV pages that hold them.
//
// A Request is one prompt with its G responses, and a Sequence is one of those responses. The tokens of a sequence are the
// prompt's, followed by its own. The prompt is stored once per group.
//
//   positions  0 ......... computed-1 | computed ........ length-1 | length
//              key and value in pages | still to be computed       | the token to sample next
//
//   The key and value of position p lie in pages()[p / page_size] at offset p % page_size.
//   The last tokens may be expected ones. A step in flight samples them, and their values are known at its commit.
//   invariants: computed < length while another token is to be sampled; pages cover computed; no pages when finished.
//
// A page is shared only for prompt positions. Nobody writes into a shared page: a writer first copies a page with
// refs > 1 (Scheduler).
//
// The memory of responses and page lists is reserved ahead. Only the constructor and reserve_token() can run out of memory.
// Torch-free.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "rollout/block_allocator.h"

namespace grpo_engine {

struct Request {
  int64_t id;                      // also the id of its first sequence; the others follow it
  std::vector<int64_t> prompt;     // token ids, at least one
  std::vector<int64_t> seeds;      // [G]
  std::vector<int64_t> stop_ids;   // a response ends with the first of these
  int64_t max_new_tokens;          // or here, stop token included

  int64_t group_size() const { return static_cast<int64_t>(seeds.size()); }
  int64_t prompt_length() const { return static_cast<int64_t>(prompt.size()); }
};

enum class Finish : uint8_t { none, stop, length };

// "stop", "length", or nullptr while the response is unfinished.
const char* finish_name(Finish finish);

// Tokens whose key and value were computed. Each counts in one of three ways.
struct TokenCounts {
  int64_t prefill = 0;     // prompt tokens, the first time
  int64_t decode = 0;      // response tokens, the first time
  int64_t recomputed = 0;  // either, again after a preemption

  int64_t total() const { return prefill + decode + recomputed; }
  TokenCounts& operator+=(const TokenCounts& other);
};

class Sequence {
 public:
  // Response `index` of `request`, in pages of `page_size` tokens.
  Sequence(std::shared_ptr<const Request> request, int64_t index, int32_t page_size);

  const Request& request() const { return *request_; }
  int64_t id() const { return request_->id + index_; }
  int64_t index() const { return index_; }  // g of the group
  Finish finish() const { return finish_; }
  bool finished() const { return finish_ != Finish::none; }

  int64_t known() const {  // tokens but the expected ones
    return request_->prompt_length() + static_cast<int64_t>(response_.size());
  }
  int64_t length() const { return known() + expected_; }
  int64_t token(int64_t position) const;  // position in [0, known)
  const std::vector<int64_t>& response() const { return response_; }  // its known tokens

  bool begun() const { return length() > request_->prompt_length(); }
  // Whether max_new_tokens tokens are sampled or expected, stop or not.
  bool complete() const { return length() == request_->prompt_length() + request_->max_new_tokens; }

  int64_t computed() const { return computed_; }
  int64_t pending() const { return length() - computed_; }  // tokens still to be computed
  const std::vector<int32_t>& pages() const { return pages_; }
  int64_t slot(int64_t position) const;   // page * page_size + offset, of a position within pages

  // The counts of `count` tokens from position `begin` on.
  TokenCounts classify(int64_t begin, int64_t count) const;
  // Marks the next `count` pending tokens as computed. Throws std::logic_error past the pages.
  void advance(int64_t count);
  // The same counts, when the tokens' step is committed. From then on the tokens count as recomputed.
  TokenCounts settle(int64_t begin, int64_t count);

  // A step in flight samples one more token. Throws std::logic_error past max_new_tokens.
  void expect();
  // Reserves memory for one more token: append() then needs none.
  void reserve_token();
  // Adds a sampled token, which is the first expected one if there is any. Finishes the response on a stop id or at
  // max_new_tokens; no token is then expected. Throws std::logic_error when it is finished already.
  void append(int64_t token);

  // Takes over a page that the caller acquired. It becomes the last one.
  void add_page(int32_t page);
  // Replaces the shared page at `index` by its fresh copy `page`, and gives the shared one up.
  void replace_page(size_t index, int32_t page, BlockAllocator& allocator);
  // Shares the pages of the first num_tokens tokens of `from`, which then count as computed. Throws std::logic_error when
  // this one has pages, or `from` has computed fewer tokens.
  void share_prefix(const Sequence& from, int64_t num_tokens, BlockAllocator& allocator);
  // Gives up every page. Nothing counts as computed then; the tokens stay.
  void release_pages(BlockAllocator& allocator);

 private:
  std::shared_ptr<const Request> request_;
  int64_t index_;
  int32_t page_size_;
  Finish finish_ = Finish::none;
  int64_t expected_ = 0;
  int64_t computed_ = 0;
  int64_t ever_computed_ = 0;    // tokens below this position were settled or shared before
  std::vector<int64_t> response_;
  std::vector<int32_t> pages_;
};

// Pages of `page_size` tokens that hold `num_tokens`.
inline int64_t pages_for(int64_t num_tokens, int32_t page_size) { return (num_tokens + page_size - 1) / page_size; }

}  // namespace grpo_engine
