#include "ops/sample_token.h"

#include "core/row_stats.h"

namespace grpo_engine::GE_ISA {
namespace {

static_assert(kSampleBlock == kRowBlock);

GE_INLINE int64_t block_length(const SampleRow& row, int64_t block) {
  const int64_t left = row.V - block * kRowBlock;
  return left < kRowBlock ? left : kRowBlock;
}

template <typename S>
void blocks(SampleRow& row) {
  const S* x = static_cast<const S*>(row.logits);
  RowStats stats;
  const int64_t num_blocks = (row.V + kRowBlock - 1) / kRowBlock;
  for (int64_t b = 0; b < num_blocks; ++b) {
    const BlockStats s = block_stats(x + b * kRowBlock, block_length(row, b), row.inv_temperature);
    row.block_max[b] = s.max;
    row.block_sum[b] = s.sum;
    stats.add(s);
  }
  row.max = stats.max;
  row.sum = stats.sum;
  row.entropy = stats.entropy();
}

template <typename S>
void gather(SampleRow& row) {
  const S* x = static_cast<const S*>(row.logits);
  const int64_t num_blocks = (row.V + kRowBlock - 1) / kRowBlock;
  int64_t count = 0;
  for (int64_t b = 0; b < num_blocks; ++b) {
    if (row.block_max[b] < row.threshold) continue;  // most blocks of a peaked row
    const int64_t first = b * kRowBlock, n = block_length(row, b);
    for (int64_t i = 0; i < n; ++i) {
      const float z = to_arith(x[first + i]) * row.inv_temperature;
      row.candidate_id[count] = first + i;
      row.candidate_z[count] = z;
      count += z >= row.threshold;
    }
  }
  row.num_candidates = count;
}

template <typename S>
void pick(SampleRow& row) {
  const int64_t first = row.block * kRowBlock, n = block_length(row, row.block);
  const S* x = static_cast<const S*>(row.logits) + first;
  const VecF scale = VecF::set1(row.inv_temperature), shift = VecF::set1(row.block_max[row.block]);
  float mass[kRowBlock];
  double total = 0.0;
  each_vector(n, [&](int64_t i, int count) {
    store(vexp(load<VecF>(x + i, count) * scale - shift), mass + i, count);
  });
  for (int64_t i = 0; i < n; ++i) total += mass[i];
  const double target = row.share * total;
  double passed = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    if (mass[i] <= 0.f) continue;  // a token of probability 0 is never drawn
    passed += mass[i];
    row.token = first + i;
    if (passed >= target) return;
  }
}

template <typename S>
void argmax(SampleRow& row) {
  const S* x = static_cast<const S*>(row.logits);
  int64_t b = 0;
  while (static_cast<double>(row.block_max[b]) != row.max) ++b;
  row.token = b * kRowBlock;
  while (static_cast<double>(to_arith(x[row.token]) * row.inv_temperature) != row.max) ++row.token;
}

}  // namespace

#define GE_EACH_ROW(function)                            \
  for (int64_t i = begin; i < end; ++i) {                \
    SampleRow& row = args.row[i];                        \
    if (row.dtype == DType::bf16) function<bfloat16>(row); \
    else function<float>(row);                           \
  }
void sample_blocks(const SampleRows& args, int64_t begin, int64_t end) { GE_EACH_ROW(blocks) }
void sample_gather(const SampleRows& args, int64_t begin, int64_t end) { GE_EACH_ROW(gather) }
void sample_pick(const SampleRows& args, int64_t begin, int64_t end) { GE_EACH_ROW(pick) }
void sample_argmax(const SampleRows& args, int64_t begin, int64_t end) { GE_EACH_ROW(argmax) }

}  // namespace grpo_engine::GE_ISA
