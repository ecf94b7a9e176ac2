// Scheduler: plans, sharing, preemption, refusals, and a model that proves what every query sees.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <map>
#include <new>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "rollout/scheduler.h"

// Allocations that still succeed before one fails; negative: all succeed.
static int64_t g_allocations_left = -1;

// Not inlined: GCC 12 would see free() beside a call of new and warn of a mismatch.
[[gnu::noinline]] void* operator new(std::size_t size) {
  if (g_allocations_left == 0) throw std::bad_alloc();
  if (g_allocations_left > 0) --g_allocations_left;
  if (void* memory = std::malloc(size == 0 ? 1 : size)) return memory;
  throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

namespace grpo_engine {
namespace {

using Tokens = std::vector<int64_t>;

constexpr uint64_t kEmptyPrefix = 0x9e3779b97f4a7c15u;

uint64_t mix(uint64_t state, uint64_t value) {
  state ^= value + 0x9e3779b97f4a7c15u + (state << 6) + (state >> 2);
  state *= 0xbf58476d1ce4e5b9u;
  return state ^ (state >> 29);
}

struct Group {
  Tokens prompt, seeds, stop_ids;
  int64_t max_new_tokens;
};

int64_t sample(uint64_t prefix, int64_t seed, int64_t position) {
  return static_cast<int64_t>(mix(mix(prefix, seed), position) % 23);
}

// What response g of a group must be: the same samples, with no scheduler and no pages.
Tokens expected_response(const Group& group, size_t g) {
  uint64_t prefix = kEmptyPrefix;
  for (int64_t token : group.prompt) prefix = mix(prefix, token);
  Tokens response;
  while (static_cast<int64_t>(response.size()) < group.max_new_tokens) {
    const auto position = static_cast<int64_t>(group.prompt.size() + response.size());
    response.push_back(sample(prefix, group.seeds[g], position));
    prefix = mix(prefix, response.back());
    if (std::count(group.stop_ids.begin(), group.stop_ids.end(), response.back())) break;
  }
  return response;
}

// A model whose hidden state at position p is a hash of tokens 0..p, kept in KV slots as a real one
// keeps keys and values. It reads the past only through the page table, so a wrong page, a missing
// copy, or a slot that two sequences write changes what it samples, and verify() names it. Plans are run
// as soon as they are made, one after another, as a stream would.
class FakeModel {
 public:
  FakeModel(int64_t num_pages, int64_t page_size) : page_size_(page_size), cells_(num_pages * page_size) {}

  // The sampled tokens of a plan; `truth` holds what each sequence consists of so far, and `before` what
  // the plan before sampled.
  Tokens step(StepPlan plan, const std::map<int64_t, Tokens>& truth, const Tokens& before) {
    for (int64_t& token : plan.tokens) {
      if (token < 0) token = before.at(-1 - token);
    }
    const size_t N = plan.kv_len.size();
    EXPECT_EQ(plan.cu_query.size(), N + 1);
    EXPECT_EQ(plan.page_table.size(), N * plan.page_table_width);
    EXPECT_EQ(plan.counts.total(), static_cast<int64_t>(plan.tokens.size()));
    poison_unused(plan);
    copy_pages(plan);
    write(plan);
    std::vector<bool> verified(N, false);
    Tokens sampled;
    for (size_t s = 0; s < plan.sample_row.size(); ++s) {
      const auto after =
          std::upper_bound(plan.cu_query.begin(), plan.cu_query.end(), static_cast<int32_t>(plan.sample_row[s]));
      const auto n = static_cast<size_t>(after - plan.cu_query.begin()) - 1;
      EXPECT_EQ(plan.sample_row[s], plan.cu_query[n + 1] - 1) << "not the last row";
      EXPECT_EQ(plan.sample_position[s], plan.kv_len[n]);
      const Tokens& tokens = truth.at(plan.sample_seq[s]);
      EXPECT_EQ(plan.kv_len[n], static_cast<int64_t>(tokens.size()));
      verify(plan, n, tokens);
      verified[n] = true;
      sampled.push_back(sample(cell(plan, n, plan.kv_len[n] - 1).prefix, plan.sample_seed[s], plan.sample_position[s]));
    }
    // Rows without a sample are chunks of one long prompt, which is checked when it is complete.
    EXPECT_LE(std::count(verified.begin(), verified.end(), false), 1);
    return sampled;
  }

 private:
  struct Cell {
    int64_t token = -1, position = -1;
    uint64_t prefix = 0;
  };

  Cell& cell(const StepPlan& plan, size_t n, int64_t position) {
    const int32_t page = plan.page_table.at(n * plan.page_table_width + position / page_size_);
    return cells_.at(page * page_size_ + position % page_size_);
  }

  // Every running sequence is in every plan, so a page in no table may hold anything.
  void poison_unused(const StepPlan& plan) {
    std::set<int64_t> used(plan.page_table.begin(), plan.page_table.end());
    for (size_t c = 0; c < plan.page_copies.size(); c += 2) used.insert(plan.page_copies[c]);
    for (size_t i = 0; i < cells_.size(); ++i) {
      if (!used.contains(static_cast<int64_t>(i) / page_size_)) cells_[i] = {-7, -7, 7};
    }
  }

  void copy_pages(const StepPlan& plan) {
    std::set<int32_t> sources, destinations;
    for (size_t c = 0; c < plan.page_copies.size(); c += 2) {
      const int32_t from = plan.page_copies[c], to = plan.page_copies[c + 1];
      sources.insert(from);
      EXPECT_TRUE(destinations.insert(to).second) << "two copies into page " << to;
      std::copy_n(cells_.begin() + from * page_size_, page_size_, cells_.begin() + to * page_size_);
    }
    for (int32_t page : sources) EXPECT_FALSE(destinations.contains(page)) << "order matters";
  }

  void write(const StepPlan& plan) {
    std::set<int64_t> written;
    std::map<int64_t, int64_t> holders;
    for (int32_t page : plan.page_table) ++holders[page];
    for (size_t n = 0; n < plan.kv_len.size(); ++n) {
      for (int32_t t = plan.cu_query[n]; t < plan.cu_query[n + 1]; ++t) {
        const int64_t position = plan.positions[t];
        EXPECT_EQ(position, plan.kv_len[n] - plan.cu_query[n + 1] + t);
        EXPECT_TRUE(written.insert(plan.slots[t]).second) << "slot written twice";
        EXPECT_EQ(holders[plan.slots[t] / page_size_], 1) << "a shared page is written";
        const uint64_t before = position == 0 ? kEmptyPrefix : cell(plan, n, position - 1).prefix;
        cells_.at(plan.slots[t]) = {plan.tokens[t], position, mix(before, plan.tokens[t])};
        EXPECT_EQ(&cell(plan, n, position), &cells_.at(plan.slots[t])) << "slot not in the table";
      }
    }
  }

  // After all writes of the step: row n's table leads to exactly its own tokens.
  void verify(const StepPlan& plan, size_t n, const Tokens& tokens) {
    uint64_t prefix = kEmptyPrefix;
    for (int64_t position = 0; position < plan.kv_len[n]; ++position) {
      const Cell& seen = cell(plan, n, position);
      prefix = mix(prefix, tokens[position]);
      ASSERT_EQ(seen.token, tokens[position]) << "row " << n << " position " << position;
      ASSERT_EQ(seen.position, position) << "row " << n;
      ASSERT_EQ(seen.prefix, prefix) << "row " << n << " position " << position;
    }
    const int64_t width = plan.page_table_width;
    for (int64_t i = pages_for(plan.kv_len[n], page_size_); i < width; ++i) {
      ASSERT_EQ(plan.page_table[n * width + i], -1) << "past the end of row " << n;
    }
  }

  int64_t page_size_;
  std::vector<Cell> cells_;
};

// A scheduler with its model and the book that both are checked against.
class Engine {
 public:
  Engine(int64_t num_pages, int64_t page_size, int64_t max_running, int64_t max_step_tokens, bool lookahead = false)
      : scheduler(num_pages, page_size, max_running, max_step_tokens, lookahead),
        model_(num_pages, page_size),
        lookahead_(lookahead) {}

  int64_t add(const Group& group) {
    const int64_t id =
        scheduler.add_group(group.prompt, group.seeds.size(), group.max_new_tokens, group.seeds, group.stop_ids);
    groups[id] = group;
    for (size_t g = 0; g < group.seeds.size(); ++g) truth_[id + g] = group.prompt;
    return id;
  }

  StepPlan schedule() {
    StepPlan plan = scheduler.schedule();
    EXPECT_EQ(plan.decode_only, plan.tokens.size() == plan.kv_len.size() && plan.sample_row.size() == plan.tokens.size() &&
                                    std::adjacent_find(plan.sample_row.begin(), plan.sample_row.end(),
                                                       std::greater_equal<>()) == plan.sample_row.end());
    const Tokens before = open_.empty() ? Tokens{} : open_.back().tokens;
    open_.push_back({model_.step(plan, truth_, before), plan.sample_seq});
    const auto& [tokens, sequences] = open_.back();
    for (size_t s = 0; s < tokens.size(); ++s) truth_[sequences[s]].push_back(tokens[s]);
    return plan;
  }

  Tokens commit() {
    const Tokens finished = scheduler.commit(open_.front().tokens);
    open_.erase(open_.begin());
    for (int64_t id : finished) {
      const Sequence& sequence = scheduler.sequence(id);
      const Group& group = groups.at(sequence.request().id);
      EXPECT_EQ(sequence.response(), expected_response(group, sequence.index())) << "response " << id;
    }
    return finished;
  }

  // Whether another step may be planned.
  bool can_schedule() const { return scheduler.has_work() && open_.size() <= static_cast<size_t>(lookahead_); }

  StepPlan step() {
    StepPlan plan = schedule();
    scheduler.check();
    commit();
    scheduler.check();
    return plan;
  }

  // Runs to the end, as far ahead as allowed, and checks every response.
  void finish() {
    while ((scheduler.has_work() || scheduler.step_open()) && !testing::Test::HasFatalFailure()) {
      if (can_schedule()) {
        schedule();
      } else {
        commit();
      }
      scheduler.check();
    }
    EXPECT_EQ(scheduler.num_free_pages(), scheduler.num_pages());
    for (const auto& [id, group] : groups) {
      for (size_t g = 0; g < group.seeds.size(); ++g) {
        EXPECT_EQ(scheduler.sequence(id + g).response(), expected_response(group, g)) << "response " << id + g;
      }
    }
  }

  Scheduler scheduler;
  std::map<int64_t, Group> groups;

 private:
  struct Step {
    Tokens tokens, sequences;  // [S], and whose they are
  };

  FakeModel model_;
  bool lookahead_;
  std::map<int64_t, Tokens> truth_;  // those of open steps included
  std::vector<Step> open_;           // oldest first
};

// Seeds and prompts differ by `salt`, so that no two requests look alike.
Group group_of(int64_t prompt_length, int64_t group_size, int64_t max_new_tokens, int64_t salt = 0, Tokens stop_ids = {}) {
  Group group{{}, {}, std::move(stop_ids), max_new_tokens};
  for (int64_t i = 0; i < prompt_length; ++i) group.prompt.push_back((i * 7 + salt) % 101);
  for (int64_t g = 0; g < group_size; ++g) group.seeds.push_back(1000 * salt + g - 3);
  return group;
}

template <typename Error, typename Call>
std::string message_of(Call call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

bool same(const StepPlan& a, const StepPlan& b) {
  return a.tokens == b.tokens && a.positions == b.positions && a.slots == b.slots && a.cu_query == b.cu_query &&
         a.kv_len == b.kv_len && a.page_table == b.page_table && a.page_copies == b.page_copies &&
         a.sample_row == b.sample_row && a.sample_seq == b.sample_seq && a.sample_seed == b.sample_seed &&
         a.sample_position == b.sample_position && a.preemptions == b.preemptions && a.decode_only == b.decode_only;
}

// ---- plans ------------------------------------------------------------------------------------

TEST(Scheduler, TheExampleOfTheHeader) {
  Scheduler scheduler(4, 4, 8, 16);
  EXPECT_EQ(scheduler.add_group(Tokens{5, 9}, 2, 4, Tokens{70, 71}, Tokens{}), 0);
  StepPlan plan = scheduler.schedule();
  EXPECT_EQ(plan.tokens, (Tokens{5, 9}));
  EXPECT_EQ(plan.positions, (Tokens{0, 1}));
  EXPECT_EQ(plan.slots, (Tokens{0, 1}));
  EXPECT_EQ(plan.cu_query, (std::vector<int32_t>{0, 2}));
  EXPECT_EQ(plan.kv_len, (std::vector<int32_t>{2}));
  EXPECT_EQ(plan.page_table, (std::vector<int32_t>{0}));
  EXPECT_EQ(plan.sample_row, (Tokens{1, 1}));
  EXPECT_EQ(plan.sample_seq, (Tokens{0, 1}));
  EXPECT_EQ(plan.sample_seed, (Tokens{70, 71}));
  EXPECT_EQ(plan.sample_position, (Tokens{2, 2}));
  EXPECT_TRUE(scheduler.commit(Tokens{3, 4}).empty());
  plan = scheduler.schedule();
  EXPECT_EQ(plan.tokens, (Tokens{3, 4}));
  EXPECT_EQ(plan.positions, (Tokens{2, 2}));
  EXPECT_EQ(plan.slots, (Tokens{6, 2}));
  EXPECT_EQ(plan.cu_query, (std::vector<int32_t>{0, 1, 2}));
  EXPECT_EQ(plan.kv_len, (std::vector<int32_t>{3, 3}));
  EXPECT_EQ(plan.page_table, (std::vector<int32_t>{1, 0}));
  EXPECT_EQ(plan.page_table_width, 1);
  EXPECT_EQ(plan.page_copies, (std::vector<int32_t>{0, 1}));
  EXPECT_EQ(plan.sample_row, (Tokens{0, 1}));
  EXPECT_EQ(plan.sample_position, (Tokens{3, 3}));
}

TEST(Scheduler, AGroupSharesItsPromptAroundEveryPageBoundary) {
  constexpr int64_t kPage = 4;
  for (int64_t group_size : {1, 2, 5}) {
    for (int64_t prompt_length : {1, 3, 4, 5, 7, 8, 9, 12}) {
      SCOPED_TRACE("G " + std::to_string(group_size) + " prompt " + std::to_string(prompt_length));
      Engine engine(64, kPage, 8, 64);
      engine.add(group_of(prompt_length, group_size, 9));
      StepPlan plan = engine.step();
      EXPECT_EQ(plan.counts.prefill, prompt_length);  // once, not G times
      EXPECT_EQ(plan.sample_row, Tokens(group_size, prompt_length - 1));
      plan = engine.step();
      const bool partial = prompt_length % kPage != 0;
      EXPECT_EQ(static_cast<int64_t>(plan.page_copies.size()), partial ? 2 * (group_size - 1) : 0);
      EXPECT_EQ(plan.counts.decode, group_size);
      EXPECT_EQ(64 - engine.scheduler.num_free_pages(), prompt_length / kPage + group_size);
      engine.finish();
      const SchedulerTotals& totals = engine.scheduler.totals();
      EXPECT_EQ(totals.tokens.prefill, prompt_length);
      EXPECT_EQ(totals.tokens.decode, group_size * 8);  // the ninth is sampled, never computed
      EXPECT_EQ(totals.tokens.recomputed, 0);
      EXPECT_EQ(totals.prefill_pairs, prompt_length * (prompt_length + 1) / 2);
      EXPECT_EQ(totals.decode_pairs, group_size * (8 * prompt_length + 36));  // + 1, + 2 ... + 8
      EXPECT_EQ(totals.prefill_samples, group_size);
      EXPECT_EQ(totals.decode_samples, group_size * 8);
      EXPECT_EQ(totals.shared_page_hits, (group_size - 1) * (prompt_length / kPage));
    }
  }
}

TEST(Scheduler, AGroupThatJustFitsIsNotPreempted) {
  Engine engine(4, 4, 3, 8);  // one full prompt page, and the second one three times
  engine.add(group_of(5, 3, 4));
  engine.finish();
  EXPECT_EQ(engine.scheduler.totals().preemptions, 0);
  EXPECT_EQ(engine.scheduler.totals().page_copies, 2);
}

TEST(Scheduler, ALongPromptIsComputedInChunksBesideDecoding) {
  Engine engine(64, 4, 4, 10);
  engine.add(group_of(2, 2, 20, 1));
  EXPECT_EQ(engine.step().tokens.size(), 2u);
  engine.add(group_of(21, 2, 3, 2));
  const std::vector<std::pair<int64_t, size_t>> want = {{8, 2}, {8, 2}, {5, 4}};
  for (const auto& [prefill, samples] : want) {
    const StepPlan plan = engine.step();
    EXPECT_EQ(plan.counts.decode, 2);
    EXPECT_EQ(plan.counts.prefill, prefill);
    EXPECT_EQ(plan.sample_seq.size(), samples);
  }
  EXPECT_EQ(engine.step().counts.decode, 4);
  engine.finish();
}

TEST(Scheduler, AStepWhereEveryResponseStopsLeavesNothingBehind) {
  Scheduler scheduler(64, 4, 8, 64);
  for (int i = 0; i < 2; ++i) {
    scheduler.add_group(Tokens{1, 2, 3, 4, 5}, 4, 10, Tokens{1, 2, 3, 4}, Tokens{9});
  }
  const StepPlan plan = scheduler.schedule();
  ASSERT_EQ(plan.sample_seq.size(), 8u);
  EXPECT_EQ(scheduler.commit(Tokens(8, 9)), (Tokens{0, 1, 2, 3, 4, 5, 6, 7}));
  scheduler.check();
  EXPECT_FALSE(scheduler.has_work());
  EXPECT_EQ(scheduler.num_free_pages(), 64);
  EXPECT_EQ(scheduler.totals().page_copies, 0);
  EXPECT_EQ(scheduler.sequence(5).response(), Tokens{9});
  EXPECT_STREQ(finish_name(scheduler.sequence(5).finish()), "stop");
}

TEST(Scheduler, TheFirstResponseMayStopAtOnceAndItsSiblingsKeepThePrompt) {
  Scheduler scheduler(16, 4, 8, 64);
  scheduler.add_group(Tokens{1, 2, 3, 4, 5}, 3, 10, Tokens{1, 2, 3}, Tokens{9});
  scheduler.schedule();
  EXPECT_EQ(scheduler.commit(Tokens{9, 6, 7}), Tokens{0});
  scheduler.check();
  EXPECT_EQ(scheduler.num_free_pages(), 14);
  const StepPlan plan = scheduler.schedule();
  EXPECT_EQ(plan.page_copies, (std::vector<int32_t>{1, 2}));
  EXPECT_EQ(plan.sample_seq, (Tokens{1, 2}));
}

TEST(Scheduler, OneTokenResponsesNeverDecode) {
  Engine engine(8, 4, 8, 64);
  engine.add(group_of(6, 3, 1));
  engine.step();
  EXPECT_FALSE(engine.scheduler.has_work());
  EXPECT_STREQ(finish_name(engine.scheduler.sequence(2).finish()), "length");
  engine.finish();
}

TEST(Scheduler, SeedsKeepAll64Bits) {
  Scheduler scheduler(4, 4, 4, 4);
  const Tokens seeds = {INT64_MIN, -1, INT64_MAX};
  scheduler.add_group(Tokens{1}, 3, 2, seeds, Tokens{});
  EXPECT_EQ(scheduler.schedule().sample_seed, seeds);
}

// ---- order ------------------------------------------------------------------------------------

TEST(Scheduler, AdmissionFollowsArrivalAndNobodyIsOvertaken) {
  Engine engine(8, 4, 8, 64);
  engine.add(group_of(8, 1, 12, 1));            // runs, and leaves 6 pages less what it may grow by
  engine.add(group_of(20, 1, 4, 2));            // does not fit beside it
  engine.add(group_of(1, 1, 1, 3));             // would fit, and waits
  EXPECT_EQ(engine.step().sample_seq, Tokens{0});
  EXPECT_EQ(engine.scheduler.num_waiting(), 2);
  while (!engine.scheduler.sequence(0).finished()) EXPECT_EQ(engine.step().sample_seq, Tokens{0});
  EXPECT_EQ(engine.step().sample_seq, (Tokens{1, 2}));
  engine.finish();
}

TEST(Scheduler, MaxRunningCountsEveryResponseOfAGroup) {
  Engine engine(64, 4, 5, 64);
  engine.add(group_of(3, 2, 3, 1));
  engine.add(group_of(3, 3, 3, 2));
  engine.add(group_of(3, 1, 3, 3));
  EXPECT_EQ(engine.step().sample_seq.size(), 5u);
  EXPECT_EQ(engine.scheduler.num_running(), 5);
  EXPECT_EQ(engine.scheduler.num_waiting(), 1);
  engine.finish();
}

TEST(Scheduler, TheYoungestIsPreemptedAndComesBackFirst) {
  // Four responses of one group write 1 + 12 tokens each: 4 pages each where the pool has 8.
  Engine engine(8, 4, 8, 64);
  engine.add(group_of(1, 4, 13, 1));
  engine.add(group_of(1, 1, 2, 2));  // arrives later: must wait for all of them
  std::vector<std::vector<int64_t>> ran;
  int64_t preemptions = 0;
  while (engine.scheduler.has_work()) {
    const StepPlan plan = engine.step();
    preemptions += plan.preemptions;
    if (ran.empty() || ran.back() != plan.sample_seq) ran.push_back(plan.sample_seq);
  }
  // With 3 pages each only two fit; those run to the end, then the next two, then the latecomer.
  EXPECT_EQ(ran[0], (Tokens{0, 1, 2, 3}));
  EXPECT_EQ(ran[1], (Tokens{0, 1}));
  EXPECT_EQ(ran[2], (Tokens{2, 3}));
  EXPECT_EQ(ran[3], Tokens{4});
  EXPECT_EQ(preemptions, 2);
  EXPECT_EQ(engine.scheduler.totals().preemptions, 2);
  engine.finish();
}

TEST(Scheduler, APreemptedResponseTakesThePromptPagesThatASiblingStillHolds) {
  // A prompt of 4 pages and a bit; the three responses would need 4 + 3 * 3 pages and find 12.
  Scheduler scheduler(12, 4, 3, 64);
  scheduler.add_group(Tokens(17, 6), 3, 12, Tokens{1, 2, 3}, Tokens{9});
  while (scheduler.schedule().preemptions == 0) scheduler.commit(Tokens(3, 5));
  scheduler.commit(Tokens{9, 5});  // after that step, without the third, the first response stops
  scheduler.check();
  EXPECT_EQ(scheduler.sequence(2).length(), 25);
  EXPECT_EQ(scheduler.totals().shared_page_hits, 8);
  const StepPlan plan = scheduler.schedule();
  scheduler.check();
  EXPECT_EQ(plan.sample_seq, (Tokens{1, 2}));
  EXPECT_EQ(plan.cu_query, (std::vector<int32_t>{0, 1, 10}));
  EXPECT_EQ(plan.positions[1], 16);  // computes what lies behind the four shared pages
  for (int i = 0; i < 4; ++i) {
    EXPECT_EQ(plan.page_table[i], plan.page_table[plan.page_table_width + i]);
  }
  EXPECT_EQ(plan.counts.recomputed, 8);  // positions 16 to 23
  EXPECT_EQ(plan.counts.decode, 2);
  EXPECT_EQ(scheduler.totals().shared_page_hits, 12);
}

TEST(Scheduler, AGroupWhoseResponsesNeverFitTogetherStillFinishes) {
  // 16 responses of 3 pages in a pool of 3 pages: one at a time.
  Engine engine(3, 4, 16, 16);
  engine.add(group_of(5, 16, 7, 1));
  engine.add(group_of(11, 1, 1, 2));
  engine.finish();
}

// ---- recomputation, failure ---------------------------------------------------------------------

TEST(Scheduler, PagesBudgetsAndPreemptionChangeNoResponse) {
  std::vector<Group> groups;
  int64_t prompt_tokens = 0;
  for (int64_t i = 0; i < 12; ++i) {
    groups.push_back(group_of(1 + (i * 5) % 19, 1 + i % 4, 1 + i * 2, i, {0, 5}));
    prompt_tokens += static_cast<int64_t>(groups.back().prompt.size());
  }
  for (int64_t page_size : {1, 3, 4, 16}) {
    const int64_t smallest = (19 + 23 + page_size - 1) / page_size;  // the largest single request
    int64_t preempted_when_scarce = 0, recomputed_when_scarce = 0;
    for (int64_t num_pages : {smallest, smallest + 2, 2 * smallest, 20 * smallest}) {
      for (const auto& [max_step_tokens, lookahead] :
           std::vector<std::pair<int64_t, bool>>{{4, false}, {7, false}, {256, false}, {4, true}, {7, true}, {256, true}}) {
        SCOPED_TRACE("page_size " + std::to_string(page_size) + " num_pages " + std::to_string(num_pages) + " budget " +
                     std::to_string(max_step_tokens) + (lookahead ? " ahead" : ""));
        const int64_t max_running = std::min<int64_t>(max_step_tokens, 24);
        Engine engine(num_pages, page_size, max_running, max_step_tokens, lookahead);
        for (const Group& group : groups) engine.add(group);
        engine.finish();
        const SchedulerTotals& totals = engine.scheduler.totals();
        EXPECT_EQ(totals.dropped_tokens > 0, lookahead);
        EXPECT_EQ(totals.tokens.prefill, prompt_tokens);
        EXPECT_TRUE(totals.preemptions > 0 || totals.tokens.recomputed == 0);
        if (num_pages == smallest) {
          preempted_when_scarce += totals.preemptions;
          recomputed_when_scarce += totals.tokens.recomputed;
        } else if (num_pages == 20 * smallest) {
          EXPECT_EQ(totals.preemptions, 0);
        }
      }
    }
    EXPECT_GT(preempted_when_scarce, 0);
    EXPECT_GT(recomputed_when_scarce, preempted_when_scarce);
  }
}

// Each call is made to fail at its first, second, third ... allocation before it is let through;
// a twin that never failed shows that the failures left no trace.
TEST(Scheduler, RunningOutOfMemoryChangesNothing) {
  const auto until_it_succeeds = [](Scheduler& scheduler, auto&& call) {
    const auto state = [&] {
      const SchedulerTotals& totals = scheduler.totals();
      return Tokens{scheduler.num_free_pages(), scheduler.num_running(), scheduler.num_waiting(), scheduler.step_open(),
                    totals.preemptions,         totals.shared_page_hits, totals.page_copies,      totals.steps,
                    totals.tokens.total()};
    };
    const Tokens before = state();
    int64_t failures = 0;
    for (int64_t allowed = 0;; ++allowed) {
      try {
        g_allocations_left = allowed;
        call();
        g_allocations_left = -1;
        return failures;
      } catch (const std::bad_alloc&) {
        g_allocations_left = -1;
        ++failures;
        scheduler.check();
        EXPECT_EQ(state(), before) << "after allocation " << allowed << " failed";
      }
    }
  };
  for (const bool lookahead : {false, true}) {
    Scheduler twin(10, 4, 8, 16, lookahead), scheduler(10, 4, 8, 16, lookahead);
    std::vector<Tokens> open;
    int64_t failures[3] = {0, 0, 0};
    int64_t token = 1;
    for (int step = 0; step < 60; ++step) {
      if (step % 12 == 0) {
        const Group group = group_of(1 + step % 17, 1 + step / 12 % 4, 16, step);
        const auto add = [&](Scheduler& to) {
          return to.add_group(group.prompt, group.seeds.size(), 16, group.seeds, group.stop_ids);
        };
        int64_t id = -1;
        failures[0] += until_it_succeeds(scheduler, [&] { id = add(scheduler); });
        EXPECT_EQ(id, add(twin));
      }
      if (twin.has_work()) {
        const StepPlan want = twin.schedule();
        StepPlan plan;
        failures[1] += until_it_succeeds(scheduler, [&] { plan = scheduler.schedule(); });
        ASSERT_TRUE(same(plan, want)) << "step " << step;
        open.emplace_back();
        for (size_t s = 0; s < plan.sample_seq.size(); ++s) open.back().push_back(token++ % 50);
      }
      if (open.empty() || (lookahead && open.size() == 1 && twin.has_work())) continue;
      const Tokens finished = twin.commit(open.front());
      Tokens also;
      failures[2] += until_it_succeeds(scheduler, [&] { also = scheduler.commit(open.front()); });
      ASSERT_EQ(also, finished);
      open.erase(open.begin());
      scheduler.check();
    }
    EXPECT_GT(twin.totals().preemptions, 0);
    for (int64_t count : failures) EXPECT_GT(count, 10);
  }
}

TEST(Scheduler, AnInvalidTokenNamesItsSequenceAndLeavesTheStepOpen) {
  Scheduler scheduler(16, 4, 8, 64);
  scheduler.add_group(Tokens{1, 2, 3}, 2, 5, Tokens{1, 2}, Tokens{});
  scheduler.add_group(Tokens{4, 5}, 2, 5, Tokens{3, 4}, Tokens{});
  scheduler.schedule();
  EXPECT_EQ(message_of<std::invalid_argument>([&] { scheduler.commit(Tokens{1, 1, 1, -1}); }),
            "commit: tokens must be >= 0, got -1 for sequence 3 (group 2, response 1) at position 2: "
            "its logits held nothing to sample from (NaN, or every token excluded)");
  EXPECT_EQ(message_of<std::invalid_argument>([&] { scheduler.commit(Tokens{1}); }),
            "commit: tokens must hold one token for each of the plan's 4 samples, got 1");
  scheduler.check();
  EXPECT_TRUE(scheduler.step_open());
  EXPECT_EQ(scheduler.sequence(0).known(), 3);
  EXPECT_TRUE(scheduler.commit(Tokens{1, 1, 1, 1}).empty());
  scheduler.check();
}

TEST(Scheduler, CallsOutOfOrderAreRefusedWithASentence) {
  Scheduler scheduler(16, 4, 8, 64);
  EXPECT_EQ(message_of<std::logic_error>([&] { scheduler.schedule(); }),
            "Scheduler: schedule() without work; call has_work() first");
  EXPECT_EQ(message_of<std::logic_error>([&] { scheduler.commit(Tokens{}); }),
            "Scheduler: commit() without schedule(); each plan is committed once");
  scheduler.add_group(Tokens{1, 2, 3}, 2, 5, Tokens{1, 2}, Tokens{});
  scheduler.schedule();
  EXPECT_EQ(message_of<std::logic_error>([&] { scheduler.schedule(); }),
            "Scheduler: schedule() was called twice; commit() the tokens of the first plan");
  scheduler.commit(Tokens{1, 1});
  EXPECT_THROW(scheduler.commit(Tokens{1, 1}), std::logic_error);
  scheduler.check();
  for (int64_t id : {-1, 2}) {
    EXPECT_EQ(message_of<std::invalid_argument>([&] { scheduler.sequence(id); }),
              "Scheduler: no sequence has id " + std::to_string(id) + ", it was never given out");
  }
}

TEST(Scheduler, BadRequestsAreToldWhatWasWantedAndWhatCame) {
  Scheduler scheduler(4, 4, 3, 8);
  const auto refusal = [&](Tokens prompt, int64_t group_size, int64_t max_new, Tokens seeds) {
    return message_of<std::invalid_argument>([&] { scheduler.add_group(prompt, group_size, max_new, seeds, Tokens{}); });
  };
  EXPECT_EQ(refusal({}, 1, 1, {1}), "add_group: prompt must hold at least one token, got none");
  EXPECT_EQ(refusal({1, -2}, 1, 1, {1}), "add_group: prompt must hold token ids >= 0, got -2 at position 1");
  EXPECT_EQ(refusal({1}, 0, 1, {}), "add_group: group_size must be at least 1, got 0");
  EXPECT_EQ(refusal({1}, 4, 1, {1, 2, 3, 4}),
            "add_group: group_size must be at most max_running = 3, as the responses of a group "
            "start together, got 4");
  EXPECT_EQ(refusal({1}, 2, 1, {1}), "add_group: seeds must hold one seed for each of the 2 responses, got 1");
  EXPECT_EQ(refusal({1}, 1, 0, {1}), "add_group: max_new_tokens must be at least 1, got 0");
  EXPECT_EQ(refusal({1, 2, 3}, 1, 14, {1}),
            "add_group: one sequence must fit into num_pages = 4 pages of 4 tokens, got a prompt "
            "of 3 tokens and max_new_tokens = 14, which take 5 pages");
  EXPECT_EQ(refusal({1}, 1, INT64_MAX, {1}),
            "add_group: prompt and response must be at most 2147483647 tokens long, got 1 and "
            "max_new_tokens = 9223372036854775807");
  EXPECT_FALSE(scheduler.has_work());
  scheduler.check();
  EXPECT_EQ(scheduler.add_group(Tokens{1, 2, 3}, 1, 13, Tokens{1}, Tokens{}), 0);  // just fits
}

TEST(Scheduler, BadSizesAreRefused) {
  const auto refusal = [](int64_t pages, int64_t size, int64_t running, int64_t tokens) {
    return message_of<std::invalid_argument>([&] { Scheduler s(pages, size, running, tokens); });
  };
  EXPECT_EQ(refusal(0, 4, 1, 1), "Scheduler: num_pages must be in [1, 2147483647], got 0");
  EXPECT_EQ(refusal(1, -4, 1, 1), "Scheduler: page_size must be in [1, 2147483647], got -4");
  EXPECT_EQ(refusal(1, 4, 0, 1), "Scheduler: max_running must be in [1, 2147483647], got 0");
  EXPECT_EQ(refusal(1, 4, 8, 7),
            "Scheduler: max_step_tokens must be at least max_running = 8, so that every running "
            "sequence gets a token in every step, got 7");
}

// ---- lookahead --------------------------------------------------------------------------------

TEST(Scheduler, AheadTheInputsAreTheSamplesOfThePlanBefore) {
  Scheduler scheduler(16, 4, 8, 64, /*lookahead=*/true);
  scheduler.add_group(Tokens{5, 9}, 3, 4, Tokens{70, 71, 72}, Tokens{6});
  EXPECT_FALSE(scheduler.schedule().decode_only);
  StepPlan plan = scheduler.schedule();
  scheduler.check();
  EXPECT_TRUE(plan.decode_only);
  EXPECT_EQ(plan.tokens, (Tokens{-1, -2, -3}));
  EXPECT_EQ(plan.positions, (Tokens{2, 2, 2}));
  EXPECT_EQ(plan.kv_len, (std::vector<int32_t>{3, 3, 3}));
  EXPECT_EQ(plan.sample_seq, (Tokens{0, 1, 2}));
  EXPECT_EQ(plan.sample_position, (Tokens{3, 3, 3}));
  EXPECT_EQ(plan.page_copies.size(), 4u);
  EXPECT_EQ(scheduler.num_free_pages(), 13);
  EXPECT_EQ(scheduler.commit(Tokens{3, 6, 4}), Tokens{1});  // its row of the open plan is dropped
  scheduler.check();
  EXPECT_EQ(scheduler.num_free_pages(), 14);
  plan = scheduler.schedule();
  EXPECT_EQ(plan.tokens, (Tokens{-1, -3}));  // the first and the third sample of the plan before
  EXPECT_EQ(plan.sample_seq, (Tokens{0, 2}));
  EXPECT_EQ(message_of<std::invalid_argument>([&] { scheduler.commit(Tokens{7, 7}); }),
            "commit: tokens must hold one token for each of the plan's 3 samples, got 2");
  EXPECT_TRUE(scheduler.commit(Tokens{7, -1, 8}).empty());
  EXPECT_EQ(scheduler.commit(Tokens{6, 9}), Tokens{0});
  EXPECT_EQ(scheduler.schedule().tokens, Tokens{9});  // known by now
  EXPECT_EQ(scheduler.commit(Tokens{1}), Tokens{2});  // its last token: nothing ahead of it
  EXPECT_FALSE(scheduler.has_work());
  EXPECT_FALSE(scheduler.step_open());
  EXPECT_EQ(scheduler.sequence(0).response(), (Tokens{3, 7, 6}));
  EXPECT_EQ(scheduler.sequence(1).response(), (Tokens{6}));
  EXPECT_EQ(scheduler.sequence(2).response(), (Tokens{4, 8, 9, 1}));
  EXPECT_EQ(scheduler.totals().tokens.decode, 5);
  EXPECT_EQ(scheduler.totals().dropped_tokens, 1);
  EXPECT_EQ(scheduler.num_free_pages(), 16);
}

TEST(Scheduler, AheadAFullResponseIsNotPlannedOnAndItsPagesServeTheNext) {
  Scheduler scheduler(1, 4, 4, 4, /*lookahead=*/true);
  scheduler.add_group(Tokens{1, 2}, 1, 2, Tokens{1}, Tokens{});
  scheduler.add_group(Tokens{3, 4}, 1, 2, Tokens{2}, Tokens{});
  scheduler.schedule();
  EXPECT_EQ(scheduler.schedule().tokens, Tokens{-1});  // its second token is its last
  scheduler.check();
  EXPECT_EQ(scheduler.num_free_pages(), 1);
  EXPECT_TRUE(scheduler.commit(Tokens{7}).empty());
  EXPECT_EQ(scheduler.schedule().tokens, (Tokens{3, 4}));
  EXPECT_EQ(scheduler.commit(Tokens{8}), Tokens{0});
  EXPECT_STREQ(finish_name(scheduler.sequence(0).finish()), "length");
}

TEST(Scheduler, AheadThereIsOnePlanInFlightAndItsRowsOfStoppedResponsesAreDropped) {
  Scheduler scheduler(16, 4, 8, 64, /*lookahead=*/true);
  scheduler.add_group(Tokens{5, 9}, 1, 4, Tokens{70}, Tokens{6});
  scheduler.schedule();
  scheduler.schedule();
  EXPECT_THROW(scheduler.schedule(), std::logic_error);
  EXPECT_EQ(scheduler.commit(Tokens{6}), Tokens{0});
  EXPECT_FALSE(scheduler.has_work());
  EXPECT_TRUE(scheduler.commit(Tokens{3}).empty());
  EXPECT_EQ(scheduler.sequence(0).response(), Tokens{6});
  EXPECT_EQ(scheduler.totals().dropped_tokens, 1);
  scheduler.check();
}

TEST(Scheduler, AheadAPreemptedResponseMayTurnOutToHaveStopped) {
  // The prompt's token and three of each response fill both pages; the next token needs a third.
  Scheduler scheduler(2, 4, 2, 8, /*lookahead=*/true);
  scheduler.add_group(Tokens{1}, 2, 7, Tokens{1, 2}, Tokens{9});
  StepPlan plan = scheduler.schedule();
  while (plan.preemptions == 0) {
    plan = scheduler.schedule();
    if (plan.preemptions == 0) scheduler.commit(Tokens(2, 5));
  }
  EXPECT_EQ(plan.tokens, Tokens{-1});
  EXPECT_EQ(scheduler.num_waiting(), 1);
  scheduler.check();
  EXPECT_EQ(scheduler.commit(Tokens{5, 9}), Tokens{1});  // sampled before it was preempted
  scheduler.check();
  EXPECT_EQ(scheduler.num_waiting(), 0);
  EXPECT_EQ(scheduler.sequence(1).response(), (Tokens{5, 5, 5, 9}));
  EXPECT_EQ(scheduler.totals().dropped_tokens, 0);
}

// ---- random operations ------------------------------------------------------------------------

TEST(Scheduler, TenThousandRandomOperationsKeepEveryInvariant) {
  std::mt19937_64 random(20260923);
  const auto pick = [&](int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(random); };
  int64_t operations = 0, preemptions = 0, shared = 0, copies = 0, finished = 0, dropped = 0;
  for (int round = 0; operations < 10000; ++round) {
    const int64_t page_size = pick(1, 6), max_running = pick(1, 12);
    const int64_t num_pages = pick(4, 40), max_step_tokens = pick(max_running, max_running + 30);
    SCOPED_TRACE("round " + std::to_string(round));
    Engine engine(num_pages, page_size, max_running, max_step_tokens, round % 2 == 1);
    Scheduler& scheduler = engine.scheduler;
    for (int i = 0; i < 250; ++i, ++operations) {
      const int64_t what = pick(0, 99);
      if (what < 12) {
        const int64_t room = std::min<int64_t>(num_pages * page_size, 60);
        const int64_t prompt_length = pick(1, room - 1);
        Group group = group_of(prompt_length, pick(1, std::min<int64_t>(max_running, 5)),
                               pick(1, std::min<int64_t>(room - prompt_length, 24)), pick(0, 1 << 20));
        if (pick(0, 1)) group.stop_ids = {pick(0, 22), pick(0, 22)};
        engine.add(group);
      } else if (engine.can_schedule() && (what % 4 != 0 || !scheduler.step_open())) {
        engine.schedule();
      } else if (scheduler.step_open()) {
        finished += engine.commit().size();
      }
      scheduler.check();
      if (HasFailure()) return;
    }
    engine.finish();
    if (HasFailure()) return;
    dropped += scheduler.totals().dropped_tokens;
    preemptions += scheduler.totals().preemptions;
    shared += scheduler.totals().shared_page_hits;
    copies += scheduler.totals().page_copies;
  }
  // The walk must have been where it is interesting.
  EXPECT_GT(preemptions, 300);
  EXPECT_GT(shared, 300);
  EXPECT_GT(copies, 100);
  EXPECT_GT(finished, 300);
  EXPECT_GT(dropped, 100);
}

}  // namespace
}  // namespace grpo_engine
