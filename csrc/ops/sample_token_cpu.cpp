#include "ops/sample_token.h"

#include "core/philox.h"
#include "core/row_stats.h"
#include "core/scratch.h"
#include "ops/sample_token.cuh"

namespace grpo_engine::GE_ISA {
namespace {

constexpr int kGrid = 16;           // thresholds a pass
constexpr int64_t kGathered = 8192;  // an interval with at most so many tokens is copied out
constexpr int kSorted = 64;         // and one with so few is sorted
constexpr float kLowest = -3.40282347e38f;  // every z but -inf

template <typename S>
struct Row {
  const S* x;
  int64_t V, num_blocks;
  float inv_temperature, max;
  float *block_max, *block_sum;  // [num_blocks], of z and of exp(z - block max)
  float* maxima_max;             // [num_blocks], scratch of top_k_bound
  float* gathered;               // [kGathered + 2 kLanes], z of the tokens of an interval
  double* mass;                  // [num_blocks], of the tokens that may be sampled

  GE_MEMBER int64_t length(int64_t block) const {
    const int64_t left = V - block * kRowBlock;
    return left < kRowBlock ? left : kRowBlock;
  }
  GE_MEMBER float z(int64_t id) const { return to_arith(x[id]) * inv_temperature; }
  // Calls body(block, first id, length) for the blocks that hold a z >= threshold, in order.
  template <typename Body>
  GE_MEMBER void each_block(float threshold, Body body) const {
    for (int64_t b = 0; b < num_blocks; ++b) {
      if (block_max[b] >= threshold) body(b, b * kRowBlock, length(b));
    }
  }
};

// ---------------------------------------------------------------- thresholds

GE_INLINE float next_above(float f) { return float_of(key_of(f) + 1); }

// The tail of a token set: how many z are >= a threshold, or their mass sum exp(z - max).
enum class Tail { count, mass };

// Adds the tails of n <= kRowBlock values at G thresholds to total.
template <Tail kTail, int G, typename S>
GE_INLINE void add_tails(const S* x, int64_t n, float inv_temperature, float max, const float* thresholds, double* total) {
  const VecF scale = VecF::set1(inv_temperature), shift = VecF::set1(max), low = VecF::set1(-104.f);
  VecF sums[G], at[G];
  for (int g = 0; g < G; ++g) {
    sums[g] = VecF::zero();
    at[g] = VecF::set1(thresholds[g]);
  }
  each_four_vectors(n, [&]<int N>(int64_t i, int count) {
    VecF z[N], e[N];
    for (int k = 0; k < N; ++k) {
      z[k] = load<VecF>(x + i + k * kLanes, count, -__builtin_inff()) * scale;
      e[k] = kTail == Tail::mass ? vmax(low, z[k] - shift) : VecF::set1(1.f);
    }
    if constexpr (kTail == Tail::mass) exp_in_range(e);
    for (int k = 0; k < N; ++k) {
      for (int g = 0; g < G; ++g) sums[g] = add_where_ge(sums[g], e[k], z[k], at[g]);
    }
  });
  for (int g = 0; g < G; ++g) total[g] += static_cast<double>(sum(sums[g]));
}

// Rising thresholds in [low, high), the first one low: evenly spaced in value, or in floats where that
// no longer tells values apart.
GE_INLINE void make_grid(float low, float high, bool by_value, float* grid) {
  const uint32_t first = key_of(low), span = key_of(high) - first;
  const double step = (static_cast<double>(high) - low) / kGrid;
  const float last = float_of(key_of(high) - 1);
  for (int g = 0; g < kGrid; ++g) {
    const float t = by_value ? static_cast<float>(low + step * g)
                             : float_of(first + static_cast<uint32_t>(static_cast<uint64_t>(span) * g / kGrid));
    grid[g] = t < last ? t : last;
  }
}

GE_INLINE void sort_falling(float* v, int64_t n) {
  for (int64_t i = 1; i < n; ++i) {
    const float x = v[i];
    int64_t j = i;
    for (; j > 0 && v[j - 1] < x; --j) v[j] = v[j - 1];
    v[j] = x;
  }
}

// Where the mass of smaller tokens reaches `below`, most likely, by every sixteenth block of a long row. It is the
// smaller ones that are counted because no few of them decide.
struct Interval {
  float low, high;
};
constexpr int64_t kSampled = 16;
template <typename S>
Interval guess_interval(const Row<S>& row, double below) {
  constexpr double kMargin = 0.08;  // of `below`; two or three standard deviations at Qwen2.5's vocabulary
  const double share = static_cast<double>((row.num_blocks + kSampled - 1) / kSampled) / static_cast<double>(row.num_blocks);
  Interval in{row.max - 24.f, next_above(row.max)};
  double total = 0.0;
  for (int round = 0; round < 3; ++round) {
    float grid[kGrid];
    double tail[kGrid] = {};
    make_grid(in.low, in.high, true, grid);
    for (int64_t b = 0; b < row.num_blocks; b += kSampled) {
      add_tails<Tail::mass, kGrid>(row.x + b * kRowBlock, row.length(b), row.inv_temperature, row.max, grid, tail);
    }
    if (round == 0) total = tail[0];
    const auto smaller = [&](int g) { return (total - tail[g]) / share; };
    int g = kGrid - 1;
    while (g > 0 && smaller(g) > below * (1.0 - kMargin)) --g;
    in.low = grid[g];
    while (g < kGrid && smaller(g) <= below * (1.0 + kMargin)) ++g;
    if (g < kGrid) in.high = grid[g];
  }
  return in;
}

struct Threshold {
  float z;       // the largest z of a token whose tail is at least what was wanted
  double above;  // the tail of the tokens larger than that
};

// Among the tokens with z >= low. If rounding leaves their tail short, the smallest of them. `guess` may be wrong.
template <Tail kTail, typename S>
Threshold find_threshold(const Row<S>& row, double wanted, float low, const Interval* guess = nullptr) {
  float high = next_above(row.max);  // the answer is in [low, high)
  double above = 0.0;                // tail at high
  if (guess) {
    const float ends[2] = {guess->low, guess->high};
    double tail[2] = {};
    row.each_block(ends[0], [&](int64_t, int64_t first, int64_t length) {
      add_tails<kTail, 2>(row.x + first, length, row.inv_temperature, row.max, ends, tail);
    });
    for (int end = 1; end >= 0 && low < ends[end]; --end) {
      if (tail[end] >= wanted) {
        low = ends[end];
      } else {
        high = ends[end];
        above = tail[end];
      }
    }
  }
  int64_t n = -1;                    // tokens of the interval in row.gathered; -1: they do not fit
  for (int pass = 0;; ++pass) {
    int64_t count = 0;
    if (n < 0) {
      row.each_block(low, [&](int64_t, int64_t first, int64_t length) {
        for (int64_t i = 0; i < length && count <= kGathered; i += kLanes) {
          const int left = length - i < kLanes ? static_cast<int>(length - i) : kLanes;
          const VecF z = load<VecF>(row.x + first + i, left, -__builtin_inff()) * VecF::set1(row.inv_temperature);
          count += append_between(z, low, high, row.gathered + count);
        }
      });
      if (count <= kGathered) n = count;
    } else {
      for (int64_t i = 0; i < n; ++i) {
        const float z = row.gathered[i];
        row.gathered[count] = z;
        count += z >= low && z < high;
      }
      n = count;
    }
    if (n >= 0 && n <= kSorted) break;
    if (next_above(low) == high) return {low, above};

    float grid[kGrid];
    double tail[kGrid] = {};
    make_grid(low, high, pass < 4 && low > kLowest, grid);
    if (pass == 0 && low == kLowest) {  // nearly all mass is within 24 of the largest
      make_grid(row.max - 24.f, high, true, grid);
      grid[0] = kLowest;
    }
    if (n < 0) {
      row.each_block(low, [&](int64_t, int64_t first, int64_t length) {
        add_tails<kTail, kGrid>(row.x + first, length, row.inv_temperature, row.max, grid, tail);
      });
    } else {
      for (double& t : tail) t = above;
      for (int64_t i = 0; i < n; i += kRowBlock) {
        const int64_t length = n - i < kRowBlock ? n - i : kRowBlock;
        add_tails<kTail, kGrid>(row.gathered + i, length, 1.f, row.max, grid, tail);
      }
    }
    int g = kGrid - 1;
    while (g > 0 && !(tail[g] >= wanted)) --g;
    low = grid[g];
    if (g + 1 < kGrid) {
      high = grid[g + 1];
      above = tail[g + 1];
    }
  }
  sort_falling(row.gathered, n);
  for (int64_t i = 0; i < n;) {
    const float z = row.gathered[i];
    int64_t equal = i;
    while (equal < n && row.gathered[equal] == z) ++equal;
    const double each = kTail == Tail::mass ? ::exp(static_cast<double>(z) - row.max) : 1.0;
    const double tail = above + static_cast<double>(equal - i) * each;
    if (tail >= wanted || equal == n) return {z, above};
    above = tail;
    i = equal;
  }
  return {low, above};  // an interval that rounding left empty
}

// ---------------------------------------------------------------- what the filters keep

struct Filters {
  int64_t top_k;  // V: off
  double top_p, min_p;
};

constexpr int64_t kEveryId = INT64_MAX / 2;

// Tokens with z > threshold, and those equal to it up to the id last_equal.
struct Kept {
  float threshold;
  int64_t last_equal;

  // The thresholds of the ids i .. i + 15.
  GE_MEMBER VecF at(int64_t i) const {
    if (i + kLanes - 1 <= last_equal) return VecF::set1(threshold);
    float t[kLanes];
    for (int k = 0; k < kLanes; ++k) t[k] = i + k <= last_equal ? threshold : next_above(threshold);
    return VecF::load(t);
  }
};

// Calls body(i, mass) for vectors of the block's kept tokens: exp(z - shift), 0 for the others.
template <typename S, typename Body>
GE_INLINE void each_mass(const Row<S>& row, Kept kept, int64_t block, float shift, Body body) {
  const int64_t first = block * kRowBlock;
  const VecF scale = VecF::set1(row.inv_temperature), low = VecF::set1(-104.f);
  each_four_vectors(row.length(block), [&]<int N>(int64_t i, int count) {
    VecF z[N], e[N];
    for (int k = 0; k < N; ++k) {
      z[k] = load<VecF>(row.x + first + i + k * kLanes, count, -__builtin_inff()) * scale;
      e[k] = vmax(low, z[k] - VecF::set1(shift));
    }
    exp_in_range(e);
    for (int k = 0; k < N; ++k) {
      const int64_t j = i + k * kLanes;
      body(j, add_where_ge(VecF::zero(), e[k], z[k], kept.at(first + j)));
    }
  });
}

// Fills row.mass with the kept mass of each block, relative to the row's max; returns their sum.
template <typename S>
double kept_mass(const Row<S>& row, Kept kept) {
  double total = 0.0;
  for (int64_t b = 0; b < row.num_blocks; ++b) row.mass[b] = 0.0;
  row.each_block(kept.threshold, [&](int64_t b, int64_t, int64_t) {
    VecF s = VecF::zero();
    each_mass(row, kept, b, row.max, [&](int64_t, VecF mass) { s = s + mass; });
    row.mass[b] = static_cast<double>(sum(s));
    total += row.mass[b];
  });
  return total;
}

// The id of the n-th token (n >= 1) whose z is `value`.
template <typename S>
int64_t nth_equal(const Row<S>& row, float value, int64_t n) {
  for (int64_t b = 0; b < row.num_blocks; ++b) {
    if (row.block_max[b] < value) continue;
    for (int64_t i = b * kRowBlock; i < b * kRowBlock + row.length(b); ++i) {
      if (row.z(i) == value && --n == 0) return i;
    }
  }
  return row.V;
}

// The k-th largest of the block maxima, which no fewer than k tokens reach; kLowest if too few blocks
// hold a finite z.
template <typename S>
float top_k_bound(const Row<S>& row, int64_t k) {
  Row<float> maxima{};
  maxima.x = row.block_max;
  maxima.V = row.num_blocks;
  maxima.num_blocks = (row.num_blocks + kRowBlock - 1) / kRowBlock;
  maxima.inv_temperature = 1.f;
  maxima.max = row.max;
  maxima.gathered = row.gathered;
  maxima.block_max = row.maxima_max;
  for (int64_t b = 0; b < maxima.num_blocks; ++b) row.maxima_max[b] = row.max;  // none is skipped
  int64_t finite = 0;
  row.each_block(kLowest, [&](int64_t, int64_t, int64_t) { ++finite; });
  if (finite < k) return kLowest;
  return find_threshold<Tail::count>(maxima, static_cast<double>(k), kLowest).z;
}

template <typename S>
Kept apply_filters(const Row<S>& row, const Filters& f, double sum) {
  Kept kept{kLowest, kEveryId};
  if (f.top_k < row.V) {
    const float bound = top_k_bound(row, f.top_k);
    const Threshold kth = find_threshold<Tail::count>(row, static_cast<double>(f.top_k), bound);
    kept = {kth.z, nth_equal(row, kth.z, f.top_k - static_cast<int64_t>(kth.above))};
  }
  if (f.top_p < 1.0) {
    const bool all = f.top_k >= row.V, guess = all && row.num_blocks >= 4 * kSampled;
    const double wanted = f.top_p * (all ? sum : kept_mass(row, kept));
    const Interval in = guess ? guess_interval(row, sum - wanted) : Interval{};
    const float nucleus = find_threshold<Tail::mass>(row, wanted, kept.threshold, guess ? &in : nullptr).z;
    if (nucleus > kept.threshold) kept = {nucleus, kEveryId};
  }
  if (f.min_p > 0.0) {
    const float least = static_cast<float>(row.max + ::log(f.min_p));
    if (least > kept.threshold) kept = {least, kEveryId};
  }
  return kept;
}

// ---------------------------------------------------------------- the sample

// The first kept token at which the mass passed reaches target, of the blocks' masses in row.mass.
template <typename S>
int64_t sample_from(const Row<S>& row, Kept kept, double target) {
  double passed = 0.0, share = 1.0;
  int64_t block = 0;
  for (int64_t b = 0; b < row.num_blocks; ++b) {
    if (!(row.mass[b] > 0.0)) continue;
    block = b;  // the last one of positive mass, if rounding leaves the target unreached
    share = (target - passed) / row.mass[b];
    passed += row.mass[b];
    if (passed >= target) break;
  }
  // the same once more, of the block's vectors and of the vector's tokens, relative to the block's max
  float mass[kRowBlock];
  double vector_mass[kRowBlock / kLanes], total = 0.0;
  each_mass(row, kept, block, row.block_max[block], [&](int64_t i, VecF m) {
    m.store(mass + i);
    vector_mass[i / kLanes] = static_cast<double>(sum(m));
    total += vector_mass[i / kLanes];
  });
  double left = (share < 1.0 ? share : 1.0) * total;
  int64_t vector = 0;
  for (int64_t v = 0, num_vectors = (row.length(block) + kLanes - 1) / kLanes; v < num_vectors; ++v) {
    if (!(vector_mass[v] > 0.0)) continue;
    vector = v;
    if (vector_mass[v] >= left) break;
    left -= vector_mass[v];
  }
  int64_t token = 0;
  for (int64_t i = vector * kLanes; i < (vector + 1) * kLanes; ++i) {
    if (!(mass[i] > 0.f)) continue;  // a token of probability 0 is never sampled
    token = block * kRowBlock + i;
    left -= static_cast<double>(mass[i]);
    if (left <= 0.0) break;
  }
  return token;
}

template <typename S>
int64_t argmax(const Row<S>& row) {
  int64_t b = 0;
  while (row.block_max[b] != row.max) ++b;
  int64_t id = b * kRowBlock;
  while (row.z(id) != row.max) ++id;
  return id;
}

template <typename S>
void one_row(const SampleTokenArgs& a, int64_t b, Row<S>& row) {
  const float temperature = a.temperature[b];
  row.x = static_cast<const S*>(a.logits) + b * a.row_stride;
  const float inv_temperature = temperature > 0.f ? finite_inverse(temperature) : 1.f;
  const auto reduce = [&] {
    RowStats stats;
    for (int64_t i = 0; i < row.num_blocks; ++i) {
      const BlockStats s = block_stats(row.x + i * kRowBlock, row.length(i), row.inv_temperature);
      row.block_max[i] = s.max * row.inv_temperature;
      row.block_sum[i] = s.sum;
      stats.add(s, row.inv_temperature);
    }
    return stats;
  };
  row.inv_temperature = inv_temperature;
  const RowStats stats = reduce();
  const float nan = __builtin_nanf("");
  a.token[b] = -1;
  a.logprob[b] = a.full_logprob[b] = a.entropy[b] = nan;
  // NaN, +inf or nothing to sample from
  if (!(stats.sum > 0.0) || !(__builtin_fabs(stats.max) < __builtin_inf())) return;
  if (__builtin_fabs(stats.max) > kFloatMax) {
    // the mass is that of the largest logits' equals: so it is at any temperature that leaves the others no mass
    row.inv_temperature = static_cast<float>(inv_temperature * (1e38 / __builtin_fabs(stats.max)));
    row.max = static_cast<float>(reduce().max);
  } else {
    row.max = static_cast<float>(stats.max);
  }

  Filters f{a.V, 1.0, 0.0};
  if (a.top_k && a.top_k[b] > 0 && a.top_k[b] < a.V) f.top_k = a.top_k[b];
  if (a.top_p) f.top_p = a.top_p[b];
  if (a.min_p) f.min_p = a.min_p[b];
  const bool filtered = f.top_k < a.V || f.top_p < 1.0 || f.min_p > 0.0;
  const double u = philox_uniform(a.seed[b], a.position[b]);
  double mass = stats.sum;
  int64_t token;
  if (temperature == 0.f) {
    token = argmax(row);
  } else if (filtered) {
    const Kept kept = apply_filters(row, f, stats.sum);
    mass = kept_mass(row, kept);
    token = sample_from(row, kept, u * mass);
  } else {
    for (int64_t i = 0; i < row.num_blocks; ++i) {
      row.mass[i] = ::exp(row.block_max[i] - static_cast<double>(row.max)) * row.block_sum[i];
    }
    token = sample_from(row, {kLowest, kEveryId}, u * mass);
  }
  const double z = scaled(to_arith(row.x[token]), inv_temperature);
  a.token[b] = token;
  a.full_logprob[b] = static_cast<float>(stats.logprob(z));
  a.logprob[b] = temperature == 0.f ? 0.f : filtered ? static_cast<float>((z - stats.max) - ::log(mass)) : a.full_logprob[b];
  a.entropy[b] = static_cast<float>(stats.entropy());
}

template <typename S>
void rows(const SampleTokenArgs& a, int64_t begin, int64_t end) {
  Row<S> row{};
  row.V = a.V;
  row.num_blocks = (a.V + kRowBlock - 1) / kRowBlock;
  constexpr int64_t kGatheredRoom = kGathered + 2 * kLanes;
  Arena arena(Arena::bytes<double>(row.num_blocks) + 3 * Arena::bytes<float>(row.num_blocks) +
              Arena::bytes<float>(kGatheredRoom));
  row.mass = arena.take<double>(row.num_blocks);
  row.block_max = arena.take<float>(row.num_blocks);
  row.block_sum = arena.take<float>(row.num_blocks);
  row.maxima_max = arena.take<float>(row.num_blocks);
  row.gathered = arena.take<float>(kGatheredRoom);
  for (int64_t b = begin; b < end; ++b) one_row(a, b, row);
}

}  // namespace

void sample_token(const SampleTokenArgs& args, int64_t begin, int64_t end) {
  args.dtype == DType::bf16 ? rows<bfloat16>(args, begin, end) : rows<float>(args, begin, end);
}

}  // namespace grpo_engine::GE_ISA
