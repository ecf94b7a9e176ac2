#include "ops/rope.h"

#include <ATen/Functions.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <mutex>
#include <vector>

#include "core/checks.h"
#include "core/parallel.h"

namespace grpo_engine {
namespace {

constexpr const char* kOp = "rope";

at::Tensor meta(const at::Tensor& x, const at::Tensor& position, double theta, bool) {
  require_shape(kOp, "x", x, {-1, -1, -1}, "[T, H, E]");
  require_float(kOp, "x", x);
  require_row_contiguous(kOp, "x", x);
  TORCH_CHECK_VALUE(x.size(2) > 0 && x.size(2) % 2 == 0, kOp,
                    ": x needs an even head width E >= 2, got ", x.sizes());
  require_tensor(kOp, "position", position, {x.size(0)}, "[T]", at::kLong, x);
  require_positive(kOp, "theta", theta);
  return at::empty(x.sizes(), x.options());
}

using Table = std::vector<float>;

// Appends rows to a table until it has `rows`. Row r: cos, then sin, of the E/2 angles of position_of(r).
template <typename PositionOf>
void extend_table(Table& table, int64_t rows, int64_t E, double theta, PositionOf position_of) {
  const int64_t half = E / 2, done = static_cast<int64_t>(table.size()) / E;
  std::vector<float> frequency(half);
  table.resize(rows * E);
  for (int64_t i = 0; i < half; ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(E);
    frequency[i] = 1.f / static_cast<float>(std::pow(theta, static_cast<double>(exponent)));
  }
  constexpr int64_t kAnglesPerTask = 1024;  // about 40 us of cos and sin
  at::parallel_for(done, rows, kAnglesPerTask / half + 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float position = static_cast<float>(position_of(r));
      for (int64_t i = 0; i < half; ++i) {
        const double angle = position * frequency[i];  // the product is rounded to float32
        table[r * E + i] = static_cast<float>(std::cos(angle));
        table[r * E + half + i] = static_cast<float>(std::sin(angle));
      }
    }
  });
}

constexpr int64_t kMaxKept = int64_t{1} << 22;  // floats of the table that is kept, 16 MiB

// The table of the positions 0 .. rows-1 and perhaps more. Every layer of a model asks for the same, so
// the last one is kept; a caller's copy stays as it is while another thread makes a longer one.
std::shared_ptr<const Table> kept_table(int64_t rows, int64_t E, double theta) {
  static std::mutex mutex;
  static std::shared_ptr<const Table> kept;
  static int64_t kept_E = 0;
  static double kept_theta = 0;
  const std::lock_guard<std::mutex> lock(mutex);
  const bool same = kept && kept_E == E && kept_theta == theta;
  if (same && static_cast<int64_t>(kept->size()) >= rows * E) return kept;
  auto longer = std::make_shared<Table>(same ? *kept : Table{});
  const int64_t spare = std::min(2 * rows, kMaxKept / E);  // decoding asks for one more every time
  extend_table(*longer, std::max(rows, spare), E, theta, [](int64_t r) { return r; });
  kept = longer;
  kept_E = E;
  kept_theta = theta;
  return kept;
}

at::Tensor cpu(const at::Tensor& x, const at::Tensor& position, double theta, bool inverse) {
  at::Tensor y = meta(x, position, theta, inverse);
  if (y.numel() == 0) return y;
  RopeArgs args{};
  args.dtype = dtype_of(x);
  args.T = x.size(0);
  args.H = x.size(1);
  args.E = x.size(2);
  args.x_stride = x.stride(0);
  args.inverse = inverse;
  args.x = x.const_data_ptr();
  args.y = y.mutable_data_ptr();
  args.position = position.const_data_ptr<int64_t>();
  const auto [low, high] = std::minmax_element(args.position, args.position + args.T);
  TORCH_CHECK_VALUE(*low >= 0, kOp, ": position must be >= 0, got ", *low, " at row ",
                    low - args.position);
  std::shared_ptr<const Table> table;
  if (*high < kMaxKept / args.E) {
    table = kept_table(*high + 1, args.E, theta);
  } else {  // far out: one row for each token
    auto rows = std::make_shared<Table>();
    extend_table(*rows, args.T, args.E, theta, [&](int64_t t) { return args.position[t]; });
    table = rows;
    args.first_position = -1;
  }
  args.table = table->data();
  parallel_items(rope_cpu, args, args.T, 3.0 * args.H * args.E);
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(grpo_engine, m) {
  m.def("rope(Tensor x, Tensor position, float theta, bool inverse) -> Tensor");
}
TORCH_LIBRARY_IMPL(grpo_engine, CPU, m) { m.impl("rope", &cpu); }
TORCH_LIBRARY_IMPL(grpo_engine, Meta, m) { m.impl("rope", &meta); }

}  // namespace grpo_engine
