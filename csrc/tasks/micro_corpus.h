// micro_corpus.h -- the embedded tasks: random problems, and the documents that models are pretrained on.
//
// grpo_engine/micro/facts.py explains the families and owns the vocabulary and every constant. This file owns how a
// problem is sampled. A corpus has two million tokens: to sample them word by word in Python takes longer than to train a
// small model on them.
//
// The random numbers are those of CPython's random.Random, by the same Mersenne Twister and the same methods. So the seed of
// a random.Random names a stream, and the tests compare with Python's own generator. Torch-free and Python-free.
#pragma once
#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_set>
#include <utility>
#include <vector>

namespace grpo_engine {

// random.Random, continued from its getstate()[1]: 624 words and the index of the next one.
class PythonRandom {
 public:
  static constexpr size_t kWords = 624;

  // Throws std::invalid_argument unless state holds 625 numbers, the last at most 624.
  explicit PythonRandom(const std::vector<uint32_t>& state);

  double random();  // in [0, 1), 53 bits
  uint32_t below(uint32_t n);  // randrange(n), n >= 1
  template <typename T>
  const T& choice(const std::vector<T>& values) {
    return values[below(static_cast<uint32_t>(values.size()))];
  }
  template <typename T>
  void shuffle(std::vector<T>& values) {
    for (size_t i = values.size(); i-- > 1;) {
      std::swap(values[i], values[below(static_cast<uint32_t>(i + 1))]);
    }
  }

 private:
  uint32_t next();

  std::array<uint32_t, kWords> state_;
  size_t index_;
};

using TokenId = int64_t;

struct MicroTasks {
  std::vector<std::string> vocabulary;  // the id of a word is its index
  std::vector<std::string> functions;  // first, second, last, max, min: in this order
  std::vector<std::string> letters;
  std::vector<std::string> people;
  int64_t limit;  // values lie in [0, limit)
  int64_t operand;  // operands in [1, operand]
  double test_share;  // of all keys that are tested on
};

enum class Domain : uint8_t { chain, word, code, logic };

// A problem. Example, a chain of 3 terms: prompt "7 +8 -3 =", values "15 12", key as the prompt.
struct MicroItem {
  Domain domain;
  std::vector<TokenId> prompt{};
  std::vector<int64_t> operands{};  // of a sum: its first value and what is added
  std::vector<TokenId> values{};  // worked answer; the last is the answer
  std::string key{};  // names the problem whatever its template
};

// Samples problems.
class MicroSource {
 public:
  // Throws std::invalid_argument for a word that the vocabulary lacks, or a bad state.
  MicroSource(MicroTasks tasks, const std::vector<uint32_t>& state);

  // grade: terms of a sum, length of a list, number of names.
  MicroItem item(Domain domain, int64_t grade);

  // Whether a key belongs to the test pool: its BLAKE2b hash is below test_share.
  bool is_test(std::string_view key) const;
  // The key of a problem, read back from its prompt's tokens alone.
  std::string key_of(const std::vector<TokenId>& prompt) const;

  TokenId id(std::string_view word) const;
  std::string text(const std::vector<TokenId>& ids) const;  // words joined by single spaces
  TokenId number(int64_t value) const { return first_number_ + value; }
  int64_t clamp(int64_t value) const;
  const MicroTasks& tasks() const { return tasks_; }
  PythonRandom& random() { return random_; }

 private:
  std::vector<TokenId> ids(const std::vector<std::string>& words) const;
  MicroItem sum(Domain domain, int64_t terms);
  MicroItem code(int64_t length);
  MicroItem logic(int64_t names);

  MicroTasks tasks_;
  PythonRandom random_;
  TokenId first_number_;
  std::vector<TokenId> functions_, letters_, people_;
  TokenId equals_, question_, colon_, semicolon_, comma_, above_, has_, now_, top_, low_;
};

struct CorpusShares {
  std::array<double, 4> domains;  // chain, word, code, logic
  double direct;  // sums answered without working
  double error;  // written values that are wrong
  double chat;  // documents that are a user's turn and its answer
  float prompt_weight;  // loss weight of a prompt token
  std::vector<int64_t> sum_terms, list_lengths, name_counts;
};

// Documents packed end to end. Each is without its last token, which is predicted and never read.
struct MicroBatch {
  std::vector<int64_t> tokens;  // [T]
  std::vector<int64_t> target;  // [T] the token after each
  std::vector<float> weight;  // [T] of each target
  std::vector<int32_t> cu_seqlens;  // [N+1]
};

// A problem and a written answer to it.
struct MicroDocument {
  std::vector<TokenId> tokens;
  int64_t prompt_length;  // chat tokens included
};

// An endless stream of documents. None holds a problem of the test pool or of `held_out`.
class MicroCorpus {
 public:
  MicroCorpus(MicroSource source, CorpusShares shares, std::unordered_set<std::string> held_out);

  // Throws std::runtime_error when the document holds a test problem, which only a bug can cause.
  MicroDocument document();
  // `documents` of them, or fewer as soon as they hold `max_tokens` inputs.
  MicroBatch batch(int64_t documents, int64_t max_tokens);

 private:
  MicroItem sample();
  std::vector<TokenId> written(const MicroItem& item);
  void check(const MicroItem& item) const;

  MicroSource source_;
  CorpusShares shares_;
  std::unordered_set<std::string> held_out_;
  std::array<double, 4> cumulative_;
  std::vector<TokenId> letters_, numbers_;
  TokenId eos_, user_, assistant_;
};

}  // namespace grpo_engine
