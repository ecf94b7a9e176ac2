#include "rollout/scheduler.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>

namespace grpo_engine {
namespace {

// A waiting entry is admitted only if, besides its own pages, enough stay free for everybody to
// write this many tokens more: admitting into a full pool only buys a preemption. In simulated
// rollouts (512 responses of 60 or 300 tokens on average, scarce pools of 200 to 2000 pages), 16
// leaves at most 60 % of the recomputed tokens that 0 has, for at most 13 % more steps; 64 takes up
// to 73 % more steps.
constexpr int64_t kLookaheadTokens = 16;

std::string text(int64_t value) { return std::to_string(value); }
std::string text(const char* words) { return words; }
std::string text(const Sequence& sequence) {
  return "sequence " + text(sequence.id()) + " (group " + text(sequence.request().id) + ", response " +
         text(sequence.index()) + ")";
}

int64_t at_least(int64_t minimum, int64_t value, const char* name) {
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  if (value < minimum || value > kMax) {
    throw std::invalid_argument("Scheduler: " + std::string(name) + " must be in [" + text(minimum) + ", " + text(kMax) +
                                "], got " + text(value));
  }
  return value;
}

// Throws a std::logic_error whose sentence is put together only then.
template <typename... Parts>
void require(bool ok, const Parts&... parts) {
  if (!ok) throw std::logic_error("Scheduler: " + (text(parts) + ...));
}

}  // namespace

Scheduler::Scheduler(int64_t num_pages, int64_t page_size, int64_t max_running, int64_t max_step_tokens, bool lookahead)
    : allocator_(static_cast<int32_t>(at_least(1, num_pages, "num_pages"))),
      page_size_(static_cast<int32_t>(at_least(1, page_size, "page_size"))),
      max_running_(at_least(1, max_running, "max_running")),
      max_step_tokens_(at_least(1, max_step_tokens, "max_step_tokens")),
      max_open_(lookahead ? 2 : 1) {
  if (max_step_tokens < max_running) {
    throw std::invalid_argument("Scheduler: max_step_tokens must be at least max_running = " + text(max_running) +
                                ", so that every running sequence gets a token in every step, got " + text(max_step_tokens));
  }
  open_.reserve(max_open_);
}

// ---- requests -------------------------------------------------------------------------------

int64_t Scheduler::add_group(std::span<const int64_t> prompt, int64_t group_size, int64_t max_new_tokens,
                             std::span<const int64_t> seeds, std::span<const int64_t> stop_ids) {
  const auto refuse = [](const std::string& message) { throw std::invalid_argument("add_group: " + message); };
  if (prompt.empty()) refuse("prompt must hold at least one token, got none");
  const auto negative = std::find_if(prompt.begin(), prompt.end(), [](int64_t t) { return t < 0; });
  if (negative != prompt.end()) {
    refuse("prompt must hold token ids >= 0, got " + text(*negative) + " at position " + text(negative - prompt.begin()));
  }
  if (group_size < 1) refuse("group_size must be at least 1, got " + text(group_size));
  if (group_size > max_running_) {
    refuse("group_size must be at most max_running = " + text(max_running_) +
           ", as the responses of a group start together, got " + text(group_size));
  }
  if (static_cast<int64_t>(seeds.size()) != group_size) {
    refuse("seeds must hold one seed for each of the " + text(group_size) + " responses, got " +
           text(static_cast<int64_t>(seeds.size())));
  }
  if (max_new_tokens < 1) refuse("max_new_tokens must be at least 1, got " + text(max_new_tokens));
  constexpr int64_t kMaxLength = std::numeric_limits<int32_t>::max();  // of kv_len, an int32
  const auto prompt_length = static_cast<int64_t>(prompt.size());
  if (max_new_tokens > kMaxLength - prompt_length) {
    refuse("prompt and response must be at most " + text(kMaxLength) + " tokens long, got " + text(prompt_length) +
           " and max_new_tokens = " + text(max_new_tokens));
  }
  if (pages_for(prompt_length + max_new_tokens) > num_pages()) {
    refuse("one sequence must fit into num_pages = " + text(num_pages()) + " pages of " + text(page_size_) +
           " tokens, got a prompt of " + text(prompt_length) + " tokens and max_new_tokens = " + text(max_new_tokens) +
           ", which take " + text(pages_for(prompt_length + max_new_tokens)) + " pages");
  }

  const int64_t id = next_id_;
  auto request = std::make_shared<const Request>(Request{.id = id,
                                                         .prompt = {prompt.begin(), prompt.end()},
                                                         .seeds = {seeds.begin(), seeds.end()},
                                                         .stop_ids = {stop_ids.begin(), stop_ids.end()},
                                                         .max_new_tokens = max_new_tokens});
  // Built aside and then merged in, which moves a node and cannot fail.
  std::map<int64_t, std::vector<Sequence>> new_groups;
  auto& sequences = new_groups[id];
  sequences.reserve(group_size);
  for (int64_t g = 0; g < group_size; ++g) sequences.emplace_back(request, g, page_size_);
  waiting_.insert(waiting_.begin(), {sequences.data(), group_size});
  groups_.merge(new_groups);
  next_id_ += group_size;
  return id;
}

const Sequence& Scheduler::sequence(int64_t id) const {
  auto next = groups_.upper_bound(id);
  if (next != groups_.begin()) {
    const auto& [first, sequences] = *std::prev(next);
    if (id - first < static_cast<int64_t>(sequences.size())) return sequences[id - first];
  }
  throw std::invalid_argument("Scheduler: no sequence has id " + text(id) + ", it was never given out");
}

// ---- schedule -------------------------------------------------------------------------------

StepPlan Scheduler::schedule() {
  require(open_.size() < max_open_, "schedule() was called twice; commit() the tokens of the first plan");
  require(has_work(), "schedule() without work; call has_work() first");
  StepPlan plan;
  Step step;
  reserve_step(plan, step);

  // From here on nothing allocates memory, so nothing fails.
  plan.preemptions = preempt_for_pages();
  int64_t budget = max_step_tokens_;
  for (const Entry& entry : running_) {
    prepare_pages(*entry.leader, plan);
    // Only the youngest entry can have more than one token pending, and max_step_tokens >=
    // max_running leaves it at least one.
    budget -= add_work(entry, budget, step);
  }
  if (plan.preemptions == 0) admit(budget, step);  // reserve_step() counts on that
  write_plan(step, plan);
  begin(std::move(step));
  return plan;
}

// Reserves the most that the step can need: all that runs and all that could be admitted.
void Scheduler::reserve_step(StepPlan& plan, Step& step) {
  size_t entries = 0;
  int64_t sequences = 0, tokens = 0, width = 0;
  const auto count_in = [&](const Entry& entry) {
    entries += 1;
    sequences += entry.size;
    tokens += entry.leader->pending();
    width = std::max(width, pages_for(entry.leader->length()));
  };
  for (const Entry& entry : running_) count_in(entry);
  for (auto e = waiting_.rbegin(); e != waiting_.rend() && sequences + e->size <= max_running_; ++e) count_in(*e);
  running_.reserve(sequences);
  waiting_.reserve(waiting_.size() + running_.size());
  tokens = std::min(tokens, max_step_tokens_);
  step.work.reserve(entries);
  step.samples.reserve(sequences);
  for (auto* v : {&plan.tokens, &plan.positions, &plan.slots}) v->reserve(tokens);
  for (auto* v : {&plan.sample_row, &plan.sample_seq, &plan.sample_seed, &plan.sample_position}) {
    v->reserve(sequences);
  }
  plan.cu_query.reserve(entries + 1);
  plan.kv_len.reserve(entries);
  plan.page_table.reserve(entries * width);
  plan.page_copies.reserve(2 * running_.size());
}

// True when the next token has no page of its sequence's own to go to.
bool Scheduler::needs_page(const Sequence& sequence) const {
  const auto index = static_cast<size_t>(sequence.computed() / page_size_);
  return index == sequence.pages().size() || allocator_.refs(sequence.pages()[index]) > 1;
}

// Pages that the running sequences need for their next tokens.
int64_t Scheduler::decode_pages() const {
  int64_t count = 0;
  int32_t last_shared = -1;
  for (const Entry& entry : running_) {
    const Sequence& sequence = *entry.leader;
    if (!needs_page(sequence)) continue;
    ++count;
    // The holders of a shared page that is about to be written are siblings, side by side, and all
    // but one of them take a copy.
    const auto index = static_cast<size_t>(sequence.computed() / page_size_);
    if (index == sequence.pages().size()) continue;
    if (sequence.pages()[index] != last_shared) --count;
    last_shared = sequence.pages()[index];
  }
  return count;
}

// Preempts from the youngest on until the others have the pages for their next tokens.
int64_t Scheduler::preempt_for_pages() {
  int64_t preemptions = 0;
  for (; decode_pages() > allocator_.num_free(); ++preemptions) {
    require(running_.size() > 1, "the only running sequence finds no page, although its request was found to fit");
    running_.back().leader->release_pages(allocator_);
    waiting_.push_back(running_.back());
    running_.pop_back();
    ++totals_.preemptions;
  }
  return preemptions;
}

// Gives a running sequence the page that its next token is written to.
void Scheduler::prepare_pages(Sequence& sequence, StepPlan& plan) {
  if (!needs_page(sequence)) return;
  const auto index = static_cast<size_t>(sequence.computed() / page_size_);
  const int32_t page = allocator_.acquire().value();
  if (index == sequence.pages().size()) {
    sequence.add_page(page);
  } else {
    plan.page_copies.push_back(sequence.pages()[index]);
    plan.page_copies.push_back(page);
    ++totals_.page_copies;
    sequence.replace_page(index, page, allocator_);
  }
}

// Pages that the responses of an admitted entry will need within kLookaheadTokens tokens.
int64_t Scheduler::growth(const Entry& entry) const {
  const Sequence& sequence = *entry.leader;
  const Request& request = sequence.request();
  // The last token of a response is sampled but never computed.
  const int64_t last = request.prompt_length() + request.max_new_tokens - 1;
  const int64_t soon = pages_for(std::min(sequence.length() + kLookaheadTokens, last));
  const int64_t own = soon - pages_for(sequence.length());
  const bool copies_end = sequence.length() % page_size_ != 0 && sequence.length() < last;
  return entry.size * own + (copies_end ? entry.size - 1 : 0);
}

// The sibling that holds most of this sequence's full prompt pages, and how many tokens those are.
std::pair<const Sequence*, int64_t> Scheduler::shared_prefix(const Sequence& sequence) const {
  const Request& request = sequence.request();
  const Sequence* donor = nullptr;
  int64_t tokens = 0;
  // The siblings of the oldest waiting sequence are the youngest that run.
  for (auto e = running_.rbegin(); e != running_.rend() && &e->leader->request() == &request; ++e) {
    const int64_t there = std::min(e->leader->computed(), request.prompt_length());
    const int64_t whole = there / page_size_ * page_size_;
    if (whole > 0 && whole >= tokens) {
      donor = e->leader;
      tokens = whole;
    }
  }
  return {donor, tokens};
}

// Takes what the budget holds of a sequence's pending tokens into the step; returns how many.
int64_t Scheduler::add_work(const Entry& entry, int64_t budget, Step& step) {
  Sequence& sequence = *entry.leader;
  const int64_t count = std::min(sequence.pending(), budget);
  const int64_t samples = count == sequence.pending() ? entry.size : 0;
  step.work.push_back({&sequence, sequence.computed(), count, samples});
  // siblings lie side by side in groups_
  for (int64_t g = 0; g < samples; ++g) step.samples.push_back(&sequence + g);
  return count;
}

// Admits waiting entries in order; the first that does not fit ends it, so none is overtaken.
void Scheduler::admit(int64_t budget, Step& step) {
  int64_t set_aside = 0;  // pages that must stay free for those who run
  for (const Entry& entry : running_) set_aside += growth(entry);
  while (!waiting_.empty() && budget > 0) {
    const Entry entry = waiting_.back();
    Sequence& sequence = *entry.leader;
    if (num_running() + entry.size > max_running_) return;
    // Only computed pages are shared: what siblings write in this very step does not count.
    const auto [donor, shared_tokens] = shared_prefix(sequence);
    const int64_t pages = pages_for(sequence.length()) - shared_tokens / page_size_;
    const int64_t wanted = running_.empty() ? pages : pages + set_aside + growth(entry);
    if (wanted > allocator_.num_free()) return;

    set_aside += growth(entry);
    waiting_.pop_back();
    running_.push_back(entry);
    if (donor != nullptr) {
      sequence.share_prefix(*donor, shared_tokens, allocator_);
      totals_.shared_page_hits += shared_tokens / page_size_;
    }
    for (int64_t i = 0; i < pages; ++i) sequence.add_page(allocator_.acquire().value());
    budget -= add_work(entry, budget, step);
  }
}

void Scheduler::write_plan(const Step& step, StepPlan& plan) const {
  for (const Work& work : step.work) {
    plan.page_table_width = std::max(plan.page_table_width, static_cast<int64_t>(work.sequence->pages().size()));
  }
  // Expected tokens are sampled by the plan before, and both plans are in the order of ids.
  size_t sample = 0;
  const auto token = [&](const Sequence& sequence, int64_t position) {
    if (position < sequence.known()) return sequence.token(position);
    const auto& before = open_.back().samples;
    while (before.at(sample) != &sequence) ++sample;
    return -1 - static_cast<int64_t>(sample);
  };
  plan.decode_only = step.work.size() == step.samples.size();
  plan.cu_query.push_back(0);
  for (const Work& work : step.work) {
    const Sequence& sequence = *work.sequence;
    const int64_t end = work.begin + work.count;
    for (int64_t position = work.begin; position < end; ++position) {
      plan.tokens.push_back(token(sequence, position));
      plan.positions.push_back(position);
      plan.slots.push_back(sequence.slot(position));
    }
    plan.cu_query.push_back(static_cast<int32_t>(plan.tokens.size()));
    plan.kv_len.push_back(static_cast<int32_t>(end));
    plan.page_table.insert(plan.page_table.end(), sequence.pages().begin(), sequence.pages().end());
    plan.page_table.resize(plan.kv_len.size() * plan.page_table_width, -1);
    plan.counts += sequence.classify(work.begin, work.count);
    plan.decode_only = plan.decode_only && work.count == 1 && work.samples == 1;
    for (int64_t g = 0; g < work.samples; ++g) {
      plan.sample_row.push_back(static_cast<int64_t>(plan.tokens.size()) - 1);
      plan.sample_seq.push_back(sequence.id() + g);
      plan.sample_seed.push_back(sequence.request().seeds[sequence.index() + g]);
      plan.sample_position.push_back(end);
    }
  }
}

// The state after the step, but for what its tokens are: its work is done, and its responses are one
// token longer.
void Scheduler::begin(Step&& step) {
  for (const Work& work : step.work) work.sequence->advance(work.count);
  for (Sequence* sequence : step.samples) sequence->expect();
  // The responses that a computed prompt starts: all but the first have no pages yet.
  for (Sequence* sequence : step.samples) {
    if (!sequence->pages().empty()) continue;
    const int64_t prompt_length = sequence->request().prompt_length();
    sequence->share_prefix(*(sequence - sequence->index()), prompt_length, allocator_);
    totals_.shared_page_hits += prompt_length / page_size_;
  }
  for (size_t i = running_.size(); i-- > 0;) {
    const Entry group = running_[i];
    if (group.size == 1 || !group.leader->begun()) continue;
    running_.insert(running_.begin() + i, group.size - 1, {});
    for (int64_t g = 0; g < group.size; ++g) running_[i + g] = {group.leader + g, 1};
  }
  for (Sequence* sequence : step.samples) {
    if (sequence->complete()) sequence->release_pages(allocator_);
  }
  std::erase_if(running_, [](const Entry& entry) { return entry.leader->complete(); });
  open_.push_back(std::move(step));
}

// ---- commit ---------------------------------------------------------------------------------

std::vector<int64_t> Scheduler::commit(std::span<const int64_t> tokens) {
  require(step_open(), "commit() without schedule(); each plan is committed once");
  const auto& [work_done, samples] = open_.front();
  if (tokens.size() != samples.size()) {
    throw std::invalid_argument("commit: tokens must hold one token for each of the plan's " +
                                text(static_cast<int64_t>(samples.size())) + " samples, got " +
                                text(static_cast<int64_t>(tokens.size())));
  }
  for (size_t s = 0; s < tokens.size(); ++s) {
    if (tokens[s] < 0 && !samples[s]->finished()) {
      throw std::invalid_argument("commit: tokens must be >= 0, got " + text(tokens[s]) + " for " + text(*samples[s]) +
                                  " at position " + text(samples[s]->known()) +
                                  ": its logits held nothing to sample from (NaN, or every token excluded)");
    }
  }
  std::vector<int64_t> finished;
  finished.reserve(samples.size());
  for (Sequence* sequence : samples) sequence->reserve_token();

  // From here on nothing allocates memory, so nothing fails.
  for (const Work& work : work_done) count(work);
  for (size_t s = 0; s < tokens.size(); ++s) {
    Sequence& sequence = *samples[s];
    if (sequence.finished()) continue;  // by the step before, when this one was planned already
    sequence.append(tokens[s]);
    if (!sequence.finished()) continue;
    sequence.release_pages(allocator_);
    finished.push_back(sequence.id());
  }
  if (!finished.empty()) {
    for (Queue* queue : {&running_, &waiting_}) {
      std::erase_if(*queue, [](const Entry& entry) { return entry.leader->finished(); });
    }
  }
  ++totals_.steps;
  open_.erase(open_.begin());
  return finished;
}

void Scheduler::count(const Work& work) {
  if (work.sequence->finished()) {
    totals_.dropped_tokens += work.count;
    return;
  }
  // each token sees itself and all before it
  const auto pairs = [](int64_t begin, int64_t end) { return (end * (end + 1) - begin * (begin + 1)) / 2; };
  const TokenCounts counts = work.sequence->settle(work.begin, work.count);
  const int64_t end = work.begin + work.count, first_decoded = end - counts.decode;
  totals_.tokens += counts;
  totals_.prefill_pairs += pairs(work.begin, first_decoded);
  totals_.decode_pairs += pairs(first_decoded, end);
  (counts.decode > 0 ? totals_.decode_samples : totals_.prefill_samples) += work.samples;
}

// ---- check ----------------------------------------------------------------------------------

void Scheduler::check() const {
  allocator_.check();
  check_queues();
  check_pages();
}

void Scheduler::check_queues() const {
  require(num_running() <= max_running_, "more run than max_running");
  std::set<const Sequence*> queued;
  int64_t next = 0;
  const auto walk = [&](const Entry& entry) {
    const Sequence& leader = *entry.leader;
    require(leader.id() >= next, leader, " was overtaken, or is queued twice");
    next = leader.id() + entry.size;
    require(entry.size == (leader.begun() ? 1 : leader.request().group_size()), leader, " leads ", entry.size, " responses");
    for (int64_t g = 0; g < entry.size; ++g) queued.insert(&leader + g);
  };
  std::for_each(running_.begin(), running_.end(), walk);
  std::for_each(waiting_.rbegin(), waiting_.rend(), walk);
  for (const auto& [id, sequences] : groups_) {
    const Request& request = sequences.front().request();
    require(request.id == id && request.group_size() == static_cast<int64_t>(sequences.size()), "group ", id,
            " does not hold its responses");
    for (const Sequence& sequence : sequences) {
      const bool goes_on = !sequence.finished() && !sequence.complete();
      require(queued.erase(&sequence) == goes_on, sequence, goes_on ? " is in no queue" : " is in a queue");
      require(sequences.front().begun() == sequence.begun(), sequence, " began apart from its group");
    }
  }
  require(queued.empty(), "a queue holds a forgotten sequence");
}

void Scheduler::check_pages() const {
  struct Holder {
    int64_t group;
    size_t index;
    int64_t count;
  };
  std::set<const Sequence*> leaders;
  for (const Entry& entry : running_) leaders.insert(entry.leader);
  std::map<int32_t, Holder> holders;
  for (const auto& [id, sequences] : groups_) {
    for (const Sequence& sequence : sequences) {
      const auto& pages = sequence.pages();
      const auto held = static_cast<int64_t>(pages.size());
      const bool leads = leaders.contains(&sequence);
      require(leads || (held == 0 && sequence.computed() == 0), sequence, " holds pages but is not running");
      if (!leads) continue;
      require(sequence.computed() < sequence.length(), sequence, " has nothing left to compute");
      require(held >= pages_for(sequence.computed()) && held <= pages_for(sequence.length()), sequence, " has computed ",
              sequence.computed(), " of ", sequence.length(), " tokens and holds ", held, " pages");
      require(running_.back().leader == &sequence || sequence.pending() == 1, sequence, " is not the youngest and has ",
              sequence.pending(), " tokens pending");
      for (size_t i = 0; i < pages.size(); ++i) {
        Holder& holder = holders.try_emplace(pages[i], Holder{id, i, 0}).first->second;
        ++holder.count;
        require(holder.group == id && holder.index == i, sequence, " holds page ", pages[i], ", which holds other tokens");
        const int64_t filled = std::min(sequence.computed(), static_cast<int64_t>(i + 1) * page_size_);
        require(allocator_.refs(pages[i]) == 1 || filled <= sequence.request().prompt_length(), sequence, " shares page ",
                pages[i], ", which holds response tokens");
      }
    }
  }
  int64_t in_use = 0;
  for (const auto& [page, holder] : holders) {
    ++in_use;
    require(allocator_.refs(page) == holder.count, "page ", page, " has refs ", allocator_.refs(page), " and ", holder.count,
            " holders");
  }
  require(in_use + allocator_.num_free() == num_pages(), num_pages() - in_use - allocator_.num_free(), " pages are lost");
}

}  // namespace grpo_engine
