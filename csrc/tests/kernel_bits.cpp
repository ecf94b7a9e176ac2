// kernel_bits -- runs every CPU kernel on fixed inputs and prints a hash of the bits that each one writes.
//
//   kernel_bits [--isa NAME] [--threads 1,2,3] [--expect FILE | --write FILE]
//   kernel_bits --isas                    the instruction sets of this CPU
//
// A line is: kernel, variant, instruction set, hash. A kernel runs once with each number of threads. The program fails
// where a hash changes with the threads, and where fewer threads took part than were asked for. Torch is not needed, so
// the program runs under an emulator of another CPU and under the sanitizers.
//
// kernel_bits.txt holds the hashes that AVX2, AVX-512 and NEON share. --expect fails where a hash differs from FILE,
// and where either side has a line that the other has not. --write makes FILE anew, for a change of bits on purpose.
// Not in it:
//   the generic copy    it has no fused multiply-add and takes expf from libm
//   variants of f64     their exp is that of libm, and so is the last bit
// float64 statistics of float32 kernels are hashed as float32, for their exp and log are libm's too. Of a NaN the hash
// takes only that it is one: its sign and payload differ from CPU to CPU.
//
// To add a kernel: a function below that calls GE_RUN, a call of it in run_all(), then --write.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "core/cpu_dispatch.h"
#include "ops/adamw.h"
#include "ops/decoder_layer.h"
#include "ops/gather_logprob.h"
#include "ops/kv_write.h"
#include "ops/linear.h"
#include "ops/paged_attention.h"
#include "ops/policy_loss.h"
#include "ops/ragged_attention.h"
#include "ops/rms_norm.h"
#include "ops/rope.h"
#include "ops/sample_token.h"
#include "ops/swiglu.h"
#include "ops/token_logprob.h"

namespace grpo_engine {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity(), kNan = std::numeric_limits<float>::quiet_NaN();
constexpr DType kAll[] = {DType::f32, DType::bf16, DType::f64};

const char* name_of(DType dtype) { return dtype == DType::f32 ? "f32" : dtype == DType::bf16 ? "bf16" : "f64"; }
DType arithmetic(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

// ---------------------------------------------------------------- inputs

// SplitMix64: integers only, so every machine has the same inputs.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t bits() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(n)); }
  float uniform() { return static_cast<float>(below(1 << 24) - (1 << 23)) * 0x1p-23f; }  // in [-1, 1)

 private:
  uint64_t state_;
};

// What an array holds. Of `stats` a float64 is hashed as a float32.
enum class Element { f32, bf16, f64, stats, i64, i16 };

Element element_of(DType dtype) {
  return dtype == DType::f32 ? Element::f32 : dtype == DType::bf16 ? Element::bf16 : Element::f64;
}
int64_t size_of(Element e) { return e == Element::bf16 || e == Element::i16 ? 2 : e == Element::f32 ? 4 : 8; }

// Elements `stride` bytes apart that a kernel writes.
struct Output {
  Element element;
  char* data;
  int64_t count, stride;
};

class Array {
 public:
  // Bytes that no kernel writes by chance, so that what stays unwritten shows.
  Array(Element element, int64_t count)
      : element_(element), count_(count), bytes_(static_cast<size_t>(count * size_of(element)), char{0x5A}) {}
  Array(DType dtype, int64_t count) : Array(element_of(dtype), count) {}
  // Uniform in [-scale, scale).
  Array(DType dtype, int64_t count, float scale, uint64_t seed) : Array(dtype, count) {
    Random random(seed);
    for (int64_t i = 0; i < count; ++i) set(i, random.uniform() * scale);
  }

  void* data() { return bytes_.data(); }
  template <typename T>
  T* as() {
    return reinterpret_cast<T*>(bytes_.data());
  }
  void* at(int64_t i) { return bytes_.data() + i * size_of(element_); }
  // Rounded towards 0 for bfloat16.
  void set(int64_t i, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint16_t upper = static_cast<uint16_t>(bits >> 16 | (x != x));
    const double wide = x;
    if (element_ == Element::f32) std::memcpy(at(i), &x, 4);
    else if (element_ == Element::bf16) std::memcpy(at(i), &upper, 2);
    else std::memcpy(at(i), &wide, 8);
  }
  Array& with(int64_t first, const std::vector<float>& values) {
    for (size_t i = 0; i < values.size(); ++i) set(first + static_cast<int64_t>(i), values[i]);
    return *this;
  }
  operator Output() { return {element_, bytes_.data(), count_, size_of(element_)}; }

 private:
  Element element_;
  int64_t count_;
  std::vector<char> bytes_;
};

std::vector<int64_t> integers(int64_t count, int64_t below, uint64_t seed) {
  Random random(seed);
  std::vector<int64_t> values(static_cast<size_t>(count));
  for (int64_t& v : values) v = random.below(below);
  return values;
}

std::vector<int32_t> offsets(const std::vector<int>& lengths) {
  std::vector<int32_t> cu{0};
  for (int n : lengths) cu.push_back(cu.back() + n);
  return cu;
}

// Values that element-wise arithmetic might treat in its own way.
std::vector<float> special_values() {
  return {0.f,    -0.f,  1.f,    -1.f, 88.7f, 88.8f, -87.3f, -87.4f, 104.f,
          -104.f, 1e30f, -1e30f, kInf, -kInf, kNan,  1e-40f, -1e-40f};
}

// ---------------------------------------------------------------- hashes and threads

template <typename T>
T read(const char* p) {
  T x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

// FNV-1a of the elements, each NaN as one number.
class Hash {
 public:
  void add(const Output& out) {
    const char* p = out.data;
    for (int64_t i = 0; i < out.count; ++i, p += out.stride) {
      switch (out.element) {
        case Element::f32: add_float(read<float>(p)); break;
        case Element::stats: add_float(static_cast<float>(read<double>(p))); break;
        case Element::f64: add_double(read<double>(p)); break;
        case Element::bf16: {
          const uint16_t bits = read<uint16_t>(p);
          add_bytes((bits & 0x7FFF) > 0x7F80 ? 0x7FC0 : bits, 2);
          break;
        }
        case Element::i16: add_bytes(read<uint16_t>(p), 2); break;
        case Element::i64: add_bytes(read<uint64_t>(p), 8); break;
      }
    }
  }
  uint64_t value() const { return value_; }

 private:
  void add_float(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    add_bytes(x != x ? 0x7FC00000u : bits, 4);
  }
  void add_double(double x) {
    uint64_t bits;
    std::memcpy(&bits, &x, 8);
    add_bytes(x != x ? 0x7FF8000000000000u : bits, 8);
  }
  void add_bytes(uint64_t x, int count) {
    for (int i = 0; i < count; ++i) value_ = (value_ ^ (x >> (8 * i) & 0xFF)) * 0x100000001B3ull;
  }

  uint64_t value_ = 0xCBF29CE484222325ull;
};

// body(begin, end) over parts of [0, items), three a thread: a thread begins with one of its own and goes on with what
// is left. Returns how many threads had a part. Threads share no lock, which would hide a race from a sanitizer.
int split(int64_t items, int threads, const std::function<void(int64_t, int64_t)>& body) {
  const int64_t parts = std::min<int64_t>(items, 3 * threads);
  std::atomic<int64_t> next{threads};
  std::vector<int> had(static_cast<size_t>(threads));
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t) {
    pool.emplace_back([&, t] {
      for (int64_t part = t; part < parts; part = next.fetch_add(1, std::memory_order_relaxed)) {
        body(items * part / parts, items * (part + 1) / parts);
        had[static_cast<size_t>(t)] = 1;
      }
    });
  }
  for (std::thread& thread : pool) thread.join();
  return static_cast<int>(std::count(had.begin(), had.end(), 1));
}

// ---------------------------------------------------------------- the report

class Report {
 public:
  explicit Report(std::vector<int> threads) : threads_(std::move(threads)) {}

  // Runs `kernel` once with each number of threads, from the same contents of `outputs`, and prints the hash of what
  // they hold then. plan(args, threads) returns the number of work items; it may choose other sizes of work items.
  template <typename Args, typename Plan>
  void run(const char* name, const std::string& variant, CpuKernel<Args> kernel, Args args, const Plan& plan,
           const std::vector<Output>& outputs) {
    const std::vector<char> before = contents(outputs);
    uint64_t first = 0;
    for (const int threads : threads_) {
      restore(outputs, before);
      const int64_t items = plan(args, threads);
      const int had = split(items, threads, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
      Hash hash;
      for (const Output& out : outputs) hash.add(out);
      if (threads == threads_.front()) first = hash.value();
      if (had != threads)
        fail(name, variant,
             std::to_string(had) + " of " + std::to_string(threads) + " threads took part in " + std::to_string(items) +
                 " work items");
      if (hash.value() != first)
        fail(name, variant,
             "other bits on " + std::to_string(threads) + " threads than on " + std::to_string(threads_.front()));
    }
    std::printf("%-26s %-36s %-12s %016llx\n", name, variant.c_str(), cpu_isa_name(cpu_isa()),
                static_cast<unsigned long long>(first));
    if (!lines_.emplace(name + (" " + variant), first).second) fail(name, variant, "two variants of this name");
  }
  template <typename Args>
  void run(const char* name, const std::string& variant, CpuKernel<Args> kernel, const Args& args, int64_t items,
           const std::vector<Output>& outputs) {
    run(name, variant, kernel, args, [items](Args&, int) { return items; }, outputs);
  }

  void compare_with(const std::string& path) {
    std::ifstream file(path);
    if (!file) throw std::runtime_error("--expect: cannot read " + path);
    std::map<std::string, uint64_t> expected;
    for (std::string line; std::getline(file, line);) {
      if (line.empty() || line[0] == '#') continue;
      const size_t space = line.rfind(' ');
      expected[line.substr(0, space)] = std::stoull(line.substr(space + 1), nullptr, 16);
    }
    for (const auto& [name, hash] : shared_lines()) {
      const auto found = expected.find(name);
      if (found == expected.end()) fail(name, "", "not in " + path);
      else if (found->second != hash) fail(name, "", "other bits than in " + path);
    }
    for (const auto& [name, hash] : expected) {
      if (lines_.find(name) == lines_.end()) fail(name, "", "in " + path + ", but did not run");
    }
  }
  void write(const std::string& path) const {
    std::ofstream file(path);
    file << "# The bits of every CPU kernel on AVX2, AVX-512 and NEON: kernel, variant, hash. Made by\n"
            "#   kernel_bits --write csrc/tests/kernel_bits.txt\n"
            "# A change of a line is a change of bits: say in its commit why.\n";
    for (const auto& [name, hash] : shared_lines()) {
      char digits[17];
      std::snprintf(digits, sizeof digits, "%016llx", static_cast<unsigned long long>(hash));
      file << name << ' ' << digits << '\n';
    }
    if (!file.flush()) throw std::runtime_error("--write: cannot write " + path);
  }
  bool failed() const { return failed_; }
  size_t num_lines() const { return lines_.size(); }

 private:
  void fail(const std::string& name, const std::string& variant, const std::string& why) {
    std::fprintf(stderr, "kernel_bits: %s %s on %s: %s\n", name.c_str(), variant.c_str(), cpu_isa_name(cpu_isa()),
                 why.c_str());
    failed_ = true;
  }
  std::map<std::string, uint64_t> shared_lines() const {
    std::map<std::string, uint64_t> shared;
    for (const auto& [name, hash] : lines_) {
      if (name.find(" f64") == std::string::npos) shared.emplace(name, hash);
    }
    return shared;
  }
  static std::vector<char> contents(const std::vector<Output>& outputs) {
    std::vector<char> bytes;
    for (const Output& out : outputs) {
      for (int64_t i = 0; i < out.count; ++i) {
        bytes.insert(bytes.end(), out.data + i * out.stride, out.data + i * out.stride + size_of(out.element));
      }
    }
    return bytes;
  }
  static void restore(const std::vector<Output>& outputs, const std::vector<char>& bytes) {
    const char* from = bytes.data();
    for (const Output& out : outputs) {
      const int64_t size = size_of(out.element);
      for (int64_t i = 0; i < out.count; ++i, from += size) {
        std::memcpy(out.data + i * out.stride, from, static_cast<size_t>(size));
      }
    }
  }

  std::vector<int> threads_;
  std::map<std::string, uint64_t> lines_;  // "kernel variant" -> hash
  bool failed_ = false;
};

// The name of the kernel once: it is printed, and a test compares it with what the headers declare.
#define GE_RUN(report, kernel, variant, args, items, ...) \
  (report).run(#kernel, variant, kernel##_cpu, args, items, std::vector<Output>{__VA_ARGS__})

// ---------------------------------------------------------------- matmuls

struct Matmul {
  const char* name;
  int64_t M, N, K;
  int64_t block_m, block_n;  // of work items with an odd number of threads; 8 x 48 with an even one
};
constexpr Matmul kFewRows{"few_rows", 3, 451, 67, 8, 48};
constexpr Matmul kRows{"rows", 13, 391, 531, 16, 48};       // more than one slice of k
constexpr Matmul kNothing{"no_terms", 5, 437, 0, 8, 48};    // the bias alone
constexpr Matmul kManyRows{"many_rows", 211, 4101, 21, 256, 512};

// Which index of A and of B is adjacent, by the use of the matmul.
enum class Layout { forward, dx, dweight, transposed };

struct Types {
  DType a, b, c;
};

void one_matmul(Report& report, const Matmul& p, Types types, Layout layout, bool bias, bool accumulate) {
  const bool a_by_rows = layout == Layout::forward || layout == Layout::dx;
  const bool b_by_rows = layout == Layout::dx || layout == Layout::dweight;
  const int64_t c_row = p.N + 3;
  Array a(types.a, std::max<int64_t>(p.M * p.K, 1), 2.f, 1), b(types.b, std::max<int64_t>(p.N * p.K, 1), 2.f, 2);
  Array plus(types.b, p.N, 4.f, 3), c(types.c, p.M * c_row, 8.f, 4);
  GemmArgs args{};
  args.a_dtype = types.a;
  args.b_dtype = types.b;
  args.c_dtype = types.c;
  args.M = p.M;
  args.N = p.N;
  args.K = p.K;
  args.a = a.data();
  args.a_row = a_by_rows ? p.K : 1;
  args.a_col = a_by_rows ? 1 : p.M;
  args.b = b.data();
  args.b_row = b_by_rows ? p.N : 1;
  args.b_col = b_by_rows ? 1 : p.K;
  args.bias = bias ? plus.data() : nullptr;
  args.c = c.data();
  args.c_row = c_row;
  args.accumulate = accumulate;
  const auto plan = [&p](GemmArgs& g, int threads) {
    g.block_m = threads % 2 ? p.block_m : 8;
    g.block_n = threads % 2 ? p.block_n : 48;
    return ((g.M + g.block_m - 1) / g.block_m) * ((g.N + g.block_n - 1) / g.block_n);
  };
  constexpr const char* kLayouts[] = {"forward", "dx", "dweight", "transposed"};
  const std::string variant = std::string(name_of(types.a)) + "." + name_of(types.b) + "." + name_of(types.c) + "." +
                              kLayouts[static_cast<int>(layout)] + "." + p.name + (bias ? ".bias" : "") +
                              (accumulate ? ".accumulate" : "");
  GE_RUN(report, gemm, variant, args, plan, c);
}

// Sums about the smallest normal number: float32 keeps subnormals, bfloat16 flushes what is below it after rounding.
void tiny_matmuls(Report& report, DType dtype, bool accumulate) {
  const int64_t M = 16, N = 400, K = 3;
  Random random(5);
  Array a(dtype, M * K), b(dtype, N * K), c(DType::f32, M * N);
  const auto tiny = [&](int64_t exponent) {
    return std::ldexp(1.f + static_cast<float>(random.below(128)) / 128.f, static_cast<int>(exponent)) *
           (random.below(2) ? 1.f : -1.f);
  };
  for (int64_t i = 0; i < M * K; ++i) a.set(i, tiny(-62 - random.below(15)));
  for (int64_t i = 0; i < N * K; ++i) b.set(i, random.below(9) ? tiny(-62 - random.below(15)) : tiny(-129));
  const float starts[] = {0x1p-126f, -0x1p-126f, 0x1.000002p-126f, -0x1.000004p-126f, 0x1p-127f, -0x1p-149f, 0.f, -0.f};
  for (int64_t i = 0; i < M * N; ++i) c.set(i, starts[random.below(8)]);
  GemmArgs args{dtype, dtype, DType::f32, M, N, K, a.data(), K, 1, b.data(), 1, K, nullptr, c.data(), N, accumulate, 8, 48};
  const std::string variant = std::string(name_of(dtype)) + ".tiny" + (accumulate ? ".accumulate" : "");
  GE_RUN(report, gemm, variant, args, int64_t{2 * 9}, c);
}

void gemm_kernels(Report& report) {
  using enum DType;
  for (const Types types : {Types{f32, f32, f32}, Types{bf16, bf16, bf16}, Types{bf16, bf16, f32}, Types{f32, bf16, f32},
                            Types{f32, bf16, bf16}, Types{bf16, f32, f32}, Types{f64, f64, f64}}) {
    const bool wide = types.c != bf16;  // C can be added to
    one_matmul(report, kFewRows, types, Layout::forward, true, false);
    one_matmul(report, kFewRows, types, Layout::transposed, false, wide);
    one_matmul(report, kRows, types, Layout::forward, true, false);
    one_matmul(report, kRows, types, Layout::dx, false, wide);
    one_matmul(report, kRows, types, Layout::dweight, false, false);
    one_matmul(report, kNothing, types, Layout::forward, true, false);
  }
  for (const Types types : {Types{f32, f32, f32}, Types{bf16, bf16, bf16}}) {
    one_matmul(report, kManyRows, types, Layout::forward, false, false);
    one_matmul(report, kManyRows, types, Layout::dweight, true, false);
  }
  for (const DType dtype : {f32, bf16}) {
    tiny_matmuls(report, dtype, false);
    tiny_matmuls(report, dtype, true);
  }
}

void column_sum_kernel(Report& report, DType dtype) {
  const int64_t T = 37, O = 1027;
  Array dy(dtype, T * O, 1.f, 6), dbias(arithmetic(dtype), O);
  const ColumnSumArgs args{dtype, T, O, dy.data(), dbias.data()};
  GE_RUN(report, column_sum, name_of(dtype), args, (O + kColumnSumColumns - 1) / kColumnSumColumns, dbias);
}

// ---------------------------------------------------------------- rows

void rms_norm_kernels(Report& report, DType dtype, bool residual) {
  const int64_t T = 451, D = 461, chunks = rms_norm_chunks(T);
  Array x(dtype, T * D, 3.f, 7), more(dtype, T * D, 3.f, 8), weight(dtype, D, 2.f, 9);
  Array dy(dtype, T * D, 1.f, 10), dsum(dtype, T * D, 1.f, 11);
  Array sum(dtype, T * D), y(dtype, T * D), dx(dtype, T * D), rstd(arithmetic(dtype), T),
      dweight(arithmetic(dtype), chunks * D);
  x.with(5 * D, std::vector<float>(D, 0.f));  // a row of zeros
  RmsNormArgs args{};
  args.dtype = dtype;
  args.T = T;
  args.D = D;
  args.eps = 1e-6;
  args.x = x.data();
  args.residual = residual ? more.data() : nullptr;
  args.weight = weight.data();
  args.sum = residual ? sum.data() : nullptr;
  args.y = y.data();
  args.rstd = rstd.data();
  const std::string variant = std::string(name_of(dtype)) + (residual ? ".residual" : "");
  GE_RUN(report, rms_norm_forward, variant, args, T, y, rstd, sum);
  args.x = residual ? sum.data() : x.data();
  args.dy = dy.data();
  args.dsum = residual ? dsum.data() : nullptr;
  args.dx = dx.data();
  args.dweight = dweight.data();
  GE_RUN(report, rms_norm_backward, variant, args, chunks, dx, dweight);
  GE_RUN(report, rms_norm_join, variant, args, (D + kRmsNormColumns - 1) / kRmsNormColumns, dweight);
}

void rope_kernel(Report& report, DType dtype, bool inverse) {
  const int64_t T = 19, H = 3, E = 26, stride = (H + 2) * E;
  Array x(dtype, T * stride, 2.f, 12), y(dtype, T * H * E), table(DType::f32, (T + 7) * E, 1.f, 13);
  std::vector<int64_t> position = integers(T, T + 7, 14);
  for (int64_t& p : position) p += 5;
  RopeArgs args{};
  args.dtype = dtype;
  args.T = T;
  args.H = H;
  args.E = E;
  args.x = x.data();
  args.x_stride = stride;
  args.y = inverse ? x.data() : y.data();  // in place, or from a part of wider rows
  args.y_stride = inverse ? stride : H * E;
  args.inverse = inverse;
  args.table = table.as<float>();
  args.position = position.data();
  args.first_position = inverse ? -1 : 5;
  GE_RUN(report, rope, std::string(name_of(dtype)) + (inverse ? ".inverse" : ""), args, T, inverse ? x : y);
}

void swiglu_kernels(Report& report, DType dtype) {
  const int64_t T = 11, F = 93;
  Array gate_up(dtype, T * 2 * F, 8.f, 15), dy(dtype, T * F, 2.f, 16), y(dtype, T * F), dgate_up(dtype, T * 2 * F);
  gate_up.with(3 * 2 * F + 60, special_values()).with(5 * 2 * F + F + 10, special_values());
  SwigluArgs args{dtype, T, F, gate_up.data(), dy.data(), y.data(), dgate_up.data()};
  const std::string variant = name_of(dtype);
  GE_RUN(report, swiglu_forward, variant, args, T, y);
  GE_RUN(report, swiglu_backward, variant + ".with_y", args, T, dgate_up, y);
  args.y = nullptr;
  GE_RUN(report, swiglu_backward, variant, args, T, dgate_up);
}

void add_rows_kernel(Report& report, DType dtype) {
  const int64_t T = 9, D = 45;
  Array a(dtype, T * D, 3.f, 17), b(dtype, T * D, 3.f, 18);
  a.with(2 * D, special_values());
  const AddRowsArgs args{dtype, D, a.data(), b.data()};
  GE_RUN(report, add_rows, name_of(dtype), args, T, b);
}

// ---------------------------------------------------------------- optimizer

// low: the parameters are bfloat16 with the other half of a float32 beside, moments are float32.
void adamw_kernels(Report& report, DType dtype, DType grad_dtype, bool low) {
  const DType moments = low ? DType::f32 : dtype;
  const std::vector<int64_t> counts{kAdamwBlock, kAdamwBlock - 1, 17, 1, 100, 333, 2050, 7, 64};
  const int64_t num = static_cast<int64_t>(counts.size()), total = num * kAdamwBlock;
  Array param(dtype, total, 1.f, 19), grad(grad_dtype, total, 0.5f, 20), m(moments, total, 0.1f, 21), v(moments, total);
  Array halves(Element::i16, total);
  Random random(22);
  for (int64_t i = 0; i < total; ++i) {
    v.set(i, std::fabs(random.uniform()) * 0.01f);
    halves.as<int16_t>()[i] = static_cast<int16_t>(random.bits());
  }
  grad.with(3, {0.f, -0.f, 1e-30f, 1e15f});
  std::vector<AdamwBlock> blocks;
  for (int64_t i = 0; i < num; ++i) {
    const int64_t first = i * kAdamwBlock;
    blocks.push_back({dtype, grad_dtype, counts[static_cast<size_t>(i)], param.at(first), m.at(first), v.at(first),
                      low ? halves.as<int16_t>() + first : nullptr, grad.at(first), 0.0, 1e-3 / 0.271, 1.0 / 0.0547});
  }
  const Output squares{Element::f64, reinterpret_cast<char*>(&blocks[0].squares), num, sizeof(AdamwBlock)};
  const AdamwArgs args{blocks.data(), 0.75, 1e-4, 0.9, 0.999, 1e-8};
  const std::string variant = std::string(name_of(dtype)) + "." + name_of(grad_dtype) + (low ? ".low" : "");
  GE_RUN(report, adamw_squares, variant, args, num, squares);
  GE_RUN(report, adamw_update, variant, args, num, param, m, v, halves);
}

// ---------------------------------------------------------------- logits

// Rows of logits, among them one with tokens of probability 0, one of equal logits, one with a NaN and one with +inf.
Array logits_of(DType dtype, int64_t rows, int64_t V, uint64_t seed) {
  Array logits(dtype, rows * V, 9.f, seed);
  for (int64_t v = 0; v < V; v += 2) logits.set(1 * V + v, -kInf);
  logits.with(2 * V, std::vector<float>(static_cast<size_t>(V), 1.5f));
  logits.set(3 * V + V / 2, kNan);
  logits.set(4 * V + V - 9, kInf);
  logits.with(5 * V, std::vector<float>(static_cast<size_t>(V), -kInf));
  return logits;
}

void gather_logprob_kernels(Report& report, DType dtype) {
  const int64_t T = 13, V = 1301;
  Array logits = logits_of(dtype, T, V, 23), dlogits(dtype, T * V);
  const DType wide = arithmetic(dtype);
  Array logprob(wide, T), entropy(wide, T), g_logprob(wide, T, 1.f, 24), g_entropy(wide, T, 1.f, 25);
  Array saved(dtype == DType::f64 ? Element::f64 : Element::stats, T * 3);
  const std::vector<int64_t> target = integers(T, V, 26);
  GatherLogprobArgs args{};
  args.dtype = dtype;
  args.T = T;
  args.V = V;
  args.inv_temperature = static_cast<double>(1.f / 0.7f);
  args.logits = logits.data();
  args.target = target.data();
  args.g_logprob = g_logprob.data();
  args.g_entropy = g_entropy.data();
  args.logprob = logprob.data();
  args.entropy = entropy.data();
  args.saved = saved.as<double>();
  args.dlogits = dlogits.data();
  GE_RUN(report, gather_logprob_forward, name_of(dtype), args, T, logprob, entropy, saved);
  GE_RUN(report, gather_logprob_backward, name_of(dtype), args, T, dlogits);
}

void token_logprob_kernels(Report& report, DType dtype) {
  const int64_t T = 29, D = 53, V = 1301, blocks = (V + kVocabBlock - 1) / kVocabBlock;
  const DType wide = arithmetic(dtype);
  Array hidden(dtype, T * D, 2.f, 27), weight(dtype, V * D, 1.f, 28);
  Array block_stats(wide, T * blocks * 3), target_logit(wide, T), logprob(wide, T), entropy(wide, T);
  Array g_logprob(wide, T, 1.f, 29), g_entropy(wide, T, 1.f, 30),
      saved(dtype == DType::f64 ? Element::f64 : Element::stats, T * 3);
  const std::vector<int64_t> target = integers(T, V, 31);
  TokenLogprobArgs args{};
  args.dtype = dtype;
  args.T = T;
  args.D = D;
  args.V = V;
  args.temperature = 0.7;
  args.hidden = hidden.data();
  args.weight = weight.data();
  args.target = target.data();
  args.blocks = block_stats.data();
  args.target_logit = target_logit.data();
  args.logprob = logprob.data();
  args.entropy = entropy.data();
  args.saved = saved.as<double>();
  args.g_logprob = g_logprob.data();
  args.g_entropy = g_entropy.data();
  args.first_row = 3;
  args.num_rows = 23;
  args.first_id = 100;
  args.num_ids = 1100;
  Array dlogits(wide, args.num_rows * args.num_ids);
  args.dlogits = dlogits.data();
  const auto tiles = [](int64_t rows, int64_t ids, TokenLogprobArgs& a, int threads) {
    a.wave = threads % 2 ? 8 : 3;
    return ((rows + a.wave - 1) / a.wave) * ((ids + kVocabBlock - 1) / kVocabBlock);
  };
  const auto all = [&](TokenLogprobArgs& a, int threads) { return tiles(a.T, a.V, a, threads); };
  const auto window = [&](TokenLogprobArgs& a, int threads) { return tiles(a.num_rows, a.num_ids, a, threads); };
  GE_RUN(report, token_logprob_blocks, name_of(dtype), args, all, block_stats, target_logit);
  GE_RUN(report, token_logprob_join, name_of(dtype), args, T, logprob, entropy, saved);
  GE_RUN(report, token_logprob_dlogits, name_of(dtype), args, window, dlogits);
}

struct Filters {
  const char* name;
  bool top_k, top_p, min_p;
};

void sample_token_kernel(Report& report, DType dtype, int64_t B, int64_t V, const Filters& filters) {
  const int64_t stride = V + 5;
  Array logits = logits_of(dtype, B, stride, 32);
  const std::vector<int64_t> seed = integers(B, 1000, 33), position = integers(B, 1000, 34);
  std::vector<int64_t> top_k = integers(B, 90, 35);  // 0 is off
  Array temperature(DType::f32, B), top_p(DType::f32, B), min_p(DType::f32, B);
  const float temperatures[] = {1.f, 0.7f, 0.f, 1.3f}, masses[] = {0.9f, 0.5f, 1.f, 0.99f, 0.05f},
              shares[] = {0.05f, 0.f, 0.3f};
  for (int64_t b = 0; b < B; ++b) {
    temperature.set(b, temperatures[b % 4]);
    top_p.set(b, masses[b % 5]);
    min_p.set(b, shares[b % 3]);
  }
  Array token(Element::i64, B), logprob(DType::f32, B), full(DType::f32, B), entropy(DType::f32, B);
  SampleTokenArgs args{};
  args.dtype = dtype;
  args.B = B;
  args.V = V;
  args.row_stride = stride;
  args.logits = logits.data();
  args.seed = seed.data();
  args.position = position.data();
  args.temperature = temperature.as<float>();
  args.top_k = filters.top_k ? top_k.data() : nullptr;
  args.top_p = filters.top_p ? top_p.as<float>() : nullptr;
  args.min_p = filters.min_p ? min_p.as<float>() : nullptr;
  args.token = token.as<int64_t>();
  args.logprob = logprob.as<float>();
  args.full_logprob = full.as<float>();
  args.entropy = entropy.as<float>();
  const std::string variant = std::string(name_of(dtype)) + "." + std::to_string(V) + filters.name;
  GE_RUN(report, sample_token, variant, args, B, token, logprob, full, entropy);
}

void sample_token_kernels(Report& report, DType dtype) {
  constexpr Filters kFilters[] = {{"", false, false, false},
                                  {".top_k", true, false, false},
                                  {".top_p", false, true, false},
                                  {".min_p", false, false, true},
                                  {".all", true, true, true}};
  for (const Filters& filters : kFilters) sample_token_kernel(report, dtype, 23, 2711, filters);
  sample_token_kernel(report, dtype, 12, 33001, {".top_p", false, true, false});  // long enough to guess from a part
}

// ---------------------------------------------------------------- attention

void kv_write_kernel(Report& report, DType dtype) {
  const int64_t T = 21, num_pages = 5, stride = 8 * 11 + 4;
  const KvPageShape shape{8, 11, 16};
  Array key(dtype, T * stride, 2.f, 36), value(dtype, T * stride, 2.f, 37);
  const int64_t size = num_pages * shape.K * shape.E * shape.page;
  Array key_pages(dtype, size, 1.f, 38), value_pages(dtype, size, 1.f, 39);
  std::vector<int64_t> slot = integers(T, num_pages * shape.page, 40);
  slot[4] = -1;
  slot[9] = slot[2];  // the later token wins
  const KvWriteArgs args{dtype,
                         T,
                         num_pages,
                         shape,
                         stride,
                         stride,
                         key.data(),
                         value.data(),
                         slot.data(),
                         key_pages.data(),
                         value_pages.data()};
  GE_RUN(report, kv_write, name_of(dtype), args, shape.K, key_pages, value_pages);
}

void paged_attention_kernel(Report& report, DType dtype, int64_t H, int64_t E) {
  const KvPageShape shape{3, E, 16};
  const std::vector<int> queries{1, 3, 0, 200, 33, 1};
  const std::vector<int32_t> cu = offsets(queries), kv_len{1, 17, 40, 300, 33, 5};
  const int64_t T = cu.back(), N = 6, max_pages = 19, num_pages = N * max_pages, stride = H * E + 3;
  Array query(dtype, T * stride, 1.f, 41), out(dtype, T * H * E);
  // a slot that no token has written may hold anything
  const int64_t size = num_pages * shape.K * E * shape.page;
  Array key_pages(dtype, size), value_pages(dtype, size);
  for (int64_t i = 0; i < size; ++i) {
    key_pages.set(i, kNan);
    value_pages.set(i, kNan);
  }
  std::vector<int32_t> table;  // pages in no order
  for (int64_t i = 0; i < num_pages; ++i) table.push_back(static_cast<int32_t>(i * 37 % num_pages));
  Random random(42);
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t j = 0; j < kv_len[static_cast<size_t>(n)]; ++j) {
      const int64_t slot = table[static_cast<size_t>(n * max_pages + j / shape.page)] * shape.page + j % shape.page;
      for (int64_t k = 0; k < shape.K; ++k) {
        for (int64_t e = 0; e < E; ++e) {
          key_pages.set(key_offset(shape, slot, k) + e * shape.page, random.uniform());
          value_pages.set(value_offset(shape, slot, k) + e, random.uniform());
        }
      }
    }
  }
  PagedAttentionArgs args{};
  args.dtype = dtype;
  args.plan.N = args.plan.M = N;
  args.plan.K = shape.K;
  args.plan.cu = cu.data();
  args.plan.max_len = 300;
  std::vector<int64_t> first_chunk(static_cast<size_t>(N + 1));
  plan_chunks(args.plan, first_chunk.data());
  args.shape = shape;
  args.H = H;
  args.num_pages = num_pages;
  args.max_pages = max_pages;
  args.query_stride = stride;
  args.scale = 0.3;
  args.query = query.data();
  args.key_pages = key_pages.data();
  args.value_pages = value_pages.data();
  args.page_table = table.data();
  args.kv_len = kv_len.data();
  args.out = out.data();
  const std::string variant = std::string(name_of(dtype)) + ".H" + std::to_string(H) + ".E" + std::to_string(E);
  GE_RUN(report, paged_attention, variant, args, num_items(args.plan), out);
}

void ragged_attention_kernels(Report& report, DType dtype, int64_t H, int64_t E, bool groups) {
  const int64_t K = 3, stride = (H + 2 * K) * E;  // query, key and value side by side
  const std::vector<int32_t> cu = offsets({5, 0, 37, 150, 16, 1, 20, 33}), cu_groups{0, 2, 3, 8};
  const int64_t T = cu.back();
  const DType wide = arithmetic(dtype);
  Array rows(dtype, T * stride, 1.f, 43), out(dtype, T * H * E), stats(wide, T * H * 2), dout(dtype, T * H * E, 1.f, 44);
  Array dquery(dtype, T * H * E), dkey(dtype, T * K * E), dvalue(dtype, T * K * E);
  RaggedAttentionArgs args{};
  args.dtype = dtype;
  args.plan.N = args.plan.M = static_cast<int64_t>(cu.size()) - 1;
  args.plan.K = K;
  args.plan.cu = cu.data();
  if (groups) {
    args.plan.M = static_cast<int64_t>(cu_groups.size()) - 1;
    args.plan.cu_groups = cu_groups.data();
  }
  std::vector<int64_t> first_chunk(cu.size());
  plan_ragged(args.plan, first_chunk.data());
  args.H = H;
  args.E = E;
  args.query_stride = args.key_stride = args.value_stride = stride;
  args.scale = 0.3;
  args.query = rows.data();
  args.key = rows.at(H * E);
  args.value = rows.at((H + K) * E);
  args.out = out.data();
  args.stats = stats.data();
  args.dout = dout.data();
  args.dquery = dquery.data();
  args.dkey = dkey.data();
  args.dvalue = dvalue.data();
  args.T = T;
  const std::string variant =
      std::string(name_of(dtype)) + ".H" + std::to_string(H) + ".E" + std::to_string(E) + (groups ? ".groups" : "");
  GE_RUN(report, ragged_attention_forward, variant, args, num_items(args.plan), out, stats);
  GE_RUN(report, ragged_attention_backward, variant, args, args.plan.M * K, dquery, dkey, dvalue);
}

// ---------------------------------------------------------------- loss

struct Loss {
  const char* name;
  PolicyRatio ratio;
  PolicyObjective objective;
  PolicyKl kl;
  bool kl_ratio, sequence_mean, old, ref, mask;
  double dual_clip;
};
constexpr double kNoDualClip = std::numeric_limits<double>::infinity();
constexpr Loss kLosses[] = {
    {"on_policy", PolicyRatio::token, PolicyObjective::clip, PolicyKl::k3, false, false, false, false, false, kNoDualClip},
    {"clip.k3", PolicyRatio::token, PolicyObjective::clip, PolicyKl::k3, false, true, true, true, false, kNoDualClip},
    {"clip.k1.ratio.mask", PolicyRatio::token, PolicyObjective::clip, PolicyKl::k1, true, false, true, true, true, 1.5},
    {"clip.k2.mask", PolicyRatio::token, PolicyObjective::clip, PolicyKl::k2, false, true, true, true, true, 3.0},
    {"cispo.k2", PolicyRatio::token, PolicyObjective::cispo, PolicyKl::k2, false, false, true, true, false, kNoDualClip},
    {"cispo.k3.ratio.mask", PolicyRatio::token, PolicyObjective::cispo, PolicyKl::k3, true, false, true, true, true,
     kNoDualClip},
    {"sequence.clip.mask", PolicyRatio::sequence, PolicyObjective::clip, PolicyKl::k3, false, true, true, false, true,
     kNoDualClip},
    {"sequence.clip.k3.ratio", PolicyRatio::sequence, PolicyObjective::clip, PolicyKl::k3, true, true, true, true, false,
     2.0},
    {"sequence.cispo.k1", PolicyRatio::sequence, PolicyObjective::cispo, PolicyKl::k1, false, false, true, true, false,
     kNoDualClip},
};

void policy_loss_kernel(Report& report, DType dtype, const Loss& loss) {
  const std::vector<int32_t> cu = offsets({7, 0, 33, 1, 16, 50, 21, 64, 5, 18});
  const int64_t R = cu.back(), N = static_cast<int64_t>(cu.size()) - 1;
  Array logprob(dtype, R), old(dtype, R), ref(dtype, R), advantage(dtype, R, 2.f, 45), dlogprob(dtype, R);
  const auto mask = std::make_unique<bool[]>(static_cast<size_t>(R));
  Random random(46);
  for (int64_t i = 0; i < R; ++i) {
    const float x = random.uniform() * 2.f - 3.f;
    logprob.set(i, x);
    old.set(i, x + random.uniform() * (i % 13 ? 0.6f : 30.f));  // now and then past the limit of log-ratios
    ref.set(i, x + random.uniform() * (i % 17 ? 0.9f : 30.f));
    mask[static_cast<size_t>(i)] = i % 5 != 0;
  }
  if (loss.mask) advantage.set(10, kNan);  // token 10 is masked
  logprob.set(cu[3] + 0, kNan);            // a sequence of one token that is kept, unless masked
  Array stats(dtype == DType::f64 ? Element::f64 : Element::stats, N * kNumPolicyStats);
  PolicyLossArgs args{};
  args.dtype = dtype;
  args.N = N;
  args.R = R;
  args.ratio = loss.ratio;
  args.objective = loss.objective;
  args.kl = loss.kl;
  args.kl_ratio = loss.kl_ratio;
  args.sequence_mean = loss.sequence_mean;
  args.clip_low = 0.2;
  args.clip_high = 0.28;
  args.kl_coef = loss.ref ? 0.05 : 0.0;
  args.dual_clip = loss.dual_clip;
  args.weight = 1.0 / 77.0;
  args.cu_seqlens = cu.data();
  args.logprob = logprob.data();
  args.old_logprob = loss.old ? old.data() : nullptr;
  args.ref_logprob = loss.ref ? ref.data() : nullptr;
  args.advantage = advantage.data();
  args.mask = loss.mask ? mask.get() : nullptr;
  args.dlogprob = dlogprob.data();
  args.stats = stats.as<double>();
  GE_RUN(report, policy_loss, std::string(name_of(dtype)) + "." + loss.name, args, N, dlogprob, stats);
}

// ---------------------------------------------------------------- all of them

void run_all(Report& report) {
  gemm_kernels(report);
  for (const DType dtype : kAll) {
    column_sum_kernel(report, dtype);
    for (const bool residual : {false, true}) rms_norm_kernels(report, dtype, residual);
    for (const bool inverse : {false, true}) rope_kernel(report, dtype, inverse);
    swiglu_kernels(report, dtype);
    add_rows_kernel(report, dtype);
    adamw_kernels(report, dtype, dtype, false);
    gather_logprob_kernels(report, dtype);
    token_logprob_kernels(report, dtype);
    kv_write_kernel(report, dtype);
    paged_attention_kernel(report, dtype, 6, 37);
    paged_attention_kernel(report, dtype, 3, 64);
    for (const bool groups : {false, true}) ragged_attention_kernels(report, dtype, 6, 29, groups);
    ragged_attention_kernels(report, dtype, 12, 32, true);
  }
  for (const DType grad : {DType::f32, DType::bf16}) adamw_kernels(report, DType::bf16, grad, true);
  for (const DType dtype : {DType::f32, DType::bf16}) sample_token_kernels(report, dtype);
  for (const DType dtype : {DType::f32, DType::f64}) {
    for (const Loss& loss : kLosses) policy_loss_kernel(report, dtype, loss);
  }
}

// ---------------------------------------------------------------- command line

struct Options {
  std::vector<int> threads{1, 2, 3};
  std::string expect, write;
  bool list = false;
};

std::vector<int> thread_counts(const std::string& text) {
  std::vector<int> counts;
  for (size_t at = 0; at <= text.size();) {
    const size_t comma = std::min(text.find(',', at), text.size());
    const int count = std::atoi(text.substr(at, comma - at).c_str());
    if (count < 1 || count > 8) throw std::runtime_error("--threads must be numbers from 1 to 8 with commas, got " + text);
    counts.push_back(count);
    at = comma + 1;
  }
  return counts;
}

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name == "--isas") {
      options.list = true;
      continue;
    }
    if (name != "--isa" && name != "--threads" && name != "--expect" && name != "--write") {
      throw std::runtime_error("unknown option " + name);
    }
    if (++i == argc) throw std::runtime_error(name + " needs a value");
    const std::string value = argv[i];
    if (name == "--isa") setenv("GRPO_ENGINE_ISA", value.c_str(), 1);  // read at the first kernel
    if (name == "--threads") options.threads = thread_counts(value);
    if (name == "--expect") options.expect = value;
    if (name == "--write") options.write = value;
  }
  if (!options.list && cpu_isa() == CpuIsa::generic && !(options.expect + options.write).empty()) {
    throw std::runtime_error("--expect and --write: the generic instruction set shares its bits with no other");
  }
  return options;
}

int run(int argc, char** argv) {
  const Options options = parse(argc, argv);
  if (options.list) {
    for (const CpuIsa isa : kCpuIsas) {
      if (cpu_has(isa)) std::printf("%s\n", cpu_isa_name(isa));
    }
    return 0;
  }
  Report report(options.threads);
  run_all(report);
  if (!options.expect.empty()) report.compare_with(options.expect);
  if (report.failed()) return 1;
  if (!options.write.empty()) report.write(options.write);
  std::string counts;
  for (const int n : options.threads) counts += (counts.empty() ? "" : ", ") + std::to_string(n);
  std::printf("kernel_bits: %zu lines on %s, the same bits on %s threads%s\n", report.num_lines(), cpu_isa_name(cpu_isa()),
              counts.c_str(), options.expect.empty() ? "" : ", and those expected");
  return 0;
}

}  // namespace
}  // namespace grpo_engine

int main(int argc, char** argv) {
  try {
    return grpo_engine::run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "kernel_bits: %s\n", error.what());
    return 2;
  }
}
