#include "ops/swiglu.h"

#include "core/simd.h"

namespace grpo_engine::GE_ISA {
namespace {

template <typename V>
GE_INLINE V sigmoid(V g) {
  const V one = V::set1(1);
  return one / (one + vexp(V::zero() - g));
}

template <typename S>
void forward(const SwigluArgs& a, int64_t begin, int64_t end) {
  using V = Vec16<Arith<S>>;
  for (int64_t t = begin; t < end; ++t) {
    const S* gate = static_cast<const S*>(a.gate_up) + t * 2 * a.F;
    const S* up = gate + a.F;
    S* y = static_cast<S*>(a.y) + t * a.F;
    each_vector(a.F, [&](int64_t f, int n) {
      const V g = load<V>(gate + f, n);
      store(round_to<S>(g * sigmoid(g)) * load<V>(up + f, n), y + f, n);
    });
  }
}

template <typename S>
void backward(const SwigluArgs& a, int64_t begin, int64_t end) {
  using V = Vec16<Arith<S>>;
  const V one = V::set1(1);
  for (int64_t t = begin; t < end; ++t) {
    const S* gate = static_cast<const S*>(a.gate_up) + t * 2 * a.F;
    const S* up = gate + a.F;
    const S* dy = static_cast<const S*>(a.dy) + t * a.F;
    S* dgate = static_cast<S*>(a.dgate_up) + t * 2 * a.F;
    S* dup = dgate + a.F;
    each_vector(a.F, [&](int64_t f, int n) {
      const V g = load<V>(gate + f, n), d = load<V>(dy + f, n), s = sigmoid(g);
      store(d * load<V>(up + f, n) * s * (one + g * (one - s)), dgate + f, n);
      store(d * g * s, dup + f, n);
    });
  }
}

}  // namespace

void swiglu_forward(const SwigluArgs& args, int64_t begin, int64_t end) { GE_FOR_DTYPE(forward) }
void swiglu_backward(const SwigluArgs& args, int64_t begin, int64_t end) { GE_FOR_DTYPE(backward) }

}  // namespace grpo_engine::GE_ISA
