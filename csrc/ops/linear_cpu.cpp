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

template <typename S>
void sum_columns(const ColumnSumArgs& a, int64_t begin, int64_t end) {
  using A = Arith<S>;
  using V = Vec16<A>;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kColumnSumColumns;
    const int64_t columns = a.O - first < kColumnSumColumns ? a.O - first : kColumnSumColumns;
    V sums[kColumnSumColumns / kLanes];
    for (V& s : sums) s = V::zero();
    for (int64_t t = 0; t < a.T; ++t) {
      const S* dy = static_cast<const S*>(a.dy) + t * a.O + first;
      each_vector(columns, [&](int64_t o, int n) {
        sums[o / kLanes] = sums[o / kLanes] + load<V>(dy + o, n);
      });
    }
    each_vector(columns, [&](int64_t o, int n) {
      store(sums[o / kLanes], static_cast<A*>(a.dbias) + first + o, n);
    });
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
