#include "tasks/micro_corpus.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <stdexcept>
#include <utility>

namespace grpo_engine {
namespace {

// The first four bytes, little endian, of BLAKE2b (RFC 7693) with a digest of four bytes, of a
// message that fits into one block.
uint32_t blake2b_4(std::string_view message) {
  constexpr size_t kBlock = 128;
  constexpr uint64_t kIv[8] = {0x6a09e667f3bcc908, 0xbb67ae8584caa73b, 0x3c6ef372fe94f82b, 0xa54ff53a5f1d36f1,
                               0x510e527fade682d1, 0x9b05688c2b3e6c1f, 0x1f83d9abfb41bd6b, 0x5be0cd19137e2179};
  constexpr uint8_t kSigma[10][16] = {
      {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
      {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4}, {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
      {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13}, {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
      {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11}, {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
      {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5}, {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0}};
  if (message.size() > kBlock) {
    throw std::invalid_argument("is_test: a key must be at most 128 bytes long, got " + std::to_string(message.size()));
  }
  uint64_t m[16] = {};
  static_assert(std::endian::native == std::endian::little);
  std::memcpy(m, message.data(), message.size());
  const uint64_t h0 = kIv[0] ^ 0x01010000 ^ 4;
  uint64_t v[16];
  std::copy(kIv, kIv + 8, v);
  std::copy(kIv, kIv + 8, v + 8);
  v[0] = h0;
  v[12] ^= message.size();
  v[14] = ~v[14];  // the last block
  const auto mix = [&](int a, int b, int c, int d, uint64_t x, uint64_t y) {
    v[a] += v[b] + x;
    v[d] = std::rotr(v[d] ^ v[a], 32);
    v[c] += v[d];
    v[b] = std::rotr(v[b] ^ v[c], 24);
    v[a] += v[b] + y;
    v[d] = std::rotr(v[d] ^ v[a], 16);
    v[c] += v[d];
    v[b] = std::rotr(v[b] ^ v[c], 63);
  };
  for (int round = 0; round < 12; ++round) {
    const uint8_t* s = kSigma[round % 10];
    for (int i = 0; i < 4; ++i) mix(i, 4 + i, 8 + i, 12 + i, m[s[2 * i]], m[s[2 * i + 1]]);
    for (int i = 0; i < 4; ++i) {
      mix(i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4, m[s[8 + 2 * i]], m[s[9 + 2 * i]]);
    }
  }
  return static_cast<uint32_t>(h0 ^ v[0] ^ v[8]);
}

// A sum of two terms: every corpus may hold it, and no test does.
bool is_fact(std::string_view key) { return std::count(key.begin(), key.end(), ' ') == 2 && key.back() == '='; }

}  // namespace

// ---- PythonRandom ---------------------------------------------------------------------------

PythonRandom::PythonRandom(const std::vector<uint32_t>& state) {
  if (state.size() != kWords + 1 || state.back() > kWords) {
    throw std::invalid_argument("PythonRandom: state must be random.Random's getstate()[1]");
  }
  std::copy(state.begin(), state.end() - 1, state_.begin());
  index_ = state.back();
}

uint32_t PythonRandom::next() {
  if (index_ == kWords) {
    constexpr size_t kMiddle = 397;
    for (size_t i = 0; i < kWords; ++i) {
      const uint32_t y = (state_[i] & 0x80000000u) | (state_[(i + 1) % kWords] & 0x7fffffffu);
      state_[i] = state_[(i + kMiddle) % kWords] ^ (y >> 1) ^ ((y & 1) ? 0x9908b0dfu : 0u);
    }
    index_ = 0;
  }
  uint32_t y = state_[index_++];
  y ^= y >> 11;
  y ^= (y << 7) & 0x9d2c5680u;
  y ^= (y << 15) & 0xefc60000u;
  return y ^ (y >> 18);
}

double PythonRandom::random() {
  const uint32_t a = next() >> 5, b = next() >> 6;
  return (a * 67108864.0 + b) * (1.0 / 9007199254740992.0);
}

uint32_t PythonRandom::below(uint32_t n) {
  const int shift = std::countl_zero(n);
  uint32_t value;
  do {
    value = next() >> shift;
  } while (value >= n);
  return value;
}

// ---- MicroSource ----------------------------------------------------------------------------

MicroSource::MicroSource(MicroTasks tasks, const std::vector<uint32_t>& state) : tasks_(std::move(tasks)), random_(state) {
  first_number_ = id("0");
  functions_ = ids(tasks_.functions);
  letters_ = ids(tasks_.letters);
  people_ = ids(tasks_.people);
  equals_ = id("=");
  question_ = id("?");
  colon_ = id(":");
  semicolon_ = id(";");
  comma_ = id(",");
  above_ = id(">");
  has_ = id("has");
  now_ = id("now");
  top_ = id("top");
  low_ = id("low");
}

TokenId MicroSource::id(std::string_view word) const {
  const auto found = std::find(tasks_.vocabulary.begin(), tasks_.vocabulary.end(), word);
  if (found == tasks_.vocabulary.end()) {
    throw std::invalid_argument("MicroSource: the vocabulary lacks " + std::string(word));
  }
  return found - tasks_.vocabulary.begin();
}

std::vector<TokenId> MicroSource::ids(const std::vector<std::string>& words) const {
  std::vector<TokenId> out;
  for (const std::string& word : words) out.push_back(id(word));
  return out;
}

std::string MicroSource::text(const std::vector<TokenId>& ids) const {
  std::string out;
  for (const TokenId i : ids) {
    if (!out.empty()) out += ' ';
    out += tasks_.vocabulary[i];
  }
  return out;
}

int64_t MicroSource::clamp(int64_t value) const { return std::clamp<int64_t>(value, 0, tasks_.limit - 1); }

bool MicroSource::is_test(std::string_view key) const { return blake2b_4(key) < tasks_.test_share * 4294967296.0; }

std::string MicroSource::key_of(const std::vector<TokenId>& prompt) const {
  if (std::find(people_.begin(), people_.end(), prompt.front()) == people_.end()) return text(prompt);
  std::vector<TokenId> sum(prompt.begin() + 2, prompt.end() - 2);  // "ann has ... now ?"
  sum.push_back(equals_);
  return text(sum);
}

MicroItem MicroSource::item(Domain domain, int64_t grade) {
  switch (domain) {
    case Domain::code: return code(grade);
    case Domain::logic: return logic(grade);
    default: return sum(domain, grade);
  }
}

MicroItem MicroSource::sum(Domain domain, int64_t terms) {
  const int64_t operand = tasks_.operand;
  const TokenId plus = first_number_ + tasks_.limit - 1;  // "+k" is plus + k, "-k" is minus + k
  const TokenId minus = plus + operand;
  MicroItem out{.domain = domain};
  auto value = static_cast<int64_t>(random_.random() * static_cast<double>(tasks_.limit));
  out.operands.push_back(value);
  std::vector<TokenId> words{number(value)};
  for (int64_t term = 1; term < terms; ++term) {
    int64_t k = static_cast<int64_t>(random_.random() * 2 * static_cast<double>(operand)) - operand;
    k += k >= 0;  // no zero
    value = clamp(value + k);
    out.operands.push_back(k);
    words.push_back(k > 0 ? plus + k : minus - k);
    out.values.push_back(number(value));
  }
  words.push_back(equals_);
  out.key = text(words);
  if (domain == Domain::word) {
    words.pop_back();
    words.insert(words.begin(), {random_.choice(people_), has_});
    words.insert(words.end(), {now_, question_});
  }
  out.prompt = std::move(words);
  return out;
}

MicroItem MicroSource::code(int64_t length) {
  std::vector<int64_t> values;
  for (int64_t i = 0; i < length; ++i) {
    values.push_back(random_.below(static_cast<uint32_t>(tasks_.limit)));
  }
  const uint32_t function = random_.below(static_cast<uint32_t>(functions_.size()));
  const int64_t answers[] = {values[0], values[1], values.back(), *std::max_element(values.begin(), values.end()),
                             *std::min_element(values.begin(), values.end())};
  MicroItem out{.domain = Domain::code};
  out.prompt.push_back(functions_[function]);
  for (const int64_t value : values) out.prompt.push_back(number(value));
  out.prompt.push_back(colon_);
  out.values.push_back(number(answers[function]));
  out.key = text(out.prompt);
  return out;
}

MicroItem MicroSource::logic(int64_t names) {
  // random.sample of so few: choose from a pool that closes its gaps with its last
  std::vector<TokenId> pool = letters_, order;
  for (int64_t i = 0; i < names; ++i) {
    const size_t left = pool.size() - static_cast<size_t>(i);
    const uint32_t j = random_.below(static_cast<uint32_t>(left));
    order.push_back(pool[j]);
    pool[j] = pool[left - 1];
  }
  std::vector<std::pair<TokenId, TokenId>> pairs;  // above, below
  for (size_t i = 1; i < order.size(); ++i) pairs.emplace_back(order[i - 1], order[i]);
  random_.shuffle(pairs);
  const bool top = random_.below(2) == 0;
  MicroItem out{.domain = Domain::logic};
  for (const auto& [a, b] : pairs) {
    if (!out.prompt.empty()) out.prompt.push_back(comma_);
    out.prompt.insert(out.prompt.end(), {a, above_, b});
  }
  out.prompt.insert(out.prompt.end(), {semicolon_, top ? top_ : low_, question_});
  out.values.push_back(top ? order.front() : order.back());
  out.key = text(out.prompt);
  return out;
}

// ---- MicroCorpus ----------------------------------------------------------------------------

MicroCorpus::MicroCorpus(MicroSource source, CorpusShares shares, std::unordered_set<std::string> held_out)
    : source_(std::move(source)), shares_(std::move(shares)), held_out_(std::move(held_out)) {
  double sum = 0.0;
  for (size_t i = 0; i < cumulative_.size(); ++i) cumulative_[i] = sum += shares_.domains[i];
  for (const std::string& letter : source_.tasks().letters) letters_.push_back(source_.id(letter));
  for (int64_t v = 0; v < source_.tasks().limit; ++v) numbers_.push_back(source_.number(v));
  eos_ = source_.id("<eos>");
  user_ = source_.id("<user>");
  assistant_ = source_.id("<assistant>");
}

MicroItem MicroCorpus::sample() {
  PythonRandom& random = source_.random();
  // random.choices with weights
  const double target = random.random() * cumulative_.back();
  const auto found = std::upper_bound(cumulative_.begin(), cumulative_.end() - 1, target);
  const auto domain = static_cast<Domain>(found - cumulative_.begin());
  const auto& grades = domain == Domain::code    ? shares_.list_lengths
                       : domain == Domain::logic ? shares_.name_counts
                                                 : shares_.sum_terms;
  while (true) {
    MicroItem item = source_.item(domain, random.choice(grades));
    if (!source_.is_test(item.key) || is_fact(item.key)) return item;
  }
}

// The answer as somebody wrote it down: direct or worked, with slips.
std::vector<TokenId> MicroCorpus::written(const MicroItem& item) {
  PythonRandom& random = source_.random();
  if (item.domain == Domain::code || item.domain == Domain::logic) {
    const bool wrong = random.random() < shares_.error;
    if (!wrong) return {item.values.back()};
    return {random.choice(item.domain == Domain::logic ? letters_ : numbers_)};
  }
  std::vector<TokenId> out;
  int64_t value = item.operands.front();
  for (size_t i = 1; i < item.operands.size(); ++i) {
    const bool wrong = random.random() < shares_.error;
    value = wrong ? random.below(static_cast<uint32_t>(source_.tasks().limit)) : source_.clamp(value + item.operands[i]);
    out.push_back(source_.number(value));
  }
  if (random.random() < shares_.direct) return {out.back()};
  return out;
}

// Reads the key back from the prompt, so that a leak cannot hide behind its own generator.
void MicroCorpus::check(const MicroItem& item) const {
  const std::string key = source_.key_of(item.prompt);
  if (held_out_.contains(key) || (source_.is_test(key) && !is_fact(key))) {
    throw std::runtime_error("corpus: problem '" + source_.text(item.prompt) +
                             "' is held out for testing and must not be trained on");
  }
}

MicroDocument MicroCorpus::document() {
  MicroItem item = sample();
  check(item);
  const std::vector<TokenId> answer = written(item);
  MicroDocument out;
  const bool chat = source_.random().random() < shares_.chat;
  if (chat) out.tokens.push_back(user_);
  out.tokens.insert(out.tokens.end(), item.prompt.begin(), item.prompt.end());
  if (chat) out.tokens.push_back(assistant_);
  out.prompt_length = static_cast<int64_t>(out.tokens.size());
  out.tokens.insert(out.tokens.end(), answer.begin(), answer.end());
  out.tokens.push_back(eos_);
  return out;
}

MicroBatch MicroCorpus::batch(int64_t documents, int64_t max_tokens) {
  MicroBatch out;
  out.cu_seqlens.push_back(0);
  for (int64_t n = 0; n < documents && out.cu_seqlens.back() < max_tokens; ++n) {
    const MicroDocument d = document();
    out.tokens.insert(out.tokens.end(), d.tokens.begin(), d.tokens.end() - 1);
    out.target.insert(out.target.end(), d.tokens.begin() + 1, d.tokens.end());
    out.weight.insert(out.weight.end(), d.prompt_length - 1, shares_.prompt_weight);
    out.weight.resize(out.tokens.size(), 1.0f);
    out.cu_seqlens.push_back(static_cast<int32_t>(out.tokens.size()));
  }
  return out;
}

}  // namespace grpo_engine
