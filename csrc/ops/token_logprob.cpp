#include "ops/token_logprob.h"

#include <ATen/Functions.h>

#include <algorithm>
#include <tuple>

#include "core/checks.h"
#include "core/parallel.h"
#include "ops/linear_call.h"

namespace grpo_engine {
namespace {

constexpr const char* kOp = "token_logprob";
// Rows of a tile and of the window of dlogits that backward holds. The window has kWindowBlocks tiles for each thread, so
// that none waits long for another and each tile keeps all its rows: weights are copied once for 256 of them.
constexpr int64_t kWave = 256, kWindowBlocks = 4;

struct Window {
  int64_t rows, ids;
};
// The window that CUDA holds in either pass: its multiprocessors need more at once. 16 MiB of float32 fit into the
// second-level cache. The library is fastest with larger matmuls: 64 MiB. It gets more rows rather than more ids, because
// each window of ids reads and writes the sums of all rows.
Window cuda_window(int64_t T, int64_t V, bool library) {
  constexpr int64_t kSide = 2048;
#ifdef GE_CUDA_EMULATED
  constexpr int64_t kLibrarySide = 1024;  // so that a test has more than one window in a second
#else
  constexpr int64_t kLibrarySide = 4096;
#endif
  if (!library) return {std::min(T, kSide), std::min(V, kSide)};
  const int64_t rows = std::min(T, kLibrarySide), ids = kLibrarySide * kLibrarySide / std::max<int64_t>(rows, 1);
  return {rows, std::min(V, ids / kVocabBlock * kVocabBlock)};
}

using Three = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

at::ScalarType arithmetic(const at::Tensor& hidden) {
  return hidden.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

int64_t count_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Rows of a tile: fewer where that leaves a thread without work.
int64_t wave_for(int64_t rows, int64_t ids) {
  const int64_t threads = at::get_num_threads(), wanted = threads > 1 ? 4 * threads : 1;
  int64_t wave = std::min(kWave, count_of(std::max<int64_t>(rows, 1), 8) * 8);
  while (wave > 8 && count_of(rows, wave) * count_of(ids, kVocabBlock) < wanted) {
    wave = count_of(wave / 2, 8) * 8;
  }
  return wave;
}

double tile_cost(const TokenLogprobArgs& args) {
  return static_cast<double>(args.wave) * kVocabBlock * (2.0 / 16.0 * args.D + 2.0);
}

void check(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& target, double temperature) {
  require_shape(kOp, "hidden", hidden, {-1, -1}, "[T, D]");
  require_float(kOp, "hidden", hidden);
  require_contiguous(kOp, "hidden", hidden);
  require_shape(kOp, "weight", weight, {-1, hidden.size(1)}, "[V, D]");
  TORCH_CHECK_VALUE(weight.size(0) > 0, kOp, ": weight needs V >= 1 rows, got ", weight.sizes());
  require_tensor(kOp, "weight", weight, weight.sizes(), "[V, D]", hidden.scalar_type(), hidden);
  require_tensor(kOp, "target", target, {hidden.size(0)}, "[T]", at::kLong, hidden);
  require_positive(kOp, "temperature", temperature);
}

TokenLogprobArgs arguments(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& target,
                           double temperature) {
  TokenLogprobArgs args{};
  args.dtype = dtype_of(hidden);
  args.T = hidden.size(0);
  args.D = hidden.size(1);
  args.V = weight.size(0);
  args.temperature = temperature;
  args.hidden = hidden.const_data_ptr();
  args.weight = weight.const_data_ptr();
  args.target = target.const_data_ptr<int64_t>();
  return args;
}

Three forward_meta(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& target, double temperature,
                   bool /*batch_invariant*/) {
  check(hidden, weight, target, temperature);
  const int64_t T = hidden.size(0);
  const auto out = hidden.options().dtype(arithmetic(hidden));
  return {at::empty({T}, out), at::empty({T}, out), at::empty({T, 3}, out.dtype(at::kDouble))};
}

// [rows of the window, ids of the window] at the start of a buffer.
at::Tensor view_of(const at::Tensor& buffer, const TokenLogprobArgs& args) {
  return buffer.as_strided({args.num_rows, args.num_ids}, {args.num_ids, 1});
}

// CUDA: the logits of the window, in args.dlogits, the memory of `window`.
void logits_of_window(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& window,
                      const TokenLogprobArgs& args, bool library) {
  const at::Tensor rows = hidden.narrow(0, args.first_row, args.num_rows),
                   ids = weight.narrow(0, args.first_id, args.num_ids);
  if (library) return library_matmul(rows, ids.t(), view_of(window, args));
  GemmArgs matmul = linear_matmul(args.dtype, args.num_rows, args.D, args.num_ids, rows.const_data_ptr(),
                                  ids.const_data_ptr(), nullptr, args.dlogits);
  matmul.c_dtype = args.dtype == DType::f64 ? DType::f64 : DType::f32;
  gemm_on(hidden, matmul);
}

void forward_on_cuda(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& logprob, TokenLogprobArgs& args,
                     bool library) {
  const auto [rows, ids] = cuda_window(args.T, args.V, library);
  const at::Tensor window = at::empty({rows, ids}, logprob.options());
  args.dlogits = window.mutable_data_ptr();
  for (args.first_id = 0; args.first_id < args.V; args.first_id += ids) {
    args.num_ids = std::min(ids, args.V - args.first_id);
    for (args.first_row = 0; args.first_row < args.T; args.first_row += rows) {
      args.num_rows = std::min(rows, args.T - args.first_row);
      logits_of_window(hidden, weight, window, args, library);
      cuda_call(hidden, [&](auto stream) { token_logprob_blocks_cuda(args, stream); });
    }
  }
  cuda_call(hidden, [&](auto stream) { token_logprob_join_cuda(args, stream); });
}

Three forward(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& target, double temperature,
              bool batch_invariant) {
  auto [logprob, entropy, saved] = forward_meta(hidden, weight, target, temperature, batch_invariant);
  TokenLogprobArgs args = arguments(hidden, weight, target, temperature);
  for (int64_t t = 0; t < args.T && !on_cuda(target); ++t) {
    TORCH_CHECK_VALUE(args.target[t] >= 0 && args.target[t] < args.V, kOp, ": target must be in [0, V) = [0, ", args.V,
                      "), got ", args.target[t], " at row ", t);
  }
  const int64_t num_blocks = count_of(args.V, kVocabBlock);
  at::Tensor blocks = at::empty({args.T, num_blocks, 3}, logprob.options());
  at::Tensor target_logit = at::empty({args.T}, logprob.options());
  args.wave = wave_for(args.T, args.V);
  args.blocks = blocks.mutable_data_ptr();
  args.target_logit = target_logit.mutable_data_ptr();
  args.logprob = logprob.mutable_data_ptr();
  args.entropy = entropy.mutable_data_ptr();
  args.saved = saved.mutable_data_ptr<double>();
  if (on_cuda(hidden)) {
    forward_on_cuda(hidden, weight, logprob, args, by_library(hidden, batch_invariant));
    return {logprob, entropy, saved};
  }
  parallel_items(token_logprob_blocks_cpu, args, count_of(args.T, args.wave) * num_blocks, tile_cost(args));
  parallel_items(token_logprob_join_cpu, args, args.T, 50.0 * num_blocks);
  return {logprob, entropy, saved};
}

std::tuple<at::Tensor, at::Tensor> backward_meta(const at::Tensor& g_logprob, const at::Tensor& g_entropy,
                                                 const at::Tensor& hidden, const at::Tensor& weight,
                                                 const at::Tensor& target, const at::Tensor& saved, double temperature,
                                                 bool need_hidden, bool need_weight, bool /*batch_invariant*/) {
  check(hidden, weight, target, temperature);
  const int64_t T = hidden.size(0);
  require_tensor(kOp, "g_logprob", g_logprob, {T}, "[T]", arithmetic(hidden), hidden);
  require_tensor(kOp, "g_entropy", g_entropy, {T}, "[T]", arithmetic(hidden), hidden);
  require_tensor(kOp, "saved", saved, {T, 3}, "[T, 3]", at::kDouble, hidden);
  auto out = [](bool need, const at::Tensor& like) { return need ? at::empty_like(like) : at::empty({0}, like.options()); };
  return {out(need_hidden, hidden), out(need_weight, weight)};
}

std::tuple<at::Tensor, at::Tensor> backward(const at::Tensor& g_logprob, const at::Tensor& g_entropy,
                                            const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& target,
                                            const at::Tensor& saved, double temperature, bool need_hidden, bool need_weight,
                                            bool batch_invariant) {
  auto [dhidden, dweight] = backward_meta(g_logprob, g_entropy, hidden, weight, target, saved, temperature, need_hidden,
                                          need_weight, batch_invariant);
  TokenLogprobArgs args = arguments(hidden, weight, target, temperature);
  const auto sums = g_logprob.options();  // both gradients are summed in arithmetic type
  const int64_t T = args.T, D = args.D, V = args.V;
  if (T == 0) return {dhidden, dweight.zero_()};
  const bool cuda = on_cuda(hidden), library = by_library(hidden, batch_invariant);
  const bool split = cuda && hidden.scalar_type() == at::kBFloat16;
  const auto [window_rows, window_ids] =
      cuda ? cuda_window(T, V, library)
           : Window{std::min(T, kWave), std::min(V, kVocabBlock * kWindowBlocks * at::get_num_threads())};
  const int64_t size = static_cast<int64_t>(g_logprob.element_size());
  const int64_t stored = static_cast<int64_t>(hidden.element_size());

  at::Tensor window = at::empty({window_rows, window_ids}, sums);
  at::Tensor hidden_sums = !need_hidden || dhidden.scalar_type() == sums.dtype() ? dhidden : at::empty(hidden.sizes(), sums);
  const bool narrow = need_weight && dweight.scalar_type() != sums.dtype();
  at::Tensor weight_sums = narrow ? at::empty({window_ids, D}, sums) : dweight;

  args.g_logprob = g_logprob.const_data_ptr();
  args.g_entropy = g_entropy.const_data_ptr();
  args.saved = const_cast<double*>(saved.const_data_ptr<double>());
  args.dlogits = window.mutable_data_ptr();
  at::Tensor halves;
  if (split) {
    halves = at::empty({library ? 1 : 2, window_rows, window_ids}, hidden.options());
    args.high = static_cast<bfloat16*>(halves.mutable_data_ptr());
    args.low = library ? nullptr : args.high + window_rows * window_ids;
  }

  GemmArgs matmul{};
  matmul.a = split ? args.high : window.const_data_ptr();
  matmul.a_low = args.low;
  matmul.a_dtype = split ? DType::bf16 : dtype_of(g_logprob);
  matmul.c_dtype = dtype_of(g_logprob);
  matmul.b_dtype = dtype_of(hidden);
  matmul.N = matmul.b_row = matmul.c_row = D;
  matmul.b_col = 1;
  auto at_row = [&](const at::Tensor& t, int64_t row, int64_t element) {
    return static_cast<char*>(const_cast<void*>(t.const_data_ptr())) + row * D * element;
  };
  for (args.first_id = 0; args.first_id < V; args.first_id += window_ids) {
    args.num_ids = std::min(window_ids, V - args.first_id);
    const int64_t sum_row = narrow ? 0 : args.first_id;
    for (args.first_row = 0; args.first_row < T; args.first_row += window_rows) {
      args.num_rows = std::min(window_rows, T - args.first_row);
      if (cuda) {
        logits_of_window(hidden, weight, window, args, library);
        cuda_call(hidden, [&](auto stream) { token_logprob_dlogits_cuda(args, stream); });
      } else {
        args.wave = wave_for(args.num_rows, args.num_ids);
        parallel_items(token_logprob_dlogits_cpu, args,
                       count_of(args.num_rows, args.wave) * count_of(args.num_ids, kVocabBlock), tile_cost(args));
      }
      if (library) {
        const at::Tensor dlogits = view_of(split ? halves : window, args);
        if (need_hidden) {
          const at::Tensor sums_of_rows = hidden_sums.narrow(0, args.first_row, args.num_rows);
          library_matmul(dlogits, weight.narrow(0, args.first_id, args.num_ids), sums_of_rows,
                         args.first_id > 0 ? sums_of_rows : at::Tensor());
        }
        if (need_weight) {
          const at::Tensor sums_of_ids = weight_sums.narrow(0, sum_row, args.num_ids);
          library_matmul(dlogits.t(), hidden.narrow(0, args.first_row, args.num_rows), sums_of_ids,
                         args.first_row > 0 ? sums_of_ids : at::Tensor());
        }
        continue;
      }
      if (need_hidden) {
        matmul.M = args.num_rows;
        matmul.K = matmul.a_row = args.num_ids;
        matmul.a_col = 1;
        matmul.b = at_row(weight, args.first_id, stored);
        matmul.c = at_row(hidden_sums, args.first_row, size);
        matmul.accumulate = args.first_id > 0;
        gemm_on(hidden, matmul);
      }
      if (need_weight) {
        matmul.M = matmul.a_col = args.num_ids;
        matmul.K = args.num_rows;
        matmul.a_row = 1;
        matmul.b = at_row(hidden, args.first_row, stored);
        matmul.c = at_row(weight_sums, sum_row, size);
        matmul.accumulate = args.first_row > 0;
        gemm_on(hidden, matmul);
      }
    }
    if (narrow) {
      dweight.narrow(0, args.first_id, args.num_ids).copy_(weight_sums.narrow(0, 0, args.num_ids));
    }
  }
  return {need_hidden ? hidden_sums.to(hidden.scalar_type()) : dhidden, dweight};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(grpo_engine, m) {
  m.def(
      "token_logprob(Tensor hidden, Tensor weight, Tensor target, float temperature,"
      " bool batch_invariant=True) -> (Tensor logprob, Tensor entropy, Tensor saved)");
  m.def(
      "token_logprob_backward(Tensor g_logprob, Tensor g_entropy, Tensor hidden, Tensor weight,"
      " Tensor target, Tensor saved, float temperature, bool need_hidden, bool need_weight, bool batch_invariant=True)"
      " -> (Tensor dhidden, Tensor dweight)");
}
GE_DEVICE_IMPL(m) {
  m.impl("token_logprob", &forward);
  m.impl("token_logprob_backward", &backward);
}
TORCH_LIBRARY_IMPL(grpo_engine, Meta, m) {
  m.impl("token_logprob", &forward_meta);
  m.impl("token_logprob_backward", &backward_meta);
}

}  // namespace grpo_engine
