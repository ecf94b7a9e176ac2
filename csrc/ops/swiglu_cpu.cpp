#include "ops/swiglu.h"

#include "core/simd.h"

namespace grpo_engine::GE_ISA {
namespace {

// e = 1 + exp(-g): +inf or 1 long before the limits at which g is held; a NaN stays.
template <typename V, int N>
GE_INLINE void one_plus_exp(const V (&g)[N], V (&e)[N]) {
  const bool is_float = sizeof(V) == sizeof(VecF);
  const V limit = V::set1(is_float ? 104 : 800), zero = V::zero(), one = V::set1(1);
  for (int k = 0; k < N; ++k) e[k] = zero - vmin(limit, vmax(zero - limit, g[k]));
  exp_in_range(e);
  for (int k = 0; k < N; ++k) e[k] = e[k] + one;
}

template <typename S>
void forward(const SwigluArgs& a, int64_t begin, int64_t end) {
  using V = Vec16<Arith<S>>;
  for (int64_t t = begin; t < end; ++t) {
    const S* gate = static_cast<const S*>(a.gate_up) + t * 2 * a.F;
    const S* up = gate + a.F;
    S* y = static_cast<S*>(a.y) + t * a.F;
    each_four_vectors(a.F, [&]<int N>(int64_t f, int n) {
      V g[N], e[N];
      for (int k = 0; k < N; ++k) g[k] = load<V>(gate + f + k * kLanes, n);
      one_plus_exp(g, e);
      for (int k = 0; k < N; ++k) {
        const int64_t i = f + k * kLanes;
        store(round_to<S>(g[k] / e[k]) * load<V>(up + i, n), y + i, n);
      }
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
    each_four_vectors(a.F, [&]<int N>(int64_t f, int n) {
      V g[N], e[N];
      for (int k = 0; k < N; ++k) g[k] = load<V>(gate + f + k * kLanes, n);
      one_plus_exp(g, e);
      for (int k = 0; k < N; ++k) {
        const int64_t i = f + k * kLanes;
        const V s = one / e[k], slope = load<V>(dy + i, n) * s;
        store(slope * load<V>(up + i, n) * fma(g[k], one - s, one), dgate + i, n);
        store(slope * g[k], dup + i, n);
      }
    });
  }
}

}  // namespace

void swiglu_forward(const SwigluArgs& args, int64_t begin, int64_t end) { GE_FOR_DTYPE(forward) }
void swiglu_backward(const SwigluArgs& args, int64_t begin, int64_t end) { GE_FOR_DTYPE(backward) }

}  // namespace grpo_engine::GE_ISA
