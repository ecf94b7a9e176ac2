#include "ops/adamw.h"

#include "core/simd.h"

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

template <typename S>
void update(const AdamwArgs& args, AdamwBlock& b) {
  using A = Arith<S>;
  using V = Vec16<A>;
  auto constant = [](double x) { return V::set1(static_cast<A>(x)); };
  const V scale = constant(args.scale), keep = constant(1.0 - args.decay), eps = constant(args.eps);
  const V new1 = constant(1.0 - args.beta1), beta2 = constant(args.beta2), new2 = constant(1.0 - args.beta2);
  const V rate = constant(-b.rate), root = constant(b.root);
  S *param = static_cast<S*>(b.param), *ms = static_cast<S*>(b.m), *vs = static_cast<S*>(b.v);
  each_vector(b.count, [&](int64_t i, int n) {
    const V g = load<V>(static_cast<const S*>(b.grad) + i, n) * scale;
    V m = load<V>(ms + i, n), v = load<V>(vs + i, n);
    m = fma(new1, g - m, m);
    v = fma(new2 * g, g, beta2 * v);
    const V denominator = fma(vsqrt(v), root, eps);
    const V p = fma(rate, m / denominator, load<V>(param + i, n) * keep);
    store(m, ms + i, n);
    store(v, vs + i, n);
    store(p, param + i, n);
  });
}

}  // namespace

#define GE_EACH_BLOCK(call)                               \
  for (int64_t i = begin; i < end; ++i) {                 \
    AdamwBlock& b = args.block[i];                        \
    switch (b.dtype) {                                    \
      case DType::f32: { using S = float; call; break; }  \
      case DType::bf16: { using S = bfloat16; call; break; } \
      case DType::f64: { using S = double; call; break; } \
    }                                                     \
  }
void adamw_squares(const AdamwArgs& args, int64_t begin, int64_t end) { GE_EACH_BLOCK(squares<S>(b)) }
void adamw_update(const AdamwArgs& args, int64_t begin, int64_t end) { GE_EACH_BLOCK(update<S>(args, b)) }

}  // namespace grpo_engine::GE_ISA
