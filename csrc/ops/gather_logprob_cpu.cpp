#include "ops/gather_logprob.h"

#include "core/row_stats.h"

namespace grpo_engine::GE_ISA {
namespace {

template <typename S>
void forward(const GatherLogprobArgs& a, int64_t begin, int64_t end) {
  const float scale = static_cast<float>(a.inv_temperature);
  for (int64_t t = begin; t < end; ++t) {
    const S* x = static_cast<const S*>(a.logits) + t * a.V;
    const RowStats r = row_stats(x, a.V, scale);
    const double entropy = r.entropy();
    static_cast<float*>(a.logprob)[t] = static_cast<float>(r.logprob(scaled(to_arith(x[a.target[t]]), scale)));
    static_cast<float*>(a.entropy)[t] = static_cast<float>(entropy);
    double* saved = a.saved + t * 3;
    saved[0] = r.max;
    saved[1] = ::log(r.sum);
    saved[2] = entropy;
  }
}

template <>
void forward<double>(const GatherLogprobArgs& a, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    const double* x = static_cast<const double*>(a.logits) + t * a.V;
    double max = -__builtin_inf(), sum = 0.0, weighted = 0.0;
    for (int64_t v = 0; v < a.V; ++v) {
      const double z = x[v] * a.inv_temperature;
      max = z > max ? z : max;
    }
    for (int64_t v = 0; v < a.V; ++v) {
      const double d = x[v] * a.inv_temperature - max, e = ::exp(d);
      sum += e;
      if (e != 0.0) weighted += d * e;
    }
    const double log_sum = ::log(sum), entropy = log_sum - weighted / sum;
    static_cast<double*>(a.logprob)[t] = x[a.target[t]] * a.inv_temperature - max - log_sum;
    static_cast<double*>(a.entropy)[t] = entropy;
    double* saved = a.saved + t * 3;
    saved[0] = max;
    saved[1] = log_sum;
    saved[2] = entropy;
  }
}

template <typename S>
void backward(const GatherLogprobArgs& a, int64_t begin, int64_t end) {
  using A = Arith<S>;
  using V = Vec16<A>;
  const A scale = static_cast<A>(a.inv_temperature);
  for (int64_t t = begin; t < end; ++t) {
    const S* x = static_cast<const S*>(a.logits) + t * a.V;
    S* dx = static_cast<S*>(a.dlogits) + t * a.V;
    const double* saved = a.saved + t * 3;
    const A g_logprob = static_cast<const A*>(a.g_logprob)[t];
    const A g_entropy = static_cast<const A*>(a.g_entropy)[t];
    if (leaves_float(saved[0], scale)) {
      wide_gradient(x, a.V, a.target[t], scale, saved, g_logprob, g_entropy, dx);
      continue;
    }
    const V z_scale = V::set1(scale), shift = V::set1(static_cast<A>(saved[0]));
    const V log_sum = V::set1(static_cast<A>(saved[1])), entropy = V::set1(static_cast<A>(saved[2]));
    const V gl = V::set1(-g_logprob * scale), ge = V::set1(-g_entropy * scale);
    const V low = V::set1(A(-1000));  // p = 0 there; keeps 0 * -inf out
    each_vector(a.V, [&](int64_t v, int n) {
      const V log_p = vmax(low, load<V>(x + v, n) * z_scale - shift - log_sum);
      const V p = vexp(log_p);
      store(p * fma(ge, log_p + entropy, gl), dx + v, n);
    });
    // the target's own element again, in full precision before the one rounding of the store; its z
    // is rounded as in the forward pass, or p could exceed 1
    const int64_t target = a.target[t];
    const A z = to_arith(x[target]) * scale;
    const double log_p = static_cast<double>(z) - saved[0] - saved[1];
    const double p = ::exp(log_p);
    const double g = static_cast<double>(g_logprob) * (1.0 - p) -
                     (p > 0.0 ? static_cast<double>(g_entropy) * p * (log_p + saved[2]) : 0.0);
    from_arith(static_cast<A>(g * a.inv_temperature), dx + target);
  }
}

}  // namespace

void gather_logprob_forward(const GatherLogprobArgs& args, int64_t begin, int64_t end) { GE_FOR_DTYPE(forward) }
void gather_logprob_backward(const GatherLogprobArgs& args, int64_t begin, int64_t end) { GE_FOR_DTYPE(backward) }

}  // namespace grpo_engine::GE_ISA
