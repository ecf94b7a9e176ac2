#include "ops/sample_token.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "core/checks.h"
#include "core/philox.h"

namespace grpo_engine {
namespace {

constexpr const char* kOp = "sample_token";
constexpr float kNegInf = -std::numeric_limits<float>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

using Four = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using OptionalTensor = std::optional<at::Tensor>;

// Filters of one row; the defaults switch each off.
struct Filters {
  int64_t top_k = 0;  // <= 0 or >= V: off
  double top_p = 1.0;
  double min_p = 0.0;
};

struct Sampled {
  int64_t token = -1;
  double logprob = kNan, full_logprob = kNan, entropy = kNan;
};

// What a thread needs for one row, kept between rows.
struct Scratch {
  explicit Scratch(int64_t V) : block_max((V + kSampleBlock - 1) / kSampleBlock), block_sum(block_max) {}
  std::vector<float> block_max, block_sum, candidate_z, sorted;
  std::vector<int64_t> candidate_id;
};

// z of the k-th largest candidate, k in [1, n].
float kth_largest(std::vector<float>& z, int64_t k) {
  std::nth_element(z.begin(), z.begin() + (k - 1), z.end(), std::greater<float>());
  return z[k - 1];
}

// The largest t such that the candidates with z >= t have mass >= wanted; quickselect by mass.
float mass_threshold(std::vector<float>& z, double max, double wanted) {
  auto begin = z.begin(), end = z.end();
  double above = 0.0;  // mass of candidates larger than all of [begin, end)
  while (end - begin > 1) {
    const float a = *begin, b = *(begin + (end - begin) / 2), c = *(end - 1);
    const float pivot = std::max(std::min(a, b), std::min(std::max(a, b), c));
    const auto larger = std::partition(begin, end, [=](float v) { return v > pivot; });
    const auto smaller = std::partition(larger, end, [=](float v) { return v == pivot; });
    double mass_larger = 0.0;
    for (auto it = begin; it != larger; ++it) mass_larger += std::exp(*it - max);
    const double mass_equal = static_cast<double>(smaller - larger) * std::exp(pivot - max);
    if (above + mass_larger >= wanted && larger != begin) {
      end = larger;
    } else if (above + mass_larger + mass_equal >= wanted || smaller == end) {
      return pivot;
    } else {
      above += mass_larger + mass_equal;
      begin = smaller;
    }
  }
  return *begin;
}

// Draws among the tokens that the filters keep, in order of id.
void sample_filtered(SampleRow& row, SampleRows one, Scratch& scratch, const Filters& f, double u,
                     Sampled& out) {
  const bool k_on = f.top_k > 0 && f.top_k < row.V;
  const auto num_blocks = static_cast<int64_t>(scratch.block_max.size());
  row.threshold = std::nextafterf(kNegInf, 0.f);  // every token that is not -inf
  if (f.min_p > 0.0) row.threshold = static_cast<float>(row.max + std::log(f.min_p));
  if (k_on && num_blocks >= f.top_k) {
    // the k largest block maxima are k tokens, so the k-th largest token is at least the k-th of them
    scratch.sorted = scratch.block_max;
    const float bound = kth_largest(scratch.sorted, f.top_k);
    // min-p comes after top-p, whose mass needs every top-k token: it must not raise this bound
    row.threshold = f.top_p < 1.0 ? std::max(bound, std::nextafterf(kNegInf, 0.f))
                                  : std::max(bound, row.threshold);
  } else if (f.top_p < 1.0) {
    row.threshold = std::nextafterf(kNegInf, 0.f);
  }
  scratch.candidate_id.resize(row.V);
  scratch.candidate_z.resize(row.V);
  row.candidate_id = scratch.candidate_id.data();
  row.candidate_z = scratch.candidate_z.data();
  sample_gather_cpu(one, 0, 1);

  int64_t n = row.num_candidates;
  if (k_on && f.top_k < n) {
    scratch.sorted.assign(row.candidate_z, row.candidate_z + n);
    const float kth = kth_largest(scratch.sorted, f.top_k);
    int64_t ties = f.top_k;  // how many tokens equal to the k-th are kept: the lowest ids
    for (int64_t i = 0; i < n; ++i) ties -= row.candidate_z[i] > kth;
    int64_t kept = 0;
    for (int64_t i = 0; i < n; ++i) {
      const float z = row.candidate_z[i];
      if (z < kth || (z == kth && ties-- <= 0)) continue;
      row.candidate_id[kept] = row.candidate_id[i];
      row.candidate_z[kept++] = z;
    }
    n = kept;
  }
  double total = 0.0;
  for (int64_t i = 0; i < n; ++i) total += std::exp(row.candidate_z[i] - row.max);
  float threshold = kNegInf;
  if (f.top_p < 1.0) {
    scratch.sorted.assign(row.candidate_z, row.candidate_z + n);
    threshold = mass_threshold(scratch.sorted, row.max, f.top_p * total);
  }
  if (f.min_p > 0.0) {
    threshold = std::max(threshold, static_cast<float>(row.max + std::log(f.min_p)));
  }
  double kept_mass = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    if (row.candidate_z[i] >= threshold) kept_mass += std::exp(row.candidate_z[i] - row.max);
  }
  const double target = u * kept_mass;
  double passed = 0.0;
  float z_token = kNegInf;
  for (int64_t i = 0; i < n && passed < target; ++i) {
    const double mass = std::exp(row.candidate_z[i] - row.max);
    if (row.candidate_z[i] < threshold || mass <= 0.0) continue;
    passed += mass;
    out.token = row.candidate_id[i];
    z_token = row.candidate_z[i];
  }
  out.logprob = static_cast<double>(z_token) - row.max - std::log(kept_mass);
}

void sample_unfiltered(SampleRow& row, SampleRows one, const Scratch& scratch, double u) {
  const double target = u * row.sum;
  double passed = 0.0;
  const auto num_blocks = static_cast<int64_t>(scratch.block_max.size());
  for (int64_t b = 0; b < num_blocks; ++b) {
    const double mass = std::exp(scratch.block_max[b] - row.max) * scratch.block_sum[b];
    if (!(mass > 0.0)) continue;
    row.block = b;  // the last block of positive mass, if rounding leaves the target unreached
    row.share = std::min((target - passed) / mass, 1.0);
    passed += mass;
    if (passed >= target) break;
  }
  sample_pick_cpu(one, 0, 1);
}

template <typename S>
double z_of(const SampleRow& row, int64_t token);
template <>
double z_of<float>(const SampleRow& row, int64_t token) {
  return static_cast<const float*>(row.logits)[token] * row.inv_temperature;
}
template <>
double z_of<at::BFloat16>(const SampleRow& row, int64_t token) {
  return static_cast<float>(static_cast<const at::BFloat16*>(row.logits)[token]) * row.inv_temperature;
}

Sampled sample_row(DType dtype, int64_t V, const void* logits, float temperature, const Filters& f,
                   double u, Scratch& scratch) {
  SampleRow row{};
  row.dtype = dtype;
  row.V = V;
  row.logits = logits;
  row.inv_temperature = temperature > 0.f ? 1.f / temperature : 1.f;
  row.block_max = scratch.block_max.data();
  row.block_sum = scratch.block_sum.data();
  const SampleRows one{&row};
  sample_blocks_cpu(one, 0, 1);
  Sampled out;
  if (!(row.sum > 0.0) || !std::isfinite(row.max)) return out;  // NaN, +inf or nothing to draw
  out.entropy = row.entropy;
  const bool filtered = (f.top_k > 0 && f.top_k < V) || f.top_p < 1.0 || f.min_p > 0.0;
  if (temperature == 0.f) {
    sample_argmax_cpu(one, 0, 1);
    out.token = row.token;
    out.logprob = 0.0;
  } else if (filtered) {
    sample_filtered(row, one, scratch, f, u, out);
  } else {
    sample_unfiltered(row, one, scratch, u);
    out.token = row.token;
  }
  const double z = dtype == DType::bf16 ? z_of<at::BFloat16>(row, out.token) : z_of<float>(row, out.token);
  out.full_logprob = (z - row.max) - std::log(row.sum);
  if (temperature > 0.f && !filtered) out.logprob = out.full_logprob;
  return out;
}

void require_row_vector(const char* name, const OptionalTensor& t, at::ScalarType dtype,
                        const at::Tensor& logits) {
  if (t) require_tensor(kOp, name, *t, {logits.size(0)}, "[B]", dtype, logits);
}

Four meta(const at::Tensor& logits, const at::Tensor& seed, const at::Tensor& position,
          const at::Tensor& temperature, const OptionalTensor& top_k, const OptionalTensor& top_p,
          const OptionalTensor& min_p) {
  require_shape(kOp, "logits", logits, {-1, -1}, "[B, V]");
  TORCH_CHECK_TYPE(logits.scalar_type() == at::kFloat || logits.scalar_type() == at::kBFloat16, kOp,
                   ": logits must be Float or BFloat16, got ", logits.scalar_type());
  TORCH_CHECK_VALUE(logits.size(1) > 0, kOp, ": logits needs V >= 1 columns, got ", logits.sizes());
  TORCH_CHECK_VALUE(logits.stride(1) == 1 || logits.size(1) == 1, kOp,
                    ": each row of logits must be contiguous, got strides ", logits.strides());
  require_row_vector("seed", seed, at::kLong, logits);
  require_row_vector("position", position, at::kLong, logits);
  require_row_vector("temperature", temperature, at::kFloat, logits);
  require_row_vector("top_k", top_k, at::kLong, logits);
  require_row_vector("top_p", top_p, at::kFloat, logits);
  require_row_vector("min_p", min_p, at::kFloat, logits);
  const int64_t B = logits.size(0);
  const auto f32 = logits.options().dtype(at::kFloat);
  return {at::empty({B}, f32.dtype(at::kLong)), at::empty({B}, f32), at::empty({B}, f32),
          at::empty({B}, f32)};
}

Four cpu(const at::Tensor& logits, const at::Tensor& seed, const at::Tensor& position,
         const at::Tensor& temperature, const OptionalTensor& top_k, const OptionalTensor& top_p,
         const OptionalTensor& min_p) {
  auto [token, logprob, full_logprob, entropy] =
      meta(logits, seed, position, temperature, top_k, top_p, min_p);
  const int64_t B = logits.size(0), V = logits.size(1);
  const float* temperatures = temperature.const_data_ptr<float>();
  const float* ps = top_p ? top_p->const_data_ptr<float>() : nullptr;
  const float* mins = min_p ? min_p->const_data_ptr<float>() : nullptr;
  const int64_t* ks = top_k ? top_k->const_data_ptr<int64_t>() : nullptr;
  for (int64_t b = 0; b < B; ++b) {
    TORCH_CHECK_VALUE(std::isfinite(temperatures[b]) && temperatures[b] >= 0.f, kOp,
                      ": temperature must be finite and >= 0, got ", temperatures[b], " at row ", b);
    TORCH_CHECK_VALUE(!ps || (ps[b] >= 0.f && ps[b] <= 1.f), kOp, ": top_p must be in [0, 1], got ",
                      ps ? ps[b] : 0.f, " at row ", b);
    TORCH_CHECK_VALUE(!mins || (mins[b] >= 0.f && mins[b] <= 1.f), kOp,
                      ": min_p must be in [0, 1], got ", mins ? mins[b] : 0.f, " at row ", b);
  }
  const DType dtype = dtype_of(logits);
  const auto* base = static_cast<const char*>(logits.const_data_ptr());
  const int64_t row_bytes = logits.stride(0) * logits.element_size();
  const int64_t* seeds = seed.const_data_ptr<int64_t>();
  const int64_t* positions = position.const_data_ptr<int64_t>();
  int64_t* tokens = token.mutable_data_ptr<int64_t>();
  float* lp = logprob.mutable_data_ptr<float>();
  float* full = full_logprob.mutable_data_ptr<float>();
  float* h = entropy.mutable_data_ptr<float>();
  const int64_t grain = 20000 / (40 * V) + 1;
  at::parallel_for(0, B, grain, [&](int64_t begin, int64_t end) {
    Scratch scratch(V);
    for (int64_t b = begin; b < end; ++b) {
      const Filters filters{ks ? ks[b] : 0, ps ? ps[b] : 1.0, mins ? mins[b] : 0.0};
      const double u = philox_uniform(seeds[b], positions[b]);
      const Sampled s =
          sample_row(dtype, V, base + b * row_bytes, temperatures[b], filters, u, scratch);
      tokens[b] = s.token;
      lp[b] = static_cast<float>(s.logprob);
      full[b] = static_cast<float>(s.full_logprob);
      h[b] = static_cast<float>(s.entropy);
    }
  });
  return {token, logprob, full_logprob, entropy};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(grpo_engine, m) {
  m.def(
      "sample_token(Tensor logits, Tensor seed, Tensor position, Tensor temperature, Tensor? top_k,"
      " Tensor? top_p, Tensor? min_p) -> (Tensor token, Tensor logprob, Tensor full_logprob,"
      " Tensor entropy)");
}
TORCH_LIBRARY_IMPL(grpo_engine, CPU, m) { m.impl(kOp, &cpu); }
TORCH_LIBRARY_IMPL(grpo_engine, Meta, m) { m.impl(kOp, &meta); }

}  // namespace grpo_engine
