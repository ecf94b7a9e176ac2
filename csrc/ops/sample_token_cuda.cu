#include "ops/sample_token.h"

#include "core/philox.h"
#include "core/row_stats.cuh"
#include "ops/sample_token.cuh"

namespace grpo_engine {
namespace {

static_assert(kSampleBlock == kRowBlock);

constexpr int kGrid = 10;                   // thresholds a pass
constexpr float kLowest = -3.40282347e38f;  // every z but -inf
constexpr int64_t kEveryId = INT64_MAX / 2;
constexpr float kMassUnit = 0x1p40f;        // of the largest token: sums of 2^23 tokens fit

__device__ inline float exp_from(float z, float shift) {
  const float d = z - shift;
  return expf(d < kExpFloor<float> ? kExpFloor<float> : d);
}

// A row and its blocks. All threads of the block call the functions below, and get the same results.
template <typename S>
struct Row {
  const S* x;
  int64_t V, num_blocks;
  float inv_temperature, max;
  bool aligned;
  float* block_max;    // [num_blocks], of z
  double* block_mass;  // [num_blocks], of the tokens that may be sampled

  static constexpr int kPacks = kRowBlock / (kWarpSize * kPack<S>);  // of a lane, in a block

  // This lane's k-th pack of z of a block; -inf behind the row's end. Its first token:
  __device__ static int64_t id_of(int64_t block, int k) {
    return block * kRowBlock + (k * kWarpSize + threadIdx.x % kWarpSize) * kPack<S>;
  }
  __device__ Pack<S> z(int64_t block, int k) const {
    const int64_t id = id_of(block, k);
    Pack<S> pack = load_pack(x + id, V - id, aligned, -infinity<float>());
#pragma unroll
    for (int i = 0; i < kPack<S>; ++i) pack.v[i] = pack.v[i] * inv_temperature;
    return pack;
  }
  // use(block) for this warp's blocks that hold a z >= threshold.
  template <typename Use>
  __device__ void each_block(float threshold, Use use) const {
    for (int64_t b = threadIdx.x / kWarpSize; b < num_blocks; b += kRowThreads / kWarpSize) {
      if (block_max[b] >= threshold) use(b);
    }
  }
  // use(z) for this thread's tokens in blocks that hold a z >= threshold.
  template <typename Use>
  __device__ void each_z(float threshold, Use use) const {
    each_block(threshold, [&](int64_t b) {
#pragma unroll 1
      for (int k = 0; k < kPacks; ++k) {
        const Pack<S> pack = z(b, k);
#pragma unroll
        for (int i = 0; i < kPack<S>; ++i) use(pack.v[i]);
      }
    });
  }
};

// ---------------------------------------------------------------- thresholds

struct Threshold {
  float z;                   // the largest z of a token whose tail is at least what was wanted
  unsigned long long above;  // the tail of the tokens larger than that
};

// The tail of a z is how many z are as large, or their mass exp(z - max) in units of 1 / kMassUnit: integers, so that
// it does not matter in which order they are added.
template <bool kMass>
__device__ inline unsigned long long weight_of(float z, float max) {
  return kMass ? static_cast<unsigned long long>(exp_from(z, max) * kMassUnit) : 1ull;
}

// Among the tokens with z >= lowest, which the result does not go below. A pass measures the tail at kGrid thresholds
// and keeps the interval between two of them; one with no more tokens than the block has threads is compared outright.
template <bool kMass, typename S>
__device__ Threshold find_threshold(const Row<S>& row, unsigned long long wanted, float lowest) {
  __shared__ unsigned long long weights[kGrid];
  __shared__ unsigned counts[kGrid];
  __shared__ unsigned num_gathered;
  __shared__ float gathered[kRowThreads];
  uint32_t low = key_of(lowest), high = key_of(row.max) + 1;  // the answer is in [low, high)
  unsigned long long above = 0;                               // tail at high
  unsigned count_above = 0;                                   // tokens from high on
  int64_t left = row.V;                                       // tokens in the interval, at most
  for (int pass = 0; high - low > 1; ++pass) {
    __syncthreads();  // the shared arrays are free
    if (threadIdx.x < kGrid) {
      weights[threadIdx.x] = 0;
      counts[threadIdx.x] = 0;
    }
    if (threadIdx.x == 0) num_gathered = 0;
    __syncthreads();
    const float from = float_of(low), to = float_of(high);
    if (left <= kRowThreads) {
      row.each_z(from, [&](float z) {
        if (z >= from && z < to) gathered[atomicAdd(&num_gathered, 1u)] = z;  // in no order
      });
      __syncthreads();
      const unsigned n = num_gathered;
      uint32_t best = 0;
      if (threadIdx.x < n) {
        unsigned long long tail = above;
        const float z = gathered[threadIdx.x];
        for (unsigned j = 0; j < n; ++j) tail += gathered[j] >= z ? weight_of<kMass>(gathered[j], row.max) : 0;
        if (tail >= wanted) best = key_of(z);
      }
      best = block_reduce(best, Max{}, uint32_t{0});
      if (best == 0) return {from, above};  // rounding left the tail short
      const float z = float_of(best);
      for (unsigned j = 0; j < n; ++j) above += gathered[j] > z ? weight_of<kMass>(gathered[j], row.max) : 0;
      return {z, above};
    }
    // evenly spaced floats; at first evenly in value, 2 apart, for most mass is near the largest
    const auto key_at = [&](int g) {
      if (g == 0) return low;
      if (pass > 0 || lowest != kLowest) return low + static_cast<uint32_t>(static_cast<uint64_t>(high - low) * g / kGrid);
      const float value = row.max - 2.f * static_cast<float>(kGrid - g);
      return value > from ? key_of(value) : low;
    };
    float grid[kGrid];
#pragma unroll
    for (int g = 0; g < kGrid; ++g) grid[g] = float_of(key_at(g));
    unsigned long long weight[kGrid] = {};
    unsigned count[kGrid] = {};
    row.each_z(from, [&](float z) {
      const unsigned long long w = kMass ? weight_of<kMass>(z, row.max) : 0;
#pragma unroll
      for (int g = 0; g < kGrid; ++g) {
        const bool reaches = z >= grid[g];
        count[g] += reaches;
        if (kMass) weight[g] += reaches ? w : 0;
      }
    });
#pragma unroll
    for (int g = 0; g < kGrid; ++g) {
      count[g] = warp_reduce(count[g], Add{});
      if (kMass) weight[g] = warp_reduce(weight[g], Add{});
      if (threadIdx.x % kWarpSize != 0) continue;
      atomicAdd(&counts[g], count[g]);
      if (kMass) atomicAdd(&weights[g], weight[g]);
    }
    __syncthreads();
    const auto tail = [&](int g) { return kMass ? weights[g] : static_cast<unsigned long long>(counts[g]); };
    // where rounding leaves even the tail of the lowest short, the first threshold is it
    int g = kGrid - 1;
    while (g > 0 && tail(g) < wanted) --g;
    const uint32_t next_low = key_at(g);
    if (g + 1 < kGrid) {
      high = key_at(g + 1);
      above = tail(g + 1);
      count_above = counts[g + 1];
    }
    low = next_low;
    left = counts[g] - count_above;
  }
  __syncthreads();  // the shared arrays are free
  return {float_of(low), above};
}

// ---------------------------------------------------------------- one token by its share

// Tokens with z > threshold, and those equal to it up to the id last_equal; their masses.
struct Kept {
  float threshold;
  int64_t last_equal;

  __device__ float operator()(float z, int64_t id, float shift) const {
    return z > threshold || (z == threshold && id <= last_equal) ? exp_from(z, shift) : 0.f;
  }
};
// Each token whose z is `threshold` has mass 1.
struct Equal {
  float threshold;

  __device__ float operator()(float z, int64_t, float) const { return z == threshold ? 1.f : 0.f; }
};

// Fills row.block_mass, relative to the row's max; returns the sum.
template <typename S, typename Mass>
__device__ double measure(const Row<S>& row, Mass mass) {
  for (int64_t b = threadIdx.x / kWarpSize; b < row.num_blocks; b += kRowThreads / kWarpSize) {
    float sum = 0.f;
    if (row.block_max[b] >= mass.threshold) {
#pragma unroll 1
      for (int k = 0; k < Row<S>::kPacks; ++k) {
        const Pack<S> z = row.z(b, k);
#pragma unroll
        for (int i = 0; i < kPack<S>; ++i) sum = sum + mass(z.v[i], Row<S>::id_of(b, k) + i, row.max);
      }
      sum = warp_reduce(sum, Add{});
    }
    if (threadIdx.x % kWarpSize == 0) row.block_mass[b] = static_cast<double>(sum);
  }
  __syncthreads();
  double total = 0.0;
  for (int64_t b = threadIdx.x; b < row.num_blocks; b += kRowThreads) total += row.block_mass[b];
  return block_reduce(total, Add{}, 0.0);
}

// One warp: the sum of the masses of this lane and those before it.
__device__ inline double running_sum(double mass) {
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const double before = __shfl_up_sync(kAllLanes, mass, distance);
    if (static_cast<int>(threadIdx.x % kWarpSize) >= distance) mass = before + mass;
  }
  return mass;
}

// The lane of a warp where the running sum first reaches `left`, of those with positive mass; the last of these where
// none does (reached is then false), -1 where there are none. before: the running sum without the lane's own.
struct Lane {
  double before, total;
  int lane;
  bool reached;

  __device__ Lane(double mass, double left) {
    const double upto = running_sum(mass), previous = __shfl_up_sync(kAllLanes, upto, 1);
    before = threadIdx.x % kWarpSize == 0 ? 0.0 : previous;
    total = __shfl_sync(kAllLanes, upto, kWarpSize - 1);
    const unsigned positive = __ballot_sync(kAllLanes, mass > 0.0);
    const unsigned there = __ballot_sync(kAllLanes, mass > 0.0 && upto >= left);
    reached = there != 0;
    lane = reached ? __ffs(static_cast<int>(there)) - 1 : kWarpSize - 1 - __clz(static_cast<int>(positive));
  }
};

// The first token at which the mass passed reaches target, by the blocks' masses in row.block_mass and then again
// inside one block. Every warp computes it.
template <typename S, typename Mass>
__device__ int64_t pick(const Row<S>& row, Mass mass, double target) {
  int64_t block = 0;  // the last one of positive mass, if rounding leaves the target unreached
  double left = target, share = 1.0;
  for (int64_t first = 0; first < row.num_blocks; first += kWarpSize) {
    const int64_t b = first + threadIdx.x % kWarpSize;
    const double mine = b < row.num_blocks ? row.block_mass[b] : 0.0;
    const Lane at(mine, left);
    if (at.lane >= 0) block = first + at.lane;
    if (at.reached) {
      share = __shfl_sync(kAllLanes, (left - at.before) / mine, at.lane);
      break;
    }
    left -= at.total;
  }
  const float shift = row.block_max[block];
  constexpr int kPacks = Row<S>::kPacks;
  Pack<S> masses[kPacks];
  double sums[kPacks], total = 0.0;
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const Pack<S> z = row.z(block, k);
    sums[k] = 0.0;
#pragma unroll
    for (int i = 0; i < kPack<S>; ++i) {
      masses[k].v[i] = mass(z.v[i], Row<S>::id_of(block, k) + i, shift);
      sums[k] += static_cast<double>(masses[k].v[i]);
    }
    total += warp_reduce(sums[k], Add{});
  }
  left = (share < 1.0 ? share : 1.0) * total;
  int64_t token = 0;
  bool found = false;
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const Lane at(sums[k], left);
    double rest = left - at.before;
    int here = 0;  // of this lane's pack; a token of mass 0 is never sampled
    bool passed = false;
#pragma unroll
    for (int i = 0; i < kPack<S>; ++i) {
      if (passed || !(masses[k].v[i] > 0.f)) continue;
      here = i;
      rest -= static_cast<double>(masses[k].v[i]);
      passed = rest <= 0.0;
    }
    const int64_t mine = __shfl_sync(kAllLanes, Row<S>::id_of(block, k) + here, at.lane < 0 ? 0 : at.lane);
    if (!found && at.lane >= 0) token = mine;
    found = found || at.reached;
    left -= at.total;
  }
  return token;
}

// The id of the n-th token (n >= 1) whose z is `value`.
template <typename S>
__device__ int64_t nth_equal(const Row<S>& row, float value, int64_t n) {
  measure(row, Equal{value});
  const int64_t id = pick(row, Equal{value}, static_cast<double>(n));
  __syncthreads();  // block_mass is free
  return id;
}

// ---------------------------------------------------------------- a row

template <typename S>
__device__ Kept apply_filters(const Row<S>& row, int64_t top_k, double top_p, double min_p, double sum) {
  Kept kept{kLowest, kEveryId};
  if (top_k < row.V) {
    const Threshold kth = find_threshold<false>(row, static_cast<unsigned long long>(top_k), kLowest);
    kept = {kth.z, nth_equal(row, kth.z, top_k - static_cast<int64_t>(kth.above))};
  }
  if (top_p < 1.0) {
    const double wanted = top_p * (top_k < row.V ? measure(row, kept) : sum) * static_cast<double>(kMassUnit);
    const float nucleus = find_threshold<true>(row, static_cast<unsigned long long>(wanted), kept.threshold).z;
    if (nucleus > kept.threshold) kept = {nucleus, kEveryId};
  }
  if (min_p > 0.0) {
    const float least = static_cast<float>(row.max + log(min_p));
    if (least > kept.threshold) kept = {least, kEveryId};
  }
  return kept;
}

template <typename S>
__device__ Row<S> row_of(const SampleTokenArgs& a, int64_t b, bool aligned) {
  Row<S> row{};
  row.x = static_cast<const S*>(a.logits) + b * a.row_stride;
  row.V = a.V;
  row.num_blocks = (a.V + kRowBlock - 1) / kRowBlock;
  row.inv_temperature = a.temperature[b] > 0.f ? finite_inverse(a.temperature[b]) : 1.f;
  row.aligned = aligned;
  row.block_max = a.block_max + b * row.num_blocks;
  row.block_mass = a.block_mass + b * row.num_blocks;
  return row;
}

constexpr int kBlocksThreads = 128;  // few, so that one row has work for many multiprocessors

// One warp, one block of logits of one row.
template <typename S>
__global__ void __launch_bounds__(kBlocksThreads) sample_token_blocks_kernel(SampleTokenArgs a, bool aligned) {
  const int64_t item = static_cast<int64_t>(blockIdx.x) * (kBlocksThreads / kWarpSize) + threadIdx.x / kWarpSize;
  const int64_t num_blocks = (a.V + kRowBlock - 1) / kRowBlock, b = item / num_blocks, block = item % num_blocks;
  if (b >= a.B) return;
  const Row<S> row = row_of<S>(a, b, aligned);
  const int64_t first = block * kRowBlock;
  const BlockStats<float> s = block_stats(row.x + first, a.V - first, row.inv_temperature, aligned);
  if (threadIdx.x % kWarpSize != 0) return;
  row.block_max[block] = s.max;  // of the logits: sample_token_kernel scales it
  row.block_mass[block] = static_cast<double>(s.sum);
  a.block_weighted[item] = s.weighted;
}

// One block, one row.
template <typename S>
__global__ void __launch_bounds__(kRowThreads) sample_token_kernel(SampleTokenArgs a, bool aligned) {
  const int64_t b = blockIdx.x;
  const float temperature = a.temperature[b];
  const double top_p = a.top_p ? a.top_p[b] : 1.0, min_p = a.min_p ? a.min_p[b] : 0.0;
  const bool valid =
      temperature >= 0.f && temperature < infinity<float>() && top_p >= 0.0 && top_p <= 1.0 && min_p >= 0.0 && min_p <= 1.0;
  Row<S> row = row_of<S>(a, b, aligned);
  const float inv_temperature = row.inv_temperature;
  const RowStats stats = join_row(row.num_blocks, inv_temperature, [&](int64_t block) {
    return BlockStats<float>{row.block_max[block], static_cast<float>(row.block_mass[block]),
                             a.block_weighted[b * row.num_blocks + block]};
  });
  // NaN, +inf or nothing to sample from: the same for all threads
  if (!valid || !(stats.sum > 0.0) || !(fabs(stats.max) < infinity<double>())) {
    if (threadIdx.x != 0) return;
    a.token[b] = -1;
    a.logprob[b] = a.full_logprob[b] = a.entropy[b] = not_a_number<float>();
    return;
  }
  __syncthreads();  // the blocks' masses are read
  row.max = static_cast<float>(stats.max);
  const bool overflows = fabs(stats.max) > kFloatMax;
  if (overflows) {
    // the mass is that of the largest logits' equals: so it is at any temperature that leaves the others no mass
    row.inv_temperature = static_cast<float>(inv_temperature * (1e38 / fabs(stats.max)));
    row.max = static_cast<float>(stats.max / inv_temperature) * row.inv_temperature;
  }
  for (int64_t i = threadIdx.x; i < row.num_blocks; i += kRowThreads)
    row.block_max[i] = row.block_max[i] * row.inv_temperature;
  __syncthreads();
  const int64_t top_k = a.top_k && a.top_k[b] > 0 && a.top_k[b] < a.V ? a.top_k[b] : a.V;
  const bool filtered = top_k < a.V || top_p < 1.0 || min_p > 0.0;
  const double u = philox_uniform(static_cast<uint64_t>(a.seed[b]), static_cast<uint64_t>(a.position[b]));
  double mass = stats.sum;
  int64_t token;
  if (temperature == 0.f) {
    token = nth_equal(row, row.max, 1);
  } else {
    Kept kept{kLowest, kEveryId};
    if (filtered) {
      kept = apply_filters(row, top_k, top_p, min_p, stats.sum);
      mass = measure(row, kept);
    } else {
      for (int64_t i = threadIdx.x; i < row.num_blocks; i += kRowThreads) {
        row.block_mass[i] = exp(row.block_max[i] - static_cast<double>(row.max)) * row.block_mass[i];
      }
      __syncthreads();
    }
    token = pick(row, kept, u * mass);
  }
  if (threadIdx.x != 0) return;
  const double z = scaled(to_arith(row.x[token]), inv_temperature);
  a.token[b] = token;
  a.full_logprob[b] = static_cast<float>(stats.logprob(z));
  a.logprob[b] = temperature == 0.f ? 0.f : filtered ? static_cast<float>((z - stats.max) - log(mass)) : a.full_logprob[b];
  a.entropy[b] = static_cast<float>(stats.entropy());
}

template <typename S>
void run(const SampleTokenArgs& args, CudaStream stream) {
  const bool aligned = rows_aligned<S>(args.logits, args.row_stride);
  const int64_t blocks = args.B * ceil_div(args.V, kRowBlock);
  launch({"sample_token_blocks", ceil_div(blocks, kBlocksThreads / kWarpSize), kBlocksThreads, stream},
         sample_token_blocks_kernel<S>, args, aligned);
  launch({"sample_token", args.B, kRowThreads, stream}, sample_token_kernel<S>, args, aligned);
}

}  // namespace

void sample_token_cuda(const SampleTokenArgs& args, CudaStream stream) {
  args.dtype == DType::bf16 ? run<bfloat16>(args, stream) : run<float>(args, stream);
}

}  // namespace grpo_engine
