#include "ops/linear.h"

#include <ATen/Functions.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "core/checks.h"
#include "core/parallel.h"
#include "ops/linear_call.h"

namespace grpo_engine {

void gemm(GemmArgs args) {
  // A block's slice of A stays in the second-level cache and is copied once for many columns. Blocks are of one size.
  constexpr int64_t kPanel = 48, kTile = 24, kRows = 384, kColumns = 1056;  // multiples of what a tile has on any CPU
  const auto parts = [](int64_t n, int64_t size) { return (n + size - 1) / size; };
  const auto round_up = [&](int64_t n, int64_t step) { return parts(n, step) * step; };
  const auto even = [&](int64_t n, int64_t most, int64_t step) { return round_up(parts(n, parts(n, most)), step); };
  args.block_m = even(std::max<int64_t>(args.M, 1), kRows, kTile);
  args.block_n = even(std::max<int64_t>(args.N, 1), kColumns, kPanel);
  const auto blocks = [&] { return parts(args.M, args.block_m) * parts(args.N, args.block_n); };
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads(), wanted = threads > 1 ? 4 * threads : 1;
  while (blocks() < wanted && (args.block_n > kPanel || args.block_m > kTile)) {
    const bool by_columns = args.block_m <= kTile || (args.block_n > kPanel && args.block_n >= args.block_m);
    int64_t& block = by_columns ? args.block_n : args.block_m;
    block = round_up(block / 2, by_columns ? kPanel : kTile);
  }
  const double cost = 2.0 / 16.0 * args.K * std::min(args.block_m, args.M) * std::min(args.block_n, args.N);
  parallel_items(gemm_cpu, args, blocks(), cost);
}

void column_sum(const ColumnSumArgs& args) {
  parallel_items(column_sum_cpu, args, (args.O + kColumnSumColumns - 1) / kColumnSumColumns,
                 1.0 / 16.0 * args.T * std::min(kColumnSumColumns, args.O));
}

namespace {

constexpr const char* kOp = "linear";

using Three = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

void check(const at::Tensor& x, const at::Tensor& weight) {
  require_shape(kOp, "x", x, {-1, -1}, "[T, I]");
  require_float(kOp, "x", x);
  TORCH_CHECK_VALUE(x.size(1) <= 1 || x.stride(1) == 1, kOp, ": x must have adjacent columns, got sizes ", x.sizes(),
                    " with strides ", x.strides());
  require_shape(kOp, "weight", weight, {-1, x.size(1)}, "[O, I]");
  require_tensor(kOp, "weight", weight, weight.sizes(), "[O, I]", x.scalar_type(), x);
}

at::ScalarType output_dtype(const at::Tensor& x, std::optional<at::ScalarType> out_dtype) {
  const at::ScalarType dtype = out_dtype.value_or(x.scalar_type());
  TORCH_CHECK_VALUE(dtype == x.scalar_type() || (dtype == at::kFloat && x.scalar_type() == at::kBFloat16), kOp,
                    ": out_dtype must be the dtype of x, or Float for BFloat16 x, got ", dtype, " for ", x.scalar_type());
  return dtype;
}

at::Tensor forward_meta(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                        std::optional<at::ScalarType> out_dtype, bool /*batch_invariant*/) {
  check(x, weight);
  if (bias) require_tensor(kOp, "bias", *bias, {weight.size(0)}, "[O]", x.scalar_type(), x);
  return at::empty({x.size(0), weight.size(0)}, x.options().dtype(output_dtype(x, out_dtype)));
}

at::Tensor forward(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                   std::optional<at::ScalarType> out_dtype, bool batch_invariant) {
  at::Tensor y = forward_meta(x, weight, bias, out_dtype, batch_invariant);
  if (by_library(x, batch_invariant)) {
    const bool wide = y.scalar_type() != x.scalar_type();
    library_matmul(x, weight.t(), y, bias && !wide ? *bias : at::Tensor());
    return bias && wide ? y.add_(*bias) : y;
  }
  GemmArgs args{};
  args.a_dtype = args.b_dtype = dtype_of(x);
  args.c_dtype = dtype_of(y);
  args.M = x.size(0);
  args.N = weight.size(0);
  args.K = x.size(1);
  args.a = x.const_data_ptr();
  args.a_row = x.stride(0);
  args.a_col = 1;
  args.b = weight.const_data_ptr();
  args.b_row = 1;
  args.b_col = args.K;
  args.bias = bias ? bias->const_data_ptr() : nullptr;
  args.c = y.mutable_data_ptr();
  args.c_row = args.N;
  gemm_on(x, args);
  return y;
}

Three backward_meta(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight, bool need_x, bool need_weight,
                    bool need_bias, bool /*batch_invariant*/) {
  check(x, weight);
  require_shape(kOp, "dy", dy, {x.size(0), weight.size(0)}, "[T, O]");
  TORCH_CHECK_TYPE(
      dy.scalar_type() == x.scalar_type() || (dy.scalar_type() == at::kFloat && x.scalar_type() == at::kBFloat16), kOp,
      ": dy must be ", x.scalar_type(), " as x, or Float for BFloat16 x, got ", dy.scalar_type());
  require_contiguous(kOp, "dy", dy);
  require_same_device(kOp, "dy", dy, x);
  auto out = [&](bool need, at::IntArrayRef sizes) {
    return need ? at::empty(sizes, x.options()) : at::empty({0}, x.options());
  };
  return {out(need_x, x.sizes()), out(need_weight, weight.sizes()), out(need_bias, {weight.size(0)})};
}

Three backward(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight, bool need_x, bool need_weight,
               bool need_bias, bool batch_invariant) {
  auto [dx, dweight, dbias] = backward_meta(dy, x, weight, need_x, need_weight, need_bias, batch_invariant);
  const int64_t T = x.size(0), O = weight.size(0), I = x.size(1);
  if (need_bias) {
    at::Tensor sums = at::empty({on_cuda(dy) ? column_sum_chunks(T) : 1, O}, arithmetic(dy));
    const ColumnSumArgs columns{dtype_of(dy), T, O, dy.const_data_ptr(), sums.mutable_data_ptr()};
    if (!cuda_call(dy, [&](auto stream) { column_sum_cuda(columns, stream); })) column_sum(columns);
    dbias = sums.select(0, 0).to(x.scalar_type());
  }
  if (by_library(dy, batch_invariant)) {
    const at::Tensor factor = dy.to(x.scalar_type());
    if (need_x) library_matmul(factor, weight, dx);
    if (need_weight) library_matmul(factor.t(), x, dweight);
    return {dx, dweight, dbias};
  }
  GemmArgs args{};
  args.a_dtype = dtype_of(dy);
  args.a = dy.const_data_ptr();
  at::Tensor halves;
  if (on_cuda(dy) && dy.scalar_type() == at::kFloat && x.scalar_type() == at::kBFloat16 && (need_x || need_weight)) {
    halves = at::empty({2, T, O}, x.options());
    auto* high = static_cast<bfloat16*>(halves.mutable_data_ptr());
    cuda_call(dy, [&](auto stream) { split_cuda(dy.const_data_ptr<float>(), T * O, high, high + T * O, stream); });
    args.a_dtype = DType::bf16;
    args.a = high;
    args.a_low = high + T * O;
  }
  args.b_dtype = args.c_dtype = dtype_of(x);
  args.N = args.c_row = I;
  args.b_col = 1;
  if (need_x) {
    args.M = T;
    args.K = args.a_row = O;
    args.a_col = 1;
    args.b = weight.const_data_ptr();
    args.b_row = I;
    args.c = dx.mutable_data_ptr();
    gemm_on(x, args);
  }
  if (need_weight) {
    args.M = args.a_col = O;
    args.K = T;
    args.a_row = 1;
    args.b = x.const_data_ptr();
    args.b_row = x.stride(0);
    args.c = dweight.mutable_data_ptr();
    gemm_on(x, args);
  }
  return {dx, dweight, dbias};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(grpo_engine, m) {
  m.def("linear(Tensor x, Tensor weight, Tensor? bias, ScalarType? out_dtype, bool batch_invariant=True) -> Tensor");
  m.def(
      "linear_backward(Tensor dy, Tensor x, Tensor weight, bool need_x, bool need_weight,"
      " bool need_bias, bool batch_invariant=True) -> (Tensor dx, Tensor dweight, Tensor dbias)");
}
GE_DEVICE_IMPL(m) {
  m.impl("linear", &forward);
  m.impl("linear_backward", &backward);
}
TORCH_LIBRARY_IMPL(grpo_engine, Meta, m) {
  m.impl("linear", &forward_meta);
  m.impl("linear_backward", &backward_meta);
}

}  // namespace grpo_engine
