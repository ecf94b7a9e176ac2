// linear -- y = x W^T + bias, and its gradients.
//
//   y[t,o] = sum_i x[t,i] weight[o,i] + bias[o]
//   dx[t,i] = sum_o dy[t,o] weight[o,i]    dweight[o,i] = sum_t dy[t,o] x[t,i]    dbias[o] = sum_t dy[t,o]
//
// core/gemm.h computes all three matmuls. Each output element is one chain of fused multiply-adds in float32 for float32
// and bfloat16. So a row of y has the same bits in a batch of any size, on any number of threads. The index of the sum
// ascends for float32, where subnormals are kept. It descends for bfloat16, where subnormals count as 0. Results are
// rounded once, to nearest even. NaN and inf follow IEEE arithmetic.
//
// On CUDA the order is ascending and subnormals are kept. For float32 an element is one chain, as on the CPU. For bfloat16
// each 256 terms are one chain of the tensor cores' sums of 16 terms, and these chains are added in ascending order. A
// float32 dy counts as the sum of two bfloat16. The bits depend neither on the batch nor on the size of the tiles.
// batch_invariant = false hands the matmuls on CUDA to torch's library (cuBLAS), whose sums change with the shape. A float32
// dy is then rounded to the dtype of x first.
//
//   x, dx [T, I]   weight, dweight [O, I]   bias, dbias [O]   y, dy [T, O]      T, I = 0 are allowed
#pragma once
#include "core/cpu_dispatch.h"
#include "core/cuda_stream.h"
#include "core/dtype.h"

namespace grpo_engine {

// C[m,n] = sum_k A[m,k] B[k,n] + bias[n]; strides in elements, one of each pair is 1.
struct GemmArgs {
  DType a_dtype, b_dtype, c_dtype;  // all f64, or any of f32 and bf16
  int64_t M, N, K;
  const void* a;
  int64_t a_row, a_col;
  const void* b;
  int64_t b_row, b_col;
  const void* bias;  // [N] of b_dtype, or null
  void* c;  // [M, N], rows adjacent
  int64_t c_row;
  bool accumulate;  // add to C; c_dtype f32 or f64
  int64_t block_m, block_n;  // size of a work item; gemm() chooses it
  const void* a_low = nullptr;  // CUDA, bfloat16: A is a + a_low; the terms of a come first
};

GE_CPU_MATMUL_KERNEL(gemm, GemmArgs)  // items: blocks of C, down the rows first

// Runs the whole matmul over the thread pool.
void gemm(GemmArgs args);

// A and B of one dtype.
void gemm_cuda(const GemmArgs&, CudaStream);
// x[i] as the sum of two bfloat16, for A of gemm_cuda.
void split_cuda(const float* x, int64_t count, bfloat16* high, bfloat16* low, CudaStream);

// The three matmuls of a layer whose x, dy, weight and results all have one dtype and adjacent rows.
// y [T, O] = x [T, I] weight^T + bias
inline GemmArgs linear_matmul(DType dtype, int64_t T, int64_t I, int64_t O, const void* x, const void* weight,
                              const void* bias, void* y) {
  return {dtype, dtype, dtype, T, O, I, x, I, 1, weight, 1, I, bias, y, O, false, 0, 0};
}
// dx [T, I] = dy [T, O] weight
inline GemmArgs linear_dx_matmul(DType dtype, int64_t T, int64_t I, int64_t O, const void* dy, const void* weight,
                                 void* dx) {
  return {dtype, dtype, dtype, T, I, O, dy, O, 1, weight, I, 1, nullptr, dx, I, false, 0, 0};
}
// dweight [O, I] = dy^T x
inline GemmArgs linear_dweight_matmul(DType dtype, int64_t T, int64_t I, int64_t O, const void* dy, const void* x,
                                      void* dweight) {
  return {dtype, dtype, dtype, O, I, T, dy, 1, O, x, I, 1, nullptr, dweight, I, false, 0, 0};
}

struct ColumnSumArgs {
  DType dtype;
  int64_t T, O;
  const void* dy;  // [T, O]
  void* dbias;  // [O] of dtype's arithmetic type; CUDA: [column_sum_chunks(T), O], the result in the first row
};

inline constexpr int64_t kColumnSumColumns = 128;  // columns in one work item

GE_CPU_KERNEL(column_sum, ColumnSumArgs)  // items: blocks of kColumnSumColumns columns

// dbias[o] = sum_t dy[t,o] over the thread pool: one chain of additions in ascending t.
void column_sum(const ColumnSumArgs& args);

// CUDA adds up chunks of rows, and then the chunks in order.
inline constexpr int64_t kColumnSumRows = 128;
inline int64_t column_sum_chunks(int64_t T) { return T <= kColumnSumRows ? 1 : (T + kColumnSumRows - 1) / kColumnSumRows; }
void column_sum_cuda(const ColumnSumArgs&, CudaStream);

}  // namespace grpo_engine
