// scheduler.h -- which tokens of which sequences the model computes in a step, and in which pages.
//
//   add_group(prompt, G ...)   once per prompt
//   while has_work():
//     plan = schedule()        what to compute; pages are set aside for it
//     ... page copies, forward pass, one drawn token for each of the plan's S samples ...
//     commit(tokens)           the drawn tokens, in the plan's order
//
// Continuous batching. Every running sequence gets its next token in every step; what is left of
// max_step_tokens goes to prompts, in order of arrival, cut into chunks where they do not fit. A
// prompt is computed once per group: all G first tokens are drawn from its last hidden row, and the
// G answers share its pages. The page that holds the end of the prompt is copied for each answer
// that is about to write into it; the last one keeps the original.
//
// When pages run out, the youngest running sequence is preempted: it gives up its pages, keeps its
// tokens, goes to the front of the waiting queue, and is later computed again, alone, from the
// prompt pages that a sibling still holds or else from the start. Seeds and positions stay, so that
// (all ops being batch-invariant) the answers do too. No deadlock: a request is refused unless one
// answer of full length fits into the pool, and the oldest is never preempted for another.
//
// With lookahead, a step may be planned before the tokens of the one before are known, so that a GPU
// need not wait for the host:
//
//   plan 0 = schedule(); plan 1 = schedule(); commit(tokens of 0); plan 2 = schedule(); commit(1) ...
//
// Every answer is taken to go on up to its max_new_tokens, which alone is known beforehand. The inputs
// that plan t draws are in plan t+1 by the number of their sample (StepPlan::tokens). An answer that
// commit(t) finds to have stopped has a row in plan t+1 already; it is computed, and dropped at
// commit(t+1). Answers do not change; steps, preemptions and pages in use may.
//
// Steps run in the order of their plans, each after the one before is done (one stream). So a page may
// be given to another sequence as soon as no later plan is to read it, even while steps that do are
// under way, and a preemption or a copy needs no waiting.
//
// Order is arrival order everywhere: ids grow with arrival, both queues are sorted by id, every
// running id is below every waiting id, and the youngest is the largest id. The same calls always
// give the same plans.
//
// Every call either succeeds or throws and changes nothing: what can fail (memory) is done first.
// User errors are std::invalid_argument, calls out of order std::logic_error. Not thread-safe.
//
// Paging after Kwon et al. 2023, arXiv:2309.06180; chunked prefill after Agrawal et al. 2024,
// arXiv:2403.02310. Torch-free.
#pragma once
#include <cstdint>
#include <iterator>
#include <map>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "rollout/block_allocator.h"
#include "rollout/sequence.h"

namespace grpo_engine {

// One step of the model: T packed tokens of N sequences, from which S tokens are drawn.
//
// Example: page_size 4, a group of 2 with prompt [5, 9], seeds 70 and 71; the first step is
//   tokens [5, 9], positions [0, 1], slots [0, 1], cu_query [0, 2], kv_len [2], page_table [[0]],
//   sample_row [1, 1], sample_seq [0, 1], sample_seed [70, 71], sample_position [2, 2]
// and, once 3 and 4 were drawn, the second one
//   tokens [3, 4], positions [2, 2], slots [6, 2], cu_query [0, 1, 2], kv_len [3, 3],
//   page_table [[1], [0]], page_copies [[0, 1]], sample_row [0, 1], sample_position [3, 3].
struct StepPlan {
  std::vector<int64_t> tokens;           // [T] ids; -1 - s: what sample s of the plan before draws
  std::vector<int64_t> positions;        // [T] of each token in its sequence
  std::vector<int64_t> slots;            // [T] page * page_size + offset of its key and value
  std::vector<int32_t> cu_query;         // [N+1] start of each sequence in tokens
  std::vector<int32_t> kv_len;           // [N] tokens of each sequence, this step's included
  std::vector<int32_t> page_table;       // [N, page_table_width], -1 past the end
  int64_t page_table_width = 0;
  std::vector<int32_t> page_copies;      // [C, 2] source, destination; to be done before the step
                                         // writes; no page is both, so any order will do
  std::vector<int64_t> sample_row;       // [S] row of tokens whose hidden state is sampled from
  std::vector<int64_t> sample_seq;       // [S] id of the sequence that the drawn token belongs to
  std::vector<int64_t> sample_seed;      // [S]
  std::vector<int64_t> sample_position;  // [S] position of the token to be drawn
  TokenCounts counts;                    // of the T tokens
  bool one_each = false;                 // N = T = S: a token of each sequence, a sample of each token
  int64_t preemptions = 0;               // sequences that lost their pages for this step
};

// Sums since construction. Tokens count when their step is committed.
struct SchedulerTotals {
  TokenCounts tokens;
  // What the cost of a phase follows from: query-key pairs of the attention, and drawn tokens.
  // Recomputed tokens belong to prefill, and so do the first tokens of answers.
  int64_t prefill_pairs = 0;
  int64_t decode_pairs = 0;
  int64_t prefill_samples = 0;
  int64_t decode_samples = 0;
  int64_t preemptions = 0;
  int64_t shared_page_hits = 0;  // full prompt pages that a sequence took from a sibling
  int64_t page_copies = 0;
  int64_t dropped_tokens = 0;    // with lookahead: computed for answers that had stopped
  int64_t steps = 0;
};

class Scheduler {
 public:
  // num_pages   pages of the KV cache; page_size tokens each
  // max_running sequences that decode at a time; a group needs G of them
  // max_step_tokens  limit of T; at least max_running, so that no running sequence misses a step
  // lookahead   whether a step may be planned before the last one's commit
  Scheduler(int64_t num_pages, int64_t page_size, int64_t max_running, int64_t max_step_tokens,
            bool lookahead = false);
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  // Queues one prompt with seeds.size() answers. Returns the id of the group, which is also the id
  // of its first answer; answer g has id + g. Allowed between schedule and commit too.
  int64_t add_group(std::span<const int64_t> prompt, int64_t group_size, int64_t max_new_tokens,
                    std::span<const int64_t> seeds, std::span<const int64_t> stop_ids);

  // Plans the next step. Throws std::logic_error without work, or before the last one's commit - with
  // lookahead, that of the one before.
  StepPlan schedule();

  // Takes the drawn tokens [S] of the oldest open plan and returns the ids of the sequences that they
  // finished, in the plan's order. Tokens of answers that had stopped are ignored. Throws
  // std::invalid_argument on a negative token, naming the sequence: its row of logits held nothing to
  // draw from. The step then stays open (see preempt_all).
  std::vector<int64_t> commit(std::span<const int64_t> tokens);

  // Ends the unfinished answers of a group as "cancelled" and returns how many those were.
  // Not while a step is open.
  int64_t cancel(int64_t group);

  // Forgets a group whose answers are all finished, and of which no open step has a row.
  void drop(int64_t group);

  // Sends every running sequence back to the queue, and forgets the open steps. For use when cached
  // keys and values are worthless: the weights changed, or a step failed half-way.
  void preempt_all();

  bool has_work() const { return !running_.empty() || !waiting_.empty(); }  // something to plan
  bool step_open() const { return !open_.empty(); }
  int64_t max_running() const { return max_running_; }
  int64_t num_pages() const { return allocator_.num_pages(); }
  int64_t num_free_pages() const { return allocator_.num_free(); }
  int64_t num_running() const { return static_cast<int64_t>(running_.size()); }
  int64_t num_waiting() const { return static_cast<int64_t>(waiting_.size()); }
  const SchedulerTotals& totals() const { return totals_; }

  // Throws std::invalid_argument for an id that was never given out, or was dropped.
  const Sequence& sequence(int64_t id) const;
  int64_t group_size(int64_t group) const;

  // Proves every invariant; throws std::logic_error naming the first that is broken, and by whom.
  void check() const;

 private:
  // An entry of a queue is what moves through it as one: a sequence, or the G sequences of a group
  // whose prompt is not computed yet. The first of those, the leader, holds the pages of all.
  using Queue = std::map<int64_t, Sequence*>;

  struct Work {
    Sequence* sequence;
    int64_t begin, count;  // tokens [begin, begin + count) are computed
    int64_t samples;       // answers that draw a token after the last of them: 0, 1, or a group's G
  };
  struct Step {
    std::vector<Work> work;          // one for each of the plan's N sequences
    std::vector<Sequence*> samples;  // [S]
  };

  static int64_t entry_size(const Sequence& leader) {
    return leader.begun() ? 1 : leader.request().group_size();
  }
  template <typename Iterator>
  static Iterator after_entry(Iterator entry) {
    return std::next(entry, entry_size(*entry->second));
  }
  static Queue::iterator last_entry(Queue& queue);

  const std::vector<Sequence>& group(int64_t id, const char* caller) const;
  int64_t pages_for(int64_t num_tokens) const {
    return grpo_engine::pages_for(num_tokens, page_size_);
  }
  bool needs_page(const Sequence& sequence) const;
  int64_t decode_pages() const;
  int64_t growth(const Sequence& sequence) const;
  std::pair<const Sequence*, int64_t> shared_prefix(const Sequence& sequence) const;
  void move_entry(Queue& from, Queue::iterator entry, Queue& to);
  void preempt(Queue::iterator entry);
  void reserve_step(StepPlan& plan, Step& step);
  int64_t preempt_for_pages();
  void prepare_pages(Sequence& sequence, StepPlan& plan);
  static int64_t add_work(Sequence& sequence, int64_t budget, Step& step);
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
  Queue running_;
  Queue waiting_;
  Queue ending_;            // whose last token an open step draws: without pages
  std::vector<Step> open_;  // planned and not committed, oldest first
  SchedulerTotals totals_;
};

}  // namespace grpo_engine
