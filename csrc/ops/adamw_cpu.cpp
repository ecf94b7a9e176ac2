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
  V read(int64_t i, int n) const {
    return load<V>(p + i, n);
  }
  template <typename V>
  void write(V x, int64_t i, int n) const {
    store(x, p + i, n);
  }
};
#if defined(__AVX2__)
GE_INLINE void join_whole(const bfloat16* high, const int16_t* low, float* x) {
  for (int k = 0; k < kLanes; k += 8) {
    const __m256i h = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(high + k)));
    const __m256i l = _mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low + k)));
    _mm256_storeu_ps(x + k, _mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32(h, 16), l)));
  }
}
GE_INLINE void split_whole(const float* x, bfloat16* high, int16_t* low) {
  __m256i h[2], l[2];
  for (int k = 0; k < 2; ++k) {
    const __m256 f = _mm256_loadu_ps(x + 8 * k);
    const __m256i u = _mm256_castps_si256(f), nan = _mm256_castps_si256(_mm256_cmp_ps(f, f, _CMP_UNORD_Q));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x8000)), 16);
    h[k] = _mm256_blendv_epi8(rounded, _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40)), nan);
    l[k] = _mm256_andnot_si256(nan, _mm256_sub_epi32(u, _mm256_slli_epi32(h[k], 16)));
  }
  const __m256i highs = _mm256_packus_epi32(h[0], h[1]), lows = _mm256_packs_epi32(l[0], l[1]);  // quarters 0 2 1 3
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(high), _mm256_permute4x64_epi64(highs, 0xD8));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(low), _mm256_permute4x64_epi64(lows, 0xD8));
}
#else
GE_INLINE void join_whole(const bfloat16* high, const int16_t* low, float* x) {
  for (int k = 0; k < kLanes; ++k) x[k] = join_float({high[k].bits, low[k]});
}
GE_INLINE void split_whole(const float* x, bfloat16* high, int16_t* low) {
  for (int k = 0; k < kLanes; ++k) {
    const SplitFloat s = split_float(x[k]);
    high[k].bits = s.high;
    low[k] = s.low;
  }
}
#endif

struct Halves {
  bfloat16* high;
  int16_t* low;
  template <typename V>
  V read(int64_t i, int n) const {
    float x[kLanes];
    if (n == kLanes) {
      join_whole(high + i, low + i, x);
    } else {
      for (int k = 0; k < n; ++k) x[k] = join_float({high[i + k].bits, low[i + k]});
    }
    return load<V>(x, n);
  }
  template <typename V>
  void write(V v, int64_t i, int n) const {
    float x[kLanes];
    v.store(x);
    if (n == kLanes) return split_whole(x, high + i, low + i);
    for (int k = 0; k < n; ++k) {
      const SplitFloat s = split_float(x[k]);
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

#define GE_EACH_BLOCK(which, call)        \
  for (int64_t i = begin; i < end; ++i) { \
    AdamwBlock& b = args.block[i];        \
    switch (b.which) {                    \
      case DType::f32: {                  \
        using S = float;                  \
        call;                             \
        break;                            \
      }                                   \
      case DType::bf16: {                 \
        using S = bfloat16;               \
        call;                             \
        break;                            \
      }                                   \
      case DType::f64: {                  \
        using S = double;                 \
        call;                             \
        break;                            \
      }                                   \
    }                                     \
  }
void adamw_squares(const AdamwArgs& args, int64_t begin, int64_t end) { GE_EACH_BLOCK(grad_dtype, squares<S>(b)) }
void adamw_update(const AdamwArgs& args, int64_t begin, int64_t end) { GE_EACH_BLOCK(dtype, update<S>(args, b)) }

}  // namespace grpo_engine::GE_ISA
