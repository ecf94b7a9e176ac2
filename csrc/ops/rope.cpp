#include "ops/rope.h"

#include <ATen/Functions.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <mutex>
#include <optional>
#include <tuple>
#include <vector>

#include "core/checks.h"
#include "core/cuda_call.h"
#include "core/parallel.h"
#include "ops/rope.cuh"
#include "ops/rope_table.h"

namespace grpo_engine {
namespace {

constexpr const char* kOp = "rope";

using OptionalTensor = std::optional<at::Tensor>;

at::Tensor meta(const at::Tensor& x, const at::Tensor& position, double theta, bool, const OptionalTensor& frequency) {
  require_shape(kOp, "x", x, {-1, -1, -1}, "[T, H, E]");
  require_float(kOp, "x", x);
  require_row_contiguous(kOp, "x", x);
  TORCH_CHECK_VALUE(x.size(2) > 0 && x.size(2) % 2 == 0, kOp, ": x needs an even head width E >= 2, got ", x.sizes());
  require_tensor(kOp, "position", position, {x.size(0)}, "[T]", at::kLong, x);
  require_positive(kOp, "theta", theta);
  if (frequency) require_tensor(kOp, "frequency", *frequency, {x.size(2) / 2}, "[E/2]", at::kFloat, x);
  return at::empty(x.sizes(), x.options());
}

// What turns a head of width E: theta, or frequencies where any are given.
struct Rotation {
  int64_t E;
  double theta;
  std::vector<float> given;

  std::vector<float> frequencies() const {
    if (!given.empty()) return given;
    std::vector<float> f(E / 2);
    for (int64_t i = 0; i < E / 2; ++i) f[i] = rope_frequency(theta, i, E);
    return f;
  }
  bool operator<(const Rotation& other) const {
    return std::tie(E, theta, given) < std::tie(other.E, other.theta, other.given);
  }
};

// Row r: cos, then sin, of the E/2 angles of position_of(r).
template <typename PositionOf>
std::shared_ptr<const std::vector<float>> make_table(int64_t rows, const Rotation& rotation, PositionOf position_of) {
  const int64_t E = rotation.E, half = E / 2;
  const std::vector<float> frequency = rotation.frequencies();
  auto table = std::make_shared<std::vector<float>>(rows * E);
  constexpr double kCost = 20.0;  // operations an angle: cos and sin in float64, in the time of vector instructions
  parallel_ranges(rows, kCost * static_cast<double>(half), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t position = position_of(r);
      float* row = table->data() + r * E;
      for (int64_t i = 0; i < half; ++i) {
        const double angle = rope_angle(position, frequency[i]);
        row[i] = static_cast<float>(std::cos(angle));
        row[half + i] = static_cast<float>(std::sin(angle));
      }
    }
  });
  return table;
}

// Positions 0 .. 2^n - 1 of each rotation that was asked for.
std::shared_ptr<const std::vector<float>> kept_table(int64_t positions, const Rotation& rotation) {
  static std::mutex mutex;
  static std::map<Rotation, std::shared_ptr<const std::vector<float>>> tables;
  const std::lock_guard<std::mutex> lock(mutex);
  auto& table = tables[rotation];
  if (!table || static_cast<int64_t>(table->size()) < positions * rotation.E) {
    int64_t rows = 64;
    while (rows < positions) rows *= 2;
    table = make_table(rows, rotation, [](int64_t r) { return r; });
  }
  return table;
}

at::Tensor forward(const at::Tensor& x, const at::Tensor& position, double theta, bool inverse,
                   const OptionalTensor& frequency) {
  at::Tensor y = meta(x, position, theta, inverse, frequency);
  if (y.numel() == 0) return y;
  RopeArgs args{};
  args.dtype = dtype_of(x);
  args.T = x.size(0);
  args.H = x.size(1);
  args.E = x.size(2);
  args.x_stride = x.stride(0);
  args.y_stride = args.H * args.E;
  args.inverse = inverse;
  args.x = x.const_data_ptr();
  args.y = y.mutable_data_ptr();
  args.position = position.const_data_ptr<int64_t>();
  args.theta = theta;
  args.frequency = frequency ? frequency->const_data_ptr<float>() : nullptr;
  if (cuda_call(x, [&](auto stream) { rope_cuda(args, stream); })) return y;
  const RopeTable table = rope_table(kOp, args.position, args.T, args.E, theta, args.frequency);
  args.first_position = table.first_position;
  args.table = table.rows->data();
  parallel_items(rope_cpu, args, args.T, 3.0 * args.H * args.E);
  return y;
}

}  // namespace

RopeTable rope_table(const char* op, const int64_t* position, int64_t T, int64_t E, double theta, const float* frequency) {
  const Rotation rotation{E, theta, frequency ? std::vector<float>(frequency, frequency + E / 2) : std::vector<float>()};
  constexpr int64_t kKept = 32768;  // 8 MB at E = 64
  const auto [low, high] = std::minmax_element(position, position + T);
  TORCH_CHECK_VALUE(*low >= 0, op, ": position must be >= 0, got ", *low, " at row ", low - position);
  if (*high < kKept) return {kept_table(*high + 1, rotation), 0};
  // Packed sequences share positions: then one row for each position, else one for each token.
  const int64_t first = *low;
  if (*high - first < T) {
    return {make_table(*high - first + 1, rotation, [&](int64_t r) { return first + r; }), first};
  }
  return {make_table(T, rotation, [&](int64_t r) { return position[r]; }), -1};
}

TORCH_LIBRARY_FRAGMENT(grpo_engine, m) {
  m.def("rope(Tensor x, Tensor position, float theta, bool inverse, Tensor? frequency=None) -> Tensor");
}
GE_DEVICE_IMPL(m) { m.impl("rope", &forward); }
TORCH_LIBRARY_IMPL(grpo_engine, Meta, m) { m.impl("rope", &meta); }

}  // namespace grpo_engine
