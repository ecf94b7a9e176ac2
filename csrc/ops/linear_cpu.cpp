#include "ops/linear.h"

#include "core/gemm.h"

namespace grpo_engine::GE_ISA {
namespace {

template <typename SA, typename SB, typename SC>
void blocks(const GemmArgs& a, int64_t begin, int64_t end) {
  const int64_t down = (a.M + a.block_m - 1) / a.block_m;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t m = item % down * a.block_m, n = item / down * a.block_n;
    Gemm<SA, SB, SC> g{};
    g.M = a.M - m < a.block_m ? a.M - m : a.block_m;
    g.N = a.N - n < a.block_n ? a.N - n : a.block_n;
    g.K = a.K;
    g.a = static_cast<const SA*>(a.a) + m * a.a_row;
    g.a_row = a.a_row;
    g.a_col = a.a_col;
    g.b = static_cast<const SB*>(a.b) + n * a.b_col;
    g.b_row = a.b_row;
    g.b_col = a.b_col;
    g.bias = a.bias ? static_cast<const SB*>(a.bias) + n : nullptr;
    g.c = static_cast<SC*>(a.c) + m * a.c_row + n;
    g.c_row = a.c_row;
    g.accumulate = a.accumulate;
    run_gemm(g);
  }
}

template <typename SA, typename SB>
void blocks_for_c(const GemmArgs& a, int64_t begin, int64_t end) {
  if (a.c_dtype == DType::bf16) return blocks<SA, SB, bfloat16>(a, begin, end);
  blocks<SA, SB, float>(a, begin, end);
}

template <typename SA>
void blocks_for_b(const GemmArgs& a, int64_t begin, int64_t end) {
  if (a.b_dtype == DType::bf16) return blocks_for_c<SA, bfloat16>(a, begin, end);
  blocks_for_c<SA, float>(a, begin, end);
}

// Sums of NV vectors of columns, in registers; the last one has `last` columns.
template <int NV, typename S>
void sum_columns_of(const ColumnSumArgs& a, int64_t first, int last) {
  using V = Vec16<Arith<S>>;
  const S* dy = static_cast<const S*>(a.dy) + first;
  auto* dbias = static_cast<Arith<S>*>(a.dbias) + first;
  V sums[NV];
  for (int j = 0; j < NV; ++j) {
    sums[j] = a.accumulate ? load<V>(dbias + j * kLanes, j < NV - 1 ? kLanes : last) : V::zero();
  }
  for (int64_t t = 0; t < a.T; ++t, dy += a.O) {
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) {
      sums[j] = sums[j] + load<V>(dy + j * kLanes, j < NV - 1 ? kLanes : last);
    }
  }
  for (int j = 0; j < NV; ++j) store(sums[j], dbias + j * kLanes, j < NV - 1 ? kLanes : last);
}

template <typename S>
void sum_columns(const ColumnSumArgs& a, int64_t begin, int64_t end) {
  constexpr int kVectors = kColumnSumColumns / kLanes;
  const int64_t stop = end * kColumnSumColumns < a.O ? end * kColumnSumColumns : a.O;
  int64_t o = begin * kColumnSumColumns;
  for (; o + kColumnSumColumns <= stop; o += kColumnSumColumns) sum_columns_of<kVectors, S>(a, o, kLanes);
  for (; o + 2 * kLanes <= stop; o += 2 * kLanes) sum_columns_of<2, S>(a, o, kLanes);
  for (; o < stop; o += kLanes) {
    sum_columns_of<1, S>(a, o, static_cast<int>(stop - o < kLanes ? stop - o : kLanes));
  }
}

}  // namespace

void gemm(const GemmArgs& args, int64_t begin, int64_t end) {
  switch (args.a_dtype) {
    case DType::f32: return blocks_for_b<float>(args, begin, end);
    case DType::bf16: return blocks_for_b<bfloat16>(args, begin, end);
    case DType::f64: return blocks<double, double, double>(args, begin, end);
  }
}
void column_sum(const ColumnSumArgs& args, int64_t begin, int64_t end) { GE_FOR_DTYPE(sum_columns) }

}  // namespace grpo_engine::GE_ISA
