// scheduler.h -- which tokens of which sequences the model computes in a step, and in which pages.
//
//   add_group(prompt, G ...)   once per prompt
//   while has_work():
//     plan = schedule()        what to compute; its pages are reserved
//     ... page copies, forward pass, one sampled token for each of the plan's S samples ...
//     commit(tokens)           the sampled tokens, in the plan's order
//
// Continuous batching. Every running sequence gets its next token in every step. The rest of max_step_tokens goes to
// prompts, in order of arrival. A prompt that does not fit is cut into chunks.
//
// Groups. A prompt is computed once per group: all G first tokens are sampled from its last hidden row. The G responses
// share its pages. A response that is about to write into the page with the end of the prompt copies that page first. The
// last response keeps the original.
//
// Preemption. When no page is free, the youngest running sequence gives up its pages, keeps its tokens and goes to the
// front of the waiting queue. Later it is computed again, alone. It takes the prompt pages that a sibling still holds and
// computes the rest. Seeds and positions stay, and all ops are batch-invariant, so its response stays the same.
//
// No deadlock. A request is refused unless one response of full length fits into the pool. The oldest sequence is never
// preempted for another.
//
// Lookahead. A step may be planned before the tokens of the step before are known, so a GPU need not wait for the host:
//
//   plan 0 = schedule(); plan 1 = schedule(); commit(tokens of 0); plan 2 = schedule(); commit(1) ...
//
// The scheduler then assumes that every response goes on up to its max_new_tokens. Plan t+1 names the inputs that plan t
// samples by the index of their sample (StepPlan::tokens). A response that stops in step t already has a row in plan t+1.
// That row is computed, and commit(t+1) drops it. Responses do not change. Steps, preemptions and the pages in use may.
//
// Steps run in the order of their plans, each after the one before (one stream). So a page may go to another sequence as
// soon as no later plan reads it, even while a running step does. A preemption or a copy waits for nothing.
//
// Order is arrival order everywhere. Ids grow with arrival, and both queues are sorted by id. Every running id is below
// every waiting id, and the youngest sequence has the largest id. The same calls always give the same plans.
//
// Every call succeeds, or throws and changes nothing: what can fail (memory) is done first. User errors are
// std::invalid_argument, calls out of order std::logic_error. Not thread-safe.
//
// Paging: Kwon et al. 2023, arXiv:2309.06180. Chunked prefill: Agrawal et al. 2024, arXiv:2403.02310. Torch-free.
#pragma once
#include <cstdint>
#include <map>
#include <numeric>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "rollout/block_allocator.h"
#include "rollout/sequence.h"

namespace grpo_engine {

// One step of the model: T packed tokens of N sequences, from which S tokens are sampled.
//
// Example: page_size 4, a group of 2 with prompt [5, 9], seeds 70 and 71. The first step is
//   tokens [5, 9], positions [0, 1], slots [0, 1], cu_query [0, 2], kv_len [2], page_table [[0]],
//   sample_row [1, 1], sample_seq [0, 1], sample_seed [70, 71], sample_position [2, 2]
// It samples 3 and 4. The second step is
//   tokens [3, 4], positions [2, 2], slots [6, 2], cu_query [0, 1, 2], kv_len [3, 3],
//   page_table [[1], [0]], page_copies [[0, 1]], sample_row [0, 1], sample_position [3, 3].
struct StepPlan {
  std::vector<int64_t> tokens;           // [T] ids; -1 - s: sample s of the plan before
  std::vector<int64_t> positions;        // [T] of each token in its sequence
  std::vector<int64_t> slots;            // [T] page * page_size + offset of its key and value
  std::vector<int32_t> cu_query;         // [N+1] start of each sequence in tokens
  std::vector<int32_t> kv_len;           // [N] tokens of each sequence, this step's included
  std::vector<int32_t> page_table;       // [N, page_table_width], -1 past the end
  int64_t page_table_width = 0;
  std::vector<int32_t> page_copies;      // [C, 2] source, destination, in any order: no page is both.
                                         // The copies come before the step's writes
  std::vector<int64_t> sample_row;       // [S] row of tokens whose hidden state is sampled from
  std::vector<int64_t> sample_seq;       // [S] id of the sequence that the token belongs to
  std::vector<int64_t> sample_seed;      // [S]
  std::vector<int64_t> sample_position;  // [S] position of the token to sample
  TokenCounts counts;                    // of the T tokens
  bool decode_only = false;              // N = T = S: a token of each sequence, a sample of each token
  int64_t preemptions = 0;               // sequences that lost their pages for this step
};

// Sums since construction. Tokens count when their step is committed.
struct SchedulerTotals {
  TokenCounts tokens;
  // The cost of a phase follows from the query-key pairs of its attention and from its sampled tokens. Recomputed tokens
  // belong to prefill, and so do the first tokens of responses.
  int64_t prefill_pairs = 0;
  int64_t decode_pairs = 0;
  int64_t prefill_samples = 0;
  int64_t decode_samples = 0;
  int64_t preemptions = 0;
  int64_t shared_page_hits = 0;  // full prompt pages that a sequence took from a sibling
  int64_t page_copies = 0;
  int64_t dropped_tokens = 0;    // computed for responses that had stopped; 0 without lookahead
  int64_t steps = 0;
};

class Scheduler {
 public:
  // num_pages        pages of the KV cache, page_size tokens each
  // max_running      sequences that decode at a time; a group needs G of them
  // max_step_tokens  limit of T; at least max_running, so that no running sequence misses a step
  // lookahead        whether a step may be planned before the last one's commit
  Scheduler(int64_t num_pages, int64_t page_size, int64_t max_running, int64_t max_step_tokens, bool lookahead = false);
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  // Queues one prompt with seeds.size() responses. Returns the id of the group, which is also the id of its first response.
  // Response g has id + g. A plan may be open.
  int64_t add_group(std::span<const int64_t> prompt, int64_t group_size, int64_t max_new_tokens,
                    std::span<const int64_t> seeds, std::span<const int64_t> stop_ids);

  // Plans the next step. Throws std::logic_error without work, or while the last plan is not committed. With lookahead
  // one plan may be uncommitted.
  StepPlan schedule();

  // Takes the sampled tokens [S] of the oldest open plan. Returns the ids of the sequences that they finish, in the
  // plan's order. Ignores tokens of responses that had stopped. Throws std::invalid_argument on a negative token and names
  // the sequence: its row of logits held nothing to sample from. The plan then stays open.
  std::vector<int64_t> commit(std::span<const int64_t> tokens);

  bool has_work() const { return !running_.empty() || !waiting_.empty(); }  // something to plan
  bool step_open() const { return !open_.empty(); }
  int64_t max_running() const { return max_running_; }
  int64_t num_pages() const { return allocator_.num_pages(); }
  int64_t num_free_pages() const { return allocator_.num_free(); }
  int64_t num_running() const { return num_sequences(running_); }
  int64_t num_waiting() const { return num_sequences(waiting_); }
  const SchedulerTotals& totals() const { return totals_; }

  // Throws std::invalid_argument for an id that was never given out.
  const Sequence& sequence(int64_t id) const;

  // Proves every invariant. Throws std::logic_error that names the first broken one and its sequence.
  void check() const;

 private:
  // What moves through a queue as one: a sequence, or the `size` sequences of a group whose prompt is not computed yet. The
  // first of those, the leader, holds the pages of all.
  struct Entry {
    Sequence* leader;
    int64_t size;
  };
  using Queue = std::vector<Entry>;

  struct Work {
    Sequence* sequence;
    int64_t begin, count;  // tokens [begin, begin + count) are computed
    int64_t samples;       // responses that sample a token after the last of them: 0, 1, or a group's G
  };
  struct Step {
    std::vector<Work> work;          // one for each of the plan's N sequences
    std::vector<Sequence*> samples;  // [S]
  };

  static int64_t num_sequences(const Queue& queue) {
    return std::accumulate(queue.begin(), queue.end(), int64_t{0}, [](int64_t n, Entry entry) { return n + entry.size; });
  }
  int64_t pages_for(int64_t num_tokens) const { return grpo_engine::pages_for(num_tokens, page_size_); }
  bool needs_page(const Sequence& sequence) const;
  int64_t decode_pages() const;
  int64_t growth(const Entry& entry) const;
  std::pair<const Sequence*, int64_t> shared_prefix(const Sequence& sequence) const;
  void reserve_step(StepPlan& plan, Step& step);
  int64_t preempt_for_pages();
  void prepare_pages(Sequence& sequence, StepPlan& plan);
  static int64_t add_work(const Entry& entry, int64_t budget, Step& step);
  void admit(int64_t budget, Step& step);
  void write_plan(const Step& step, StepPlan& plan) const;
  void begin(Step&& step);
  void count(const Work& work);
  void check_pages() const;
  void check_queues() const;

  BlockAllocator allocator_;
  int32_t page_size_;
  int64_t max_running_;
  int64_t max_step_tokens_;
  size_t max_open_;
  int64_t next_id_ = 0;
  std::map<int64_t, std::vector<Sequence>> groups_;  // by group id
  // A response whose last token an open step samples is in neither queue. Both change at their ends, for which memory is
  // reserved: an admission or a preemption cannot fail.
  Queue running_;  // oldest first
  Queue waiting_;  // oldest last
  std::vector<Step> open_;  // planned and not committed, oldest first
  SchedulerTotals totals_;
};

}  // namespace grpo_engine
