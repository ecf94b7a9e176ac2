// decoder_layer on a CPU: tiles of rows go from input to output inside the second-level cache.
#include "ops/decoder_layer.h"

#include <ATen/Functions.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <tuple>

#include "core/op_call.h"
#include "core/parallel.h"
#include "core/scratch.h"
#include "ops/decoder_layer_call.h"
#include "ops/linear.h"
#include "ops/rms_norm.h"
#include "ops/rope.h"
#include "ops/rope_table.h"
#include "ops/swiglu.h"

namespace grpo_engine {
namespace {

using namespace layer;

// ---------------------------------------------------------------- tiles of rows

// A tile goes from stage to stage inside the second-level cache. It starts at a chunk of the norms' dweight.
constexpr int64_t kTileRows = 256;
static_assert(kTileRows % kRmsNormRows == 0);
// With fewer rows the threads share each matmul by its columns, not its rows.
constexpr int64_t kFewRows = 64;

// stage(first row, rows) over all T rows, on all threads.
template <typename Stage>
void each_tile(int64_t T, Stage stage) {
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  if (threads == 1 || T < kFewRows) {
    for (int64_t row = 0; row < T; row += kTileRows) stage(row, std::min(kTileRows, T - row));
    return;
  }
  const int64_t chunks = rms_norm_chunks(T);
  const int64_t rows = std::min(kTileRows, (chunks + threads - 1) / threads * kRmsNormRows);
  constexpr double kAlways = 1e9;  // a tile is worth a thread at any width
  parallel_ranges((T + rows - 1) / rows, kAlways, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) stage(i * rows, std::min(rows, T - i * rows));
  });
}

// Memory of one stage on one tile, [rows, width] of the layer's dtype.
class TileBuffer {
 public:
  TileBuffer(const Tensor& like, int64_t rows, int64_t width)
      : memory_(rows * width * static_cast<int64_t>(like.element_size())) {}
  operator void*() const { return memory_.data(); }

 private:
  Scratch memory_;
};

void* row_of(const Tensor& t, int64_t row) {
  return static_cast<char*>(t.data_ptr()) + row * t.stride(0) * static_cast<int64_t>(t.element_size());
}

// ---------------------------------------------------------------- stages

// y [rows, O] = x [rows, I] weight^T + bias
void project(const Layer& l, int64_t rows, const void* x, const Tensor& weight, const std::optional<Tensor>& bias, void* y) {
  gemm(linear_matmul(l.dtype, rows, weight.size(1), weight.size(0), x, weight.const_data_ptr(),
                     bias ? bias->const_data_ptr() : nullptr, y));
}

// dx [rows, I] = dy [rows, O] weight
void project_back(const Layer& l, int64_t rows, const void* dy, const Tensor& weight, void* dx) {
  gemm(linear_dx_matmul(l.dtype, rows, weight.size(1), weight.size(0), dy, weight.const_data_ptr(), dx));
}

// dweight [O, I] = dy [T, O]^T x [T, I]
Tensor weight_gradient(const Layer& l, const Tensor& dy, const Tensor& x) {
  Tensor dweight = at::empty({dy.size(1), x.size(1)}, x.options());
  gemm(linear_dweight_matmul(l.dtype, dy.size(0), x.size(1), dy.size(1), dy.const_data_ptr(), x.const_data_ptr(),
                             dweight.mutable_data_ptr()));
  return dweight;
}

RmsNormArgs norm_args(const Layer& l, int64_t rows, const void* x, const Tensor& weight) {
  RmsNormArgs n{};
  n.dtype = l.dtype;
  n.T = rows;
  n.D = l.D;
  n.eps = l.eps;
  n.x = x;
  n.weight = weight.const_data_ptr();
  return n;
}

void norm(const RmsNormArgs& n) { parallel_items(rms_norm_forward_cpu, n, n.T, 4.0 * n.D); }

// dx = the norm's input gradient + dsum; the rows' chunks of its weight gradient go to dweight.
void norm_back(const Layer& l, int64_t row, int64_t rows, const void* dy, const Tensor& x, const Tensor& weight,
               const Tensor& rstd, const void* dsum, const Tensor& dx, const Tensor& dweight) {
  RmsNormArgs n = norm_args(l, rows, row_of(x, row), weight);
  n.dy = dy;
  n.rstd = row_of(rstd, row);
  n.dsum = dsum;
  n.dx = row_of(dx, row);
  n.dweight = row_of(dweight, row / kRmsNormRows);
  parallel_items(rms_norm_backward_cpu, n, rms_norm_chunks(rows), 12.0 * l.D * kRmsNormRows);
}

Tensor norm_weight_chunks(const Layer& l, const Tensor& x) {
  const int64_t chunks = rms_norm_chunks(x.size(0));
  return chunks > 0 ? at::empty({chunks, l.D}, arithmetic(x)) : at::zeros({1, l.D}, arithmetic(x));
}

Tensor norm_weight_gradient(const Layer& l, const Tensor& x, const Tensor& dweight) {
  RmsNormArgs n{};
  n.dtype = l.dtype;
  n.T = x.size(0);
  n.D = l.D;
  n.dweight = dweight.data_ptr();
  const int64_t blocks = (l.D + kRmsNormColumns - 1) / kRmsNormColumns;
  parallel_items(rms_norm_join_cpu, n, blocks, 1.0 * dweight.size(0) * kRmsNormColumns);
  return dweight[0].to(x.scalar_type(), /*non_blocking=*/false, /*copy=*/true);
}

struct Angles {
  RopeTable table;
  const int64_t* position;
};

// The first `heads` heads of rows [row, row + rows), turned from x into y.
void turn(const Layer& l, const Angles& angles, int64_t row, int64_t rows, int64_t heads, bool inverse, const void* x,
          int64_t x_stride, void* y, int64_t y_stride) {
  const bool by_token = angles.table.first_position < 0;
  RopeArgs r{};
  r.dtype = l.dtype;
  r.T = rows;
  r.H = heads;
  r.E = l.E;
  r.x_stride = x_stride;
  r.y_stride = y_stride;
  r.inverse = inverse;
  r.x = x;
  r.y = y;
  r.table = angles.table.rows->data() + (by_token ? row * l.E : 0);
  r.position = angles.position + row;
  r.first_position = angles.table.first_position;
  parallel_items(rope_cpu, r, rows, 3.0 * heads * l.E);
}

Angles angles_of(const Layer& l, const Tensor& position) {
  const int64_t* p = position.const_data_ptr<int64_t>();
  return {rope_table(kOp, p, position.size(0), l.E, l.theta), p};
}

void add(const Layer& l, int64_t rows, const void* a, void* b) {
  parallel_items(add_rows_cpu, AddRowsArgs{l.dtype, l.D, a, b}, rows, 1.0 * l.D);
}

// x -> turned queries and keys, and values, of all rows.
void qkv_stage(const Layer& l, const Tensor& x, const Tensor& position, const Tensor& rstd, const Tensor& qkv) {
  const Angles angles = angles_of(l, position);
  each_tile(x.size(0), [&](int64_t row, int64_t rows) {
    const TileBuffer h(x, rows, l.D);
    RmsNormArgs n = norm_args(l, rows, row_of(x, row), l.w.attn_norm);
    n.y = h;
    n.rstd = row_of(rstd, row);
    norm(n);
    void* out = row_of(qkv, row);
    project(l, rows, h, l.w.qkv, l.w.qkv_bias, out);
    turn(l, angles, row, rows, l.H + l.K, false, out, l.qkv_width(), out, l.qkv_width());
  });
}

// Attention's output -> y. `s`, `rstd` and `gate_up` are kept where they are defined.
void mlp_stage(const Layer& l, const Tensor& x, const Tensor& attn, const Tensor& s, const Tensor& rstd,
               const Tensor& gate_up, const Tensor& y) {
  each_tile(x.size(0), [&](int64_t row, int64_t rows) {
    const TileBuffer h(x, rows, l.D), activation(x, rows, l.F);
    const TileBuffer own_gate_up(x, gate_up.defined() ? 0 : rows, 2 * l.F), own_s(x, s.defined() ? 0 : rows, l.D);
    void* sum = s.defined() ? row_of(s, row) : own_s;
    void* gates = gate_up.defined() ? row_of(gate_up, row) : own_gate_up;
    void* out = row_of(y, row);
    project(l, rows, row_of(attn, row), l.w.out, std::nullopt, out);
    RmsNormArgs n = norm_args(l, rows, out, l.w.mlp_norm);
    n.residual = row_of(x, row);
    n.sum = sum;
    n.y = h;
    n.rstd = row_of(rstd, row);
    norm(n);
    project(l, rows, h, l.w.gate_up, std::nullopt, gates);
    SwigluArgs g{};
    g.dtype = l.dtype;
    g.T = rows;
    g.F = l.F;
    g.gate_up = gates;
    g.y = activation;
    parallel_items(swiglu_forward_cpu, g, rows, 20.0 * l.F);
    project(l, rows, activation, l.w.down, std::nullopt, out);
    add(l, rows, sum, out);
  });
}

// ---------------------------------------------------------------- attention, by the ops' own names

std::tuple<Tensor, Tensor> ragged_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu,
                                            const std::optional<Tensor>& cu_groups, double scale) {
  static const auto call =
      op<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&,
                                    double)>("grpo_engine::ragged_attention");
  return call.call(q, k, v, cu, cu_groups, scale);
}

// ---------------------------------------------------------------- forward

Forward forward_cpu(const Tensor& x, const Tensor& attn_norm, const Tensor& qkv_weight,
                    const std::optional<Tensor>& qkv_bias, const Tensor& out_weight, const Tensor& mlp_norm,
                    const Tensor& gate_up_weight, const Tensor& down_weight, const Tensor& position,
                    const Tensor& cu_seqlens, const std::optional<Tensor>& cu_groups, int64_t num_kv_heads, int64_t head_dim,
                    double theta, double eps, bool save, bool /*batch_invariant*/) {
  const Weights w{attn_norm, qkv_weight, qkv_bias, out_weight, mlp_norm, gate_up_weight, down_weight};
  const Layer l = check(x, w, position, num_kv_heads, head_dim, theta, eps);
  const int64_t T = x.size(0);
  const Tensor y = at::empty_like(x), qkv = at::empty({T, l.qkv_width()}, x.options());
  const Tensor rstd = at::empty({2, T}, arithmetic(x));
  Tensor s, gate_up;
  if (save) {
    s = at::empty_like(x);
    gate_up = at::empty({T, 2 * l.F}, x.options());
  }
  if (T > 0) qkv_stage(l, x, position, rstd.select(0, 0), qkv);
  const Heads heads = split(l, qkv);
  const auto [attn, stats] = ragged_attention(heads.q, heads.k, heads.v, cu_seqlens, cu_groups, attention_scale(l));
  const Tensor attn_rows = attn.view({T, l.H * l.E});
  mlp_stage(l, x, attn_rows, s, rstd.select(0, 1), gate_up, y);
  if (save) return {y, qkv, attn_rows, stats, s, rstd, gate_up};
  const Tensor none = at::empty({0}, x.options()), no_numbers = at::empty({0}, arithmetic(x));
  return {y, none, none.clone(), no_numbers, none.clone(), no_numbers.clone(), none.clone()};
}

// ---------------------------------------------------------------- backward

Backward backward_cpu(const Tensor& dy, const Tensor& x, const Tensor& attn_norm, const Tensor& qkv_weight,
                      const std::optional<Tensor>& qkv_bias, const Tensor& out_weight, const Tensor& mlp_norm,
                      const Tensor& gate_up_weight, const Tensor& down_weight, const Tensor& position,
                      const Tensor& cu_seqlens, const std::optional<Tensor>& cu_groups, const Tensor& qkv,
                      const Tensor& attn, const Tensor& stats, const Tensor& s, const Tensor& rstd, const Tensor& gate_up,
                      int64_t num_kv_heads, int64_t head_dim, double theta, double eps, bool /*batch_invariant*/) {
  const Weights w{attn_norm, qkv_weight, qkv_bias, out_weight, mlp_norm, gate_up_weight, down_weight};
  const Layer l = check(x, w, position, num_kv_heads, head_dim, theta, eps);
  check_backward(dy, x, gate_up);
  const int64_t T = x.size(0);
  const Tensor attn_rstd = rstd.select(0, 0), mlp_rstd = rstd.select(0, 1);
  const Tensor dgate_up = at::empty_like(gate_up), activation = at::empty({T, l.F}, x.options());
  const Tensor h = at::empty_like(x), ds = at::empty_like(x), dattn = at::empty_like(attn);
  const Tensor mlp_chunks = norm_weight_chunks(l, x), attn_chunks = norm_weight_chunks(l, x);

  each_tile(T, [&](int64_t row, int64_t rows) {
    const TileBuffer dactivation(x, rows, l.F);
    project_back(l, rows, row_of(dy, row), w.down, dactivation);
    SwigluArgs g{};
    g.dtype = l.dtype;
    g.T = rows;
    g.F = l.F;
    g.gate_up = row_of(gate_up, row);
    g.dy = dactivation;
    g.y = row_of(activation, row);
    g.dgate_up = row_of(dgate_up, row);
    parallel_items(swiglu_backward_cpu, g, rows, 30.0 * l.F);
    const TileBuffer dh(x, rows, l.D);
    project_back(l, rows, row_of(dgate_up, row), w.gate_up, dh);
    RmsNormArgs n = norm_args(l, rows, row_of(s, row), w.mlp_norm);
    n.y = row_of(h, row);
    n.rstd = row_of(mlp_rstd, row);
    norm(n);
    norm_back(l, row, rows, dh, s, w.mlp_norm, mlp_rstd, row_of(dy, row), ds, mlp_chunks);
    project_back(l, rows, row_of(ds, row), w.out, row_of(dattn, row));
  });
  const Tensor ddown = weight_gradient(l, dy, activation), dgate_up_weight = weight_gradient(l, dgate_up, h);
  const Tensor dmlp_norm = norm_weight_gradient(l, x, mlp_chunks);
  const Tensor dout = weight_gradient(l, ds, attn);

  static const auto attention_backward =
      op<std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                            const std::optional<Tensor>&, const Tensor&, const Tensor&, double)>(
          "grpo_engine::ragged_attention_backward");
  const Heads heads = split(l, qkv);
  Tensor dq, dk, dv;  // a lambda of C++20 captures no structured binding, as clang has it
  std::tie(dq, dk, dv) = attention_backward.call(dattn.view({T, l.H, l.E}), heads.q, heads.k, heads.v, cu_seqlens, cu_groups,
                                                 attn.view({T, l.H, l.E}), stats, attention_scale(l));

  const Tensor dqkv = at::empty_like(qkv), dx = at::empty_like(x);
  if (T > 0) {
    const Angles angles = angles_of(l, position);
    each_tile(T, [&](int64_t row, int64_t rows) {
      const int64_t width = l.qkv_width(), size = x.element_size();
      char* out = static_cast<char*>(row_of(dqkv, row));
      turn(l, angles, row, rows, l.H, true, row_of(dq, row), l.H * l.E, out, width);
      turn(l, angles, row, rows, l.K, true, row_of(dk, row), l.K * l.E, out + l.H * l.E * size, width);
      for (int64_t r = 0; r < rows; ++r) {
        std::memcpy(out + (r * width + (l.H + l.K) * l.E) * size, row_of(dv, row + r), l.K * l.E * size);
      }
      const TileBuffer dh(x, rows, l.D);
      project_back(l, rows, out, w.qkv, dh);
      RmsNormArgs n = norm_args(l, rows, row_of(x, row), w.attn_norm);
      n.y = row_of(h, row);
      n.rstd = row_of(attn_rstd, row);
      norm(n);
      norm_back(l, row, rows, dh, x, w.attn_norm, attn_rstd, row_of(ds, row), dx, attn_chunks);
    });
  }
  const Tensor dqkv_weight = weight_gradient(l, dqkv, h);
  Tensor dbias = at::empty({0}, x.options());  // of no bias
  if (qkv_bias) {
    const Tensor sums = at::empty({l.qkv_width()}, arithmetic(x));
    column_sum({l.dtype, T, l.qkv_width(), dqkv.const_data_ptr(), sums.mutable_data_ptr()});
    dbias = sums.to(x.scalar_type());
  }
  const Tensor dattn_norm = norm_weight_gradient(l, x, attn_chunks);
  return {dx, dattn_norm, dqkv_weight, dbias, dout, dmlp_norm, dgate_up_weight, ddown};
}

// ---------------------------------------------------------------- over pages

Tensor paged_cpu(const Tensor& x, const Tensor& attn_norm, const Tensor& qkv_weight, const std::optional<Tensor>& qkv_bias,
                 const Tensor& out_weight, const Tensor& mlp_norm, const Tensor& gate_up_weight, const Tensor& down_weight,
                 const Tensor& position, Tensor& key_pages, Tensor& value_pages, const Tensor& slot,
                 const Tensor& page_table, const Tensor& cu_query, const Tensor& kv_len, double theta, double eps,
                 bool /*batch_invariant*/) {
  const Weights w{attn_norm, qkv_weight, qkv_bias, out_weight, mlp_norm, gate_up_weight, down_weight};
  const Layer l = check_paged(x, w, position, key_pages, theta, eps);
  const int64_t T = x.size(0);
  const Tensor y = at::empty_like(x), qkv = at::empty({T, l.qkv_width()}, x.options());
  const Tensor rstd = at::empty({T}, arithmetic(x));
  if (T == 0) return y;
  qkv_stage(l, x, position, rstd, qkv);
  static const auto write = op<void(const Tensor&, const Tensor&, Tensor&, Tensor&, const Tensor&)>("grpo_engine::kv_write");
  static const auto attend =
      op<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, double)>(
          "grpo_engine::paged_attention");
  const Heads heads = split(l, qkv);
  write.call(heads.k, heads.v, key_pages, value_pages, slot);
  const Tensor attn = attend.call(heads.q, key_pages, value_pages, page_table, cu_query, kv_len, attention_scale(l));
  mlp_stage(l, x, attn.view({T, l.H * l.E}), Tensor(), rstd, Tensor(), y);
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(grpo_engine, CPU, m) {
  m.impl("decoder_layer", &forward_cpu);
  m.impl("decoder_layer_backward", &backward_cpu);
  m.impl("decoder_layer_paged", &paged_cpu);
}
}  // namespace grpo_engine
