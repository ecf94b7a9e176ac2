#include "ops/rms_norm.h"

#include "core/simd.h"

namespace grpo_engine::GE_ISA {
namespace {

template <typename S>
void forward(const RmsNormArgs& a, int64_t begin, int64_t end) {
  using A = Arith<S>;
  using V = Vec16<A>;
  const S* weight = static_cast<const S*>(a.weight);
  for (int64_t t = begin; t < end; ++t) {
    const S* x = static_cast<const S*>(a.x) + t * a.D;
    S* y = static_cast<S*>(a.y) + t * a.D;
    if (a.residual) {
      const S* r = static_cast<const S*>(a.residual) + t * a.D;
      S* sum_row = static_cast<S*>(a.sum) + t * a.D;
      each_vector(a.D, [&](int64_t d, int n) { store(load<V>(x + d, n) + load<V>(r + d, n), sum_row + d, n); });
      x = sum_row;
    }
    V squares = V::zero();
    each_vector(a.D, [&](int64_t d, int n) {
      const V v = load<V>(x + d, n);
      squares = fma(v, v, squares);
    });
    const A mean = sum(squares) / static_cast<A>(a.D);
    const A rstd = A(1) / static_cast<A>(::sqrt(static_cast<double>(mean) + a.eps));
    static_cast<A*>(a.rstd)[t] = rstd;
    const V scale = V::set1(rstd);
    each_vector(a.D, [&](int64_t d, int n) {
      store(round_to<S>(load<V>(x + d, n) * scale) * load<V>(weight + d, n), y + d, n);
    });
  }
}

template <typename S>
void backward_input(const RmsNormArgs& a, int64_t begin, int64_t end) {
  using A = Arith<S>;
  using V = Vec16<A>;
  const S* weight = static_cast<const S*>(a.weight);
  for (int64_t t = begin; t < end; ++t) {
    const S* x = static_cast<const S*>(a.x) + t * a.D;
    const S* dy = static_cast<const S*>(a.dy) + t * a.D;
    S* dx = static_cast<S*>(a.dx) + t * a.D;
    const V rstd = V::set1(static_cast<const A*>(a.rstd)[t]);
    V dots = V::zero();
    each_vector(a.D, [&](int64_t d, int n) {
      dots = fma(load<V>(dy + d, n) * load<V>(weight + d, n), load<V>(x + d, n) * rstd, dots);
    });
    const V mean = V::set1(sum(dots) / static_cast<A>(a.D));
    each_vector(a.D, [&](int64_t d, int n) {
      const V g = load<V>(dy + d, n) * load<V>(weight + d, n);
      V r = (g - load<V>(x + d, n) * rstd * mean) * rstd;
      if (a.dsum) r = r + load<V>(static_cast<const S*>(a.dsum) + t * a.D + d, n);
      store(r, dx + d, n);
    });
  }
}

template <typename S>
void backward_weight(const RmsNormArgs& a, int64_t begin, int64_t end) {
  using A = Arith<S>;
  using V = Vec16<A>;
  const S* x = static_cast<const S*>(a.x);
  const S* dy = static_cast<const S*>(a.dy);
  const A* rstd = static_cast<const A*>(a.rstd);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kRmsNormColumns;
    const int64_t columns = a.D - first < kRmsNormColumns ? a.D - first : kRmsNormColumns;
    V sums[kRmsNormColumns / kLanes];
    for (V& s : sums) s = V::zero();
    for (int64_t t = 0; t < a.T; ++t) {
      const V scale = V::set1(rstd[t]);
      each_vector(columns, [&](int64_t d, int n) {
        const int64_t i = t * a.D + first + d;
        sums[d / kLanes] = fma(load<V>(dy + i, n), load<V>(x + i, n) * scale, sums[d / kLanes]);
      });
    }
    each_vector(columns, [&](int64_t d, int n) {
      store(sums[d / kLanes], static_cast<A*>(a.dweight) + first + d, n);
    });
  }
}

}  // namespace

void rms_norm_forward(const RmsNormArgs& args, int64_t begin, int64_t end) { GE_FOR_DTYPE(forward) }
void rms_norm_backward_input(const RmsNormArgs& args, int64_t begin, int64_t end) {
  GE_FOR_DTYPE(backward_input)
}
void rms_norm_backward_weight(const RmsNormArgs& args, int64_t begin, int64_t end) {
  GE_FOR_DTYPE(backward_weight)
}

}  // namespace grpo_engine::GE_ISA
