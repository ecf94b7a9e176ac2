#include "ops/adamw.h"

#include "core/simd.h"
#include "ops/adamw.cuh"

namespace grpo_engine::GE_ISA {
namespace {

template <typename S>
void squares(AdamwBlock& b) {
  using V = Vec16<Arith<S>>;
  V sums = V::zero();
  each_vector(b.count, [&](int64_t i, int n) {
    const V g = load<V>(static_cast<const S*>(b.grad) + i, n);
    sums = fma(g, g, sums);
  });
  b.squares = sum(sums);
}

// Where the parameters of a block lie: in one array, or as the two halves of a float32.
template <typename S>
struct Whole {
  S* p;
  template <typename V>
  V read(int64_t i, int n) const { return load<V>(p + i, n); }
  template <typename V>
  void write(V x, int64_t i, int n) const { store(x, p + i, n); }
};
struct Halves {
  bfloat16* high;
  int16_t* low;
  template <typename V>
  V read(int64_t i, int n) const {
    float x[kLanes];
    for (int k = 0; k < n; ++k) x[k] = join_float({high[i + k].bits, low[i + k]});
    return load<V>(x, n);
  }
  template <typename V>
  void write(V x, int64_t i, int n) const {
    float xs[kLanes];
    store(x, xs, n);
    for (int k = 0; k < n; ++k) {
      const SplitFloat s = split_float(xs[k]);
      high[i + k].bits = s.high;
      low[i + k] = s.low;
    }
  }
};

// S: of the moments, G: of the gradient.
template <typename S, typename G, typename Param>
void update(const AdamwArgs& args, AdamwBlock& b, Param param) {
  using A = Arith<S>;
  using V = Vec16<A>;
  auto constant = [](double x) { return V::set1(static_cast<A>(x)); };
  const V scale = constant(args.scale), keep = constant(1.0 - args.decay), eps = constant(args.eps);
  const V new1 = constant(1.0 - args.beta1), beta2 = constant(args.beta2), new2 = constant(1.0 - args.beta2);
  const V rate = constant(-b.rate), root = constant(b.root);
  S *ms = static_cast<S*>(b.m), *vs = static_cast<S*>(b.v);
  each_vector(b.count, [&](int64_t i, int n) {
    const V g = load<V>(static_cast<const G*>(b.grad) + i, n) * scale;
    V m = load<V>(ms + i, n), v = load<V>(vs + i, n);
    m = fma(new1, g - m, m);
    v = fma(new2 * g, g, beta2 * v);
    const V denominator = fma(vsqrt(v), root, eps);
    const V p = fma(rate, m / denominator, param.template read<V>(i, n) * keep);
    store(m, ms + i, n);
    store(v, vs + i, n);
    param.write(p, i, n);
  });
}

template <typename S>
void update(const AdamwArgs& args, AdamwBlock& b) {
  if constexpr (sizeof(S) == sizeof(bfloat16)) {
    const Halves param{static_cast<bfloat16*>(b.param), b.low};
    if (b.low && b.grad_dtype == DType::f32) return update<float, float>(args, b, param);
    if (b.low) return update<float, bfloat16>(args, b, param);
  }
  update<S, S>(args, b, Whole<S>{static_cast<S*>(b.param)});
}

}  // namespace

#define GE_EACH_BLOCK(which, call)                        \
  for (int64_t i = begin; i < end; ++i) {                 \
    AdamwBlock& b = args.block[i];                        \
    switch (b.which) {                                    \
      case DType::f32: { using S = float; call; break; }  \
      case DType::bf16: { using S = bfloat16; call; break; } \
      case DType::f64: { using S = double; call; break; } \
    }                                                     \
  }
void adamw_squares(const AdamwArgs& args, int64_t begin, int64_t end) { GE_EACH_BLOCK(grad_dtype, squares<S>(b)) }
void adamw_update(const AdamwArgs& args, int64_t begin, int64_t end) { GE_EACH_BLOCK(dtype, update<S>(args, b)) }

}  // namespace grpo_engine::GE_ISA
