#include "ops/rope.h"

#include "core/simd.h"

namespace grpo_engine::GE_ISA {
namespace {

template <typename S>
void rotate(const RopeArgs& a, int64_t begin, int64_t end) {
  using A = Arith<S>;
  using V = Vec16<A>;
  const int64_t half = a.E / 2;
  const V sign = V::set1(a.inverse ? A(-1) : A(1));
  for (int64_t t = begin; t < end; ++t) {
    const float* cosine = a.table + (a.first_position < 0 ? t : a.position[t] - a.first_position) * a.E;
    const float* sine = cosine + half;
    const S* x = static_cast<const S*>(a.x) + t * a.x_stride;
    S* y = static_cast<S*>(a.y) + t * a.y_stride;
    each_vector(half, [&](int64_t i, int n) {
      const V c = load<V>(cosine + i, n), s = load<V>(sine + i, n) * sign;
      for (int64_t h = 0; h < a.H; ++h) {
        const V low = load<V>(x + h * a.E + i, n), high = load<V>(x + h * a.E + half + i, n);
        store(low * c - high * s, y + h * a.E + i, n);
        store(high * c + low * s, y + h * a.E + half + i, n);
      }
    });
  }
}

}  // namespace

void rope(const RopeArgs& args, int64_t begin, int64_t end) { GE_FOR_DTYPE(rotate) }

}  // namespace grpo_engine::GE_ISA
