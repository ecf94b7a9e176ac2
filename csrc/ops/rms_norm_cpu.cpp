#include "ops/rms_norm.h"

#include "core/simd.h"

namespace grpo_engine::GE_ISA {
namespace {

template <typename S, bool kWithResidual>
void forward_row(const RmsNormArgs& a, int64_t t) {
  using A = Arith<S>;
  using V = Vec16<A>;
  const S* x = static_cast<const S*>(a.x) + t * a.D;
  const S* weight = static_cast<const S*>(a.weight);
  S* y = static_cast<S*>(a.y) + t * a.D;
  S* total = kWithResidual ? static_cast<S*>(a.sum) + t * a.D : nullptr;
  const S* residual = kWithResidual ? static_cast<const S*>(a.residual) + t * a.D : nullptr;
  const S* normed = kWithResidual ? total : x;
  const V squares = sum_vectors<V>(a.D, [&](int64_t d, int n, V s) {
    if constexpr (kWithResidual) {
      store(load<V>(x + d, n) + load<V>(residual + d, n), total + d, n);
    }
    const V v = load<V>(normed + d, n);
    return fma(v, v, s);
  });
  const A mean = sum(squares) / static_cast<A>(a.D);
  const A rstd = A(1) / static_cast<A>(::sqrt(static_cast<double>(mean) + a.eps));
  static_cast<A*>(a.rstd)[t] = rstd;
  const V scale = V::set1(rstd);
  each_vector(
      a.D, [&](int64_t d, int n) { store(round_to<S>(load<V>(normed + d, n) * scale) * load<V>(weight + d, n), y + d, n); });
}

template <typename S>
void forward(const RmsNormArgs& a, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    a.residual ? forward_row<S, true>(a, t) : forward_row<S, false>(a, t);
  }
}

template <typename S, bool kWithDsum>
void backward_row(const RmsNormArgs& a, int64_t t, Arith<S>* dweight) {
  using A = Arith<S>;
  using V = Vec16<A>;
  const S* weight = static_cast<const S*>(a.weight);
  const S* x = static_cast<const S*>(a.x) + t * a.D;
  const S* dy = static_cast<const S*>(a.dy) + t * a.D;
  const S* dsum = kWithDsum ? static_cast<const S*>(a.dsum) + t * a.D : nullptr;
  S* dx = static_cast<S*>(a.dx) + t * a.D;
  const V rstd = V::set1(static_cast<const A*>(a.rstd)[t]);
  const V dots = sum_vectors<V>(a.D, [&](int64_t d, int n, V s) {
    return fma(load<V>(dy + d, n) * load<V>(weight + d, n), load<V>(x + d, n) * rstd, s);
  });
  const V mean = V::set1(sum(dots) / static_cast<A>(a.D));
  each_vector(a.D, [&](int64_t d, int n) {
    const V g = load<V>(dy + d, n), normed = load<V>(x + d, n) * rstd;
    V ds = (g * load<V>(weight + d, n) - normed * mean) * rstd;
    if constexpr (kWithDsum) ds = ds + load<V>(dsum + d, n);
    store(ds, dx + d, n);
    store(fma(g, normed, load<V>(dweight + d, n)), dweight + d, n);
  });
}

template <typename S>
void backward(const RmsNormArgs& a, int64_t begin, int64_t end) {
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    Arith<S>* dweight = static_cast<Arith<S>*>(a.dweight) + chunk * a.D;
    for (int64_t d = 0; d < a.D; ++d) dweight[d] = 0;
    const int64_t first = chunk * kRmsNormRows;
    const int64_t last = a.T - first < kRmsNormRows ? a.T : first + kRmsNormRows;
    for (int64_t t = first; t < last; ++t) {
      a.dsum ? backward_row<S, true>(a, t, dweight) : backward_row<S, false>(a, t, dweight);
    }
  }
}

template <typename S>
void join(const RmsNormArgs& a, int64_t begin, int64_t end) {
  using V = Vec16<Arith<S>>;
  const int64_t chunks = (a.T + kRmsNormRows - 1) / kRmsNormRows;
  for (int64_t block = begin; block < end; ++block) {
    Arith<S>* dweight = static_cast<Arith<S>*>(a.dweight) + block * kRmsNormColumns;
    const int64_t left = a.D - block * kRmsNormColumns;
    each_vector(left < kRmsNormColumns ? left : kRmsNormColumns, [&](int64_t d, int n) {
      V total = load<V>(dweight + d, n);
      for (int64_t c = 1; c < chunks; ++c) total = total + load<V>(dweight + c * a.D + d, n);
      store(total, dweight + d, n);
    });
  }
}

}  // namespace

void rms_norm_forward(const RmsNormArgs& args, int64_t begin, int64_t end) { GE_FOR_DTYPE(forward) }
void rms_norm_backward(const RmsNormArgs& args, int64_t begin, int64_t end) { GE_FOR_DTYPE(backward) }
void rms_norm_join(const RmsNormArgs& args, int64_t begin, int64_t end) { GE_FOR_DTYPE(join) }

}  // namespace grpo_engine::GE_ISA
