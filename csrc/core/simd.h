// simd.h -- sixteen lanes on every CPU.
//
// Vec16<T> is one zmm, two ymm, four NEON registers or an array of 16, by the instruction set. So a kernel is written once,
// and its sums are grouped in the same way everywhere. AVX2, AVX-512 and NEON give the same bits, but for the sign and
// payload of a NaN, which no instruction set promises. The generic build has no fused multiply-add and may differ from them
// in the last bit.
//
//   T = float    arithmetic of float32 and bfloat16 storage
//   T = double   arithmetic of float64 storage (gradcheck); plain loops
//
// This header is compiled once per instruction set, each copy into its own namespace GE_ISA. Every function is internal to
// its translation unit. Otherwise the linker could keep an AVX-512 copy for a machine without AVX-512. For the same reason
// the header uses no std:: templates.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(GE_NEON)  // set by CMake for the copy `neon`: __ARM_NEON is there in the generic one too
#include <arm_neon.h>
#endif

#include "core/dtype.h"

#ifndef GE_ISA
#error "simd.h belongs in kernels that are compiled per instruction set (GE_ISA is set by CMake)"
#endif
#define GE_INLINE static inline __attribute__((always_inline))
#define GE_MEMBER inline __attribute__((always_inline))
#define GE_LAMBDA __attribute__((always_inline))

namespace grpo_engine::GE_ISA {
namespace {

constexpr int kLanes = 16;

GE_INLINE float bf16_to_float(bfloat16 x) {
  const uint32_t u = static_cast<uint32_t>(x.bits) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

// Round to nearest, ties to even; NaN stays NaN.
GE_INLINE bfloat16 float_to_bf16(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  if (f != f) return {static_cast<uint16_t>((u >> 16) | 0x40)};
  return {static_cast<uint16_t>((u + 0x7FFFu + ((u >> 16) & 1u)) >> 16)};
}

GE_INLINE float to_arith(float x) { return x; }
GE_INLINE float to_arith(bfloat16 x) { return bf16_to_float(x); }
GE_INLINE double to_arith(double x) { return x; }
GE_INLINE void from_arith(float x, float* p) { *p = x; }
GE_INLINE void from_arith(float x, bfloat16* p) { *p = float_to_bf16(x); }
GE_INLINE void from_arith(double x, double* p) { *p = x; }

// ---------------------------------------------------------------- array of 16 (any T)

template <typename T>
struct Vec16 {
  T v[kLanes];

  static GE_MEMBER Vec16 set1(T x) {
    Vec16 r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = x;
    return r;
  }
  static GE_MEMBER Vec16 zero() { return set1(T(0)); }
  template <typename S>
  static GE_MEMBER Vec16 load(const S* p) {
    Vec16 r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = to_arith(p[i]);
    return r;
  }
  // Lanes >= n are `fill`; memory past p[n-1] is not touched. 0 <= n <= 16.
  template <typename S>
  static GE_MEMBER Vec16 load_n(const S* p, int n, T fill = T(0)) {
    Vec16 r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = i < n ? to_arith(p[i]) : fill;
    return r;
  }
  GE_MEMBER Vec16 rounded_to_bf16() const {
    Vec16 r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = bf16_to_float(float_to_bf16(v[i]));
    return r;
  }
  template <typename S>
  GE_MEMBER void store(S* p) const {
    for (int i = 0; i < kLanes; ++i) from_arith(v[i], p + i);
  }
  template <typename S>
  GE_MEMBER void store_n(S* p, int n) const {
    for (int i = 0; i < n; ++i) from_arith(v[i], p + i);
  }
};

#define GE_LANEWISE(expr)                           \
  Vec16<T> r;                                       \
  for (int i = 0; i < kLanes; ++i) r.v[i] = (expr); \
  return r
template <typename T>
GE_INLINE Vec16<T> operator+(Vec16<T> a, Vec16<T> b) {
  GE_LANEWISE(a.v[i] + b.v[i]);
}
template <typename T>
GE_INLINE Vec16<T> operator-(Vec16<T> a, Vec16<T> b) {
  GE_LANEWISE(a.v[i] - b.v[i]);
}
template <typename T>
GE_INLINE Vec16<T> operator*(Vec16<T> a, Vec16<T> b) {
  GE_LANEWISE(a.v[i] * b.v[i]);
}
template <typename T>
GE_INLINE Vec16<T> operator/(Vec16<T> a, Vec16<T> b) {
  GE_LANEWISE(a.v[i] / b.v[i]);
}
// a * b + c; one rounding where the instruction set has it.
template <typename T>
GE_INLINE Vec16<T> fma(Vec16<T> a, Vec16<T> b, Vec16<T> c) {
  GE_LANEWISE(a.v[i] * b.v[i] + c.v[i]);
}
// The second argument when either is NaN.
template <typename T>
GE_INLINE Vec16<T> vmax(Vec16<T> a, Vec16<T> b) {
  GE_LANEWISE(a.v[i] > b.v[i] ? a.v[i] : b.v[i]);
}
template <typename T>
GE_INLINE Vec16<T> vmin(Vec16<T> a, Vec16<T> b) {
  GE_LANEWISE(a.v[i] < b.v[i] ? a.v[i] : b.v[i]);
}
// x where a < b, else y; y where a or b is NaN.
template <typename T>
GE_INLINE Vec16<T> where_less(Vec16<T> a, Vec16<T> b, Vec16<T> x, Vec16<T> y) {
  GE_LANEWISE(a.v[i] < b.v[i] ? x.v[i] : y.v[i]);
}
template <typename T>
GE_INLINE Vec16<T> vsqrt(Vec16<T> a) {
  GE_LANEWISE(static_cast<T>(::sqrt(a.v[i])));
}
#undef GE_LANEWISE

// ((0+8)+(4+12)) + ... : the same tree on every instruction set.
template <typename T>
GE_INLINE T sum(Vec16<T> a) {
  for (int i = 0; i < 8; ++i) a.v[i] += a.v[i + 8];
  for (int i = 0; i < 4; ++i) a.v[i] += a.v[i + 4];
  for (int i = 0; i < 2; ++i) a.v[i] += a.v[i + 2];
  return a.v[0] + a.v[1];
}
template <typename T>
GE_INLINE T max_lane(Vec16<T> a) {
  T m = a.v[0];
  for (int i = 1; i < kLanes; ++i) m = a.v[i] > m ? a.v[i] : m;
  return m;
}

// ---------------------------------------------------------------- float on AVX-512 / AVX2 / NEON

#if defined(__AVX2__)
GE_INLINE float sum8(__m256 x) {
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(y) + _mm_cvtss_f32(_mm_shuffle_ps(y, y, 1));
}
// The order of the operands decides where lanes are NaN, or zeros of both signs.
GE_INLINE float max8(__m256 x) {
  __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_shuffle_ps(y, y, 1)));
}
#endif

#if defined(__AVX512F__)
template <>
struct Vec16<float> {
  __m512 v;

  static GE_MEMBER Vec16 set1(float x) { return {_mm512_set1_ps(x)}; }
  static GE_MEMBER Vec16 zero() { return {_mm512_setzero_ps()}; }
  static GE_MEMBER Vec16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static GE_MEMBER Vec16 load(const bfloat16* p) {
    const __m256i u = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(u), 16))};
  }
  static GE_MEMBER __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
  static GE_MEMBER Vec16 load_n(const float* p, int n, float fill = 0.f) {
    return {_mm512_mask_loadu_ps(_mm512_set1_ps(fill), first(n), p)};
  }
  static GE_MEMBER Vec16 load_n(const bfloat16* p, int n, float fill = 0.f) {
    const __m256i u = _mm256_maskz_loadu_epi16(first(n), p);
    const __m512 f = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(u), 16));
    return {_mm512_mask_mov_ps(_mm512_set1_ps(fill), first(n), f)};
  }
  GE_MEMBER void store(float* p) const { _mm512_storeu_ps(p, v); }
  GE_MEMBER void store_n(float* p, int n) const { _mm512_mask_storeu_ps(p, first(n), v); }
  GE_MEMBER __m512i bf16_bits() const {  // in the upper half of each 32-bit lane
    const __m512i u = _mm512_castps_si512(v), half = _mm512_set1_epi32(0x7FFF), one = _mm512_set1_epi32(1);
    const __mmask16 odd = _mm512_test_epi32_mask(u, _mm512_set1_epi32(0x10000));
    __m512i r = _mm512_add_epi32(u, half);
    r = _mm512_mask_add_epi32(r, odd, r, one);
    // a NaN, quiet or not (classes 0 and 1), becomes the quiet NaN of v (response 2); the rest stays (0)
    return _mm512_castps_si512(_mm512_fixupimm_ps(_mm512_castsi512_ps(r), v, _mm512_set1_epi32(0x22), 0));
  }
  GE_MEMBER __m256i to_bf16() const {
    const __m512i upper = _mm512_set_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 31, 29, 27, 25, 23, 21, 19, 17,
                                           15, 13, 11, 9, 7, 5, 3, 1);
    return _mm512_castsi512_si256(_mm512_permutexvar_epi16(upper, bf16_bits()));
  }
  GE_MEMBER Vec16 rounded_to_bf16() const {
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
    return {_mm512_castsi512_ps(_mm512_and_si512(bf16_bits(), upper))};
  }
  GE_MEMBER void store(bfloat16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16()); }
  GE_MEMBER void store_n(bfloat16* p, int n) const { _mm256_mask_storeu_epi16(p, first(n), to_bf16()); }
};
using VecF = Vec16<float>;
GE_INLINE VecF operator+(VecF a, VecF b) { return {_mm512_add_ps(a.v, b.v)}; }
GE_INLINE VecF operator-(VecF a, VecF b) { return {_mm512_sub_ps(a.v, b.v)}; }
GE_INLINE VecF operator*(VecF a, VecF b) { return {_mm512_mul_ps(a.v, b.v)}; }
GE_INLINE VecF operator/(VecF a, VecF b) { return {_mm512_div_ps(a.v, b.v)}; }
GE_INLINE VecF fma(VecF a, VecF b, VecF c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
GE_INLINE VecF vmax(VecF a, VecF b) { return {_mm512_max_ps(a.v, b.v)}; }
GE_INLINE VecF vmin(VecF a, VecF b) { return {_mm512_min_ps(a.v, b.v)}; }
GE_INLINE VecF where_less(VecF a, VecF b, VecF x, VecF y) {
  return {_mm512_mask_mov_ps(y.v, _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), x.v)};
}
GE_INLINE VecF vsqrt(VecF a) { return {_mm512_sqrt_ps(a.v)}; }
GE_INLINE float sum(VecF a) { return sum8(_mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1))); }
GE_INLINE float max_lane(VecF a) { return max8(_mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1))); }

#elif defined(__AVX2__)
template <>
struct Vec16<float> {
  __m256 lo, hi;

  static GE_MEMBER Vec16 set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static GE_MEMBER Vec16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static GE_MEMBER Vec16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static GE_MEMBER __m256 widen(__m128i u) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(u), 16)); }
  static GE_MEMBER Vec16 load(const bfloat16* p) {
    const __m256i u = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {widen(_mm256_castsi256_si128(u)), widen(_mm256_extracti128_si256(u, 1))};
  }
  template <typename S>
  static GE_MEMBER Vec16 load_n(const S* p, int n, float fill = 0.f) {
    float buffer[kLanes];
    for (int i = 0; i < kLanes; ++i) buffer[i] = i < n ? to_arith(p[i]) : fill;
    return load(buffer);
  }
  GE_MEMBER void store(float* p) const {
    _mm256_storeu_ps(p, lo);
    _mm256_storeu_ps(p + 8, hi);
  }
  static GE_MEMBER __m256i bf16_bits(__m256 f) {  // in the upper half of each 32-bit lane
    const __m256i u = _mm256_castps_si256(f);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i r = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(f, f, _CMP_UNORD_Q));
    const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
    return _mm256_blendv_epi8(r, quiet, nan);
  }
  static GE_MEMBER __m256i narrow(__m256 f) { return _mm256_srli_epi32(bf16_bits(f), 16); }
  static GE_MEMBER __m256 round_half(__m256 f) {
    const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xFFFF0000u));
    return _mm256_castsi256_ps(_mm256_and_si256(bf16_bits(f), upper));
  }
  GE_MEMBER Vec16 rounded_to_bf16() const { return {round_half(lo), round_half(hi)}; }
  GE_MEMBER void store(bfloat16* p) const {
    const __m256i packed = _mm256_packus_epi32(narrow(lo), narrow(hi));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xD8));
  }
  template <typename S>
  GE_MEMBER void store_n(S* p, int n) const {
    S buffer[kLanes];
    store(buffer);
    for (int i = 0; i < n; ++i) p[i] = buffer[i];
  }
};
using VecF = Vec16<float>;
GE_INLINE VecF operator+(VecF a, VecF b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
GE_INLINE VecF operator-(VecF a, VecF b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
GE_INLINE VecF operator*(VecF a, VecF b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
GE_INLINE VecF operator/(VecF a, VecF b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
GE_INLINE VecF fma(VecF a, VecF b, VecF c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
GE_INLINE VecF vmax(VecF a, VecF b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
GE_INLINE VecF vmin(VecF a, VecF b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
GE_INLINE VecF where_less(VecF a, VecF b, VecF x, VecF y) {
  return {_mm256_blendv_ps(y.lo, x.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
          _mm256_blendv_ps(y.hi, x.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
}
GE_INLINE VecF vsqrt(VecF a) { return {_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)}; }
GE_INLINE float sum(VecF a) { return sum8(_mm256_add_ps(a.lo, a.hi)); }
GE_INLINE float max_lane(VecF a) { return max8(_mm256_max_ps(a.lo, a.hi)); }
#elif defined(GE_NEON)
template <>
struct Vec16<float> {
  float32x4_t v[4];

  static GE_MEMBER Vec16 set1(float x) {
    const float32x4_t q = vdupq_n_f32(x);
    return {{q, q, q, q}};
  }
  static GE_MEMBER Vec16 zero() { return set1(0.f); }
  static GE_MEMBER Vec16 load(const float* p) {
    return {{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}};
  }
  static GE_MEMBER float32x4_t widen(uint16x4_t u) { return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(u), 16)); }
  static GE_MEMBER Vec16 load(const bfloat16* p) {
    const uint16x8_t low = vld1q_u16(&p->bits), high = vld1q_u16(&p->bits + 8);
    return {{widen(vget_low_u16(low)), widen(vget_high_u16(low)), widen(vget_low_u16(high)), widen(vget_high_u16(high))}};
  }
  // Those of lanes 4 quarter to 4 quarter + 3 that are below n.
  static GE_MEMBER uint32x4_t first(int n, int quarter) {
    const int32_t lanes[4] = {0, 1, 2, 3};
    return vcltq_s32(vld1q_s32(lanes), vdupq_n_s32(n - 4 * quarter));
  }
  template <typename S>
  static GE_MEMBER Vec16 load_n(const S* p, int n, float fill = 0.f) {
    S buffer[kLanes] = {};
    memcpy(buffer, p, static_cast<size_t>(n) * sizeof(S));
    Vec16 r = load(buffer);
    for (int i = 0; i < 4; ++i) r.v[i] = vbslq_f32(first(n, i), r.v[i], vdupq_n_f32(fill));
    return r;
  }
  GE_MEMBER void store(float* p) const {
    for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, v[i]);
  }
  static GE_MEMBER uint32x4_t bf16_bits(float32x4_t f) {  // in the upper half of each 32-bit lane
    const uint32x4_t u = vreinterpretq_u32_f32(f);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
    const uint32x4_t r = vaddq_u32(u, vaddq_u32(odd, vdupq_n_u32(0x7FFF)));
    return vbslq_u32(vceqq_f32(f, f), r, vorrq_u32(u, vdupq_n_u32(0x400000)));
  }
  static GE_MEMBER float32x4_t round_quarter(float32x4_t f) {
    return vreinterpretq_f32_u32(vandq_u32(bf16_bits(f), vdupq_n_u32(0xFFFF0000u)));
  }
  GE_MEMBER Vec16 rounded_to_bf16() const {
    return {{round_quarter(v[0]), round_quarter(v[1]), round_quarter(v[2]), round_quarter(v[3])}};
  }
  GE_MEMBER void store(bfloat16* p) const {
    for (int i = 0; i < 4; ++i) vst1_u16(&p->bits + 4 * i, vshrn_n_u32(bf16_bits(v[i]), 16));
  }
  template <typename S>
  GE_MEMBER void store_n(S* p, int n) const {
    S buffer[kLanes];
    store(buffer);
    memcpy(p, buffer, static_cast<size_t>(n) * sizeof(S));
  }
};
using VecF = Vec16<float>;
#define GE_QUARTERWISE(expr)                        \
  VecF result;                                      \
  for (int i = 0; i < 4; ++i) result.v[i] = (expr); \
  return result
GE_INLINE VecF operator+(VecF a, VecF b) { GE_QUARTERWISE(vaddq_f32(a.v[i], b.v[i])); }
GE_INLINE VecF operator-(VecF a, VecF b) { GE_QUARTERWISE(vsubq_f32(a.v[i], b.v[i])); }
GE_INLINE VecF operator*(VecF a, VecF b) { GE_QUARTERWISE(vmulq_f32(a.v[i], b.v[i])); }
GE_INLINE VecF operator/(VecF a, VecF b) { GE_QUARTERWISE(vdivq_f32(a.v[i], b.v[i])); }
GE_INLINE VecF fma(VecF a, VecF b, VecF c) { GE_QUARTERWISE(vfmaq_f32(c.v[i], a.v[i], b.v[i])); }
// Not vmaxq_f32: it is NaN where either is, and it knows the signs of zeros.
GE_INLINE float32x4_t max4(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
GE_INLINE float32x4_t min4(float32x4_t a, float32x4_t b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
GE_INLINE VecF vmax(VecF a, VecF b) { GE_QUARTERWISE(max4(a.v[i], b.v[i])); }
GE_INLINE VecF vmin(VecF a, VecF b) { GE_QUARTERWISE(min4(a.v[i], b.v[i])); }
GE_INLINE VecF where_less(VecF a, VecF b, VecF x, VecF y) {
  GE_QUARTERWISE(vbslq_f32(vcltq_f32(a.v[i], b.v[i]), x.v[i], y.v[i]));
}
GE_INLINE VecF vsqrt(VecF a) { GE_QUARTERWISE(vsqrtq_f32(a.v[i])); }
GE_INLINE float sum(VecF a) {
  const float32x4_t y = vaddq_f32(vaddq_f32(a.v[0], a.v[2]), vaddq_f32(a.v[1], a.v[3]));
  const float32x2_t z = vadd_f32(vget_low_f32(y), vget_high_f32(y));
  return vget_lane_f32(z, 0) + vget_lane_f32(z, 1);
}
GE_INLINE float max_lane(VecF a) {
  const float32x4_t y = max4(max4(a.v[0], a.v[2]), max4(a.v[1], a.v[3]));
  const float32x4_t z = max4(y, vextq_f32(y, y, 2));
  return vgetq_lane_f32(max4(z, vextq_f32(z, z, 1)), 0);
}
#else
using VecF = Vec16<float>;
#endif
using VecD = Vec16<double>;

// ---------------------------------------------------------------- pairs of bfloat16

// Two neighbours along the inner dimension of a matmul: the operand of AVX512_BF16's dot product.
struct Bf16Pair {
  bfloat16 first, second;
};

#if defined(__AVX512BF16__)
template <>
struct Vec16<Bf16Pair> {
  __m512i v;

  static GE_MEMBER Vec16 set1(Bf16Pair x) {
    int bits;
    memcpy(&bits, &x, 4);
    return {_mm512_set1_epi32(bits)};
  }
  static GE_MEMBER Vec16 load(const Bf16Pair* p) { return {_mm512_loadu_si512(p)}; }
  // (first[i], second[i]) for i < n <= 16, lanes past n are 0; second null: all 0.
  static GE_MEMBER Vec16 join(const bfloat16* first, const bfloat16* second, int n) {
    const __mmask16 some = static_cast<__mmask16>((1u << n) - 1u);
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, first));
    if (!second) return {low};
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, second));
    return {_mm512_or_si512(low, _mm512_slli_epi32(high, 16))};
  }
  GE_MEMBER void store(Bf16Pair* p) const { _mm512_storeu_si512(p, v); }
};
// c + a.second b.second, rounded, then + a.first b.first, rounded. Subnormals count as 0.
GE_INLINE VecF fma(Vec16<Bf16Pair> a, Vec16<Bf16Pair> b, VecF c) {
  return {_mm512_dpbf16_ps(c.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
}
#endif

// While an object lives, subnormal operands and results of this thread count as 0, as in dot products of bfloat16.
class FlushSubnormals {
#if defined(__SSE2__)
 public:
  FlushSubnormals() : before_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(before_ | 0x8040); }
  ~FlushSubnormals() { __builtin_ia32_ldmxcsr(before_); }
  FlushSubnormals(const FlushSubnormals&) = delete;

 private:
  unsigned before_;
#elif defined(__aarch64__)
 public:
  FlushSubnormals() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" : : "r"(before_ | uint64_t{1} << 24) : "memory");
  }
  ~FlushSubnormals() { asm volatile("msr fpcr, %0" : : "r"(before_) : "memory"); }
  FlushSubnormals(const FlushSubnormals&) = delete;

 private:
  uint64_t before_;
#else
 public:
  FlushSubnormals() {}
#endif
};

// ---------------------------------------------------------------- exp

// exp(x) within 1 ulp (Cody and Waite reduction, degree-6 polynomial of Cephes expf).
// 0 below -87.33 (no subnormal results), +inf above 88.72, NaN stays NaN, exp(0) = 1 exactly.
struct ExpConstants {
  static constexpr float kLow = -87.33f, kHigh = 88.72f, kLog2e = 1.44269504088896341f, kLn2Hi = 0.693359375f,
                         kLn2Lo = -2.12194440e-4f;
  static constexpr float c[6] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
};

#if defined(__AVX512F__)
GE_INLINE VecF round_even(VecF x) { return {_mm512_roundscale_ps(x.v, 8)}; }
GE_INLINE VecF scale_by_exp2(VecF p, VecF n) { return {_mm512_scalef_ps(p.v, n.v)}; }
#elif defined(__AVX2__)
GE_INLINE VecF round_even(VecF x) { return {_mm256_round_ps(x.lo, 8), _mm256_round_ps(x.hi, 8)}; }
GE_INLINE __m256 exp2_int(__m256i n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
// In two factors: 2^128 is no float. Of a NaN n both are 1, and p is NaN.
GE_INLINE __m256 scale_half(__m256 p, __m256 n) {
  const __m256i i = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(i, 1);
  return _mm256_mul_ps(_mm256_mul_ps(p, exp2_int(half)), exp2_int(_mm256_sub_epi32(i, half)));
}
GE_INLINE VecF scale_by_exp2(VecF p, VecF n) { return {scale_half(p.lo, n.lo), scale_half(p.hi, n.hi)}; }
#elif defined(GE_NEON)
GE_INLINE VecF round_even(VecF x) { GE_QUARTERWISE(vrndnq_f32(x.v[i])); }
GE_INLINE float32x4_t exp2_int(int32x4_t n) {
  return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23));
}
// In two factors, as on AVX2.
GE_INLINE float32x4_t scale_quarter(float32x4_t p, float32x4_t n) {
  const int32x4_t i = vcvtnq_s32_f32(n), half = vshrq_n_s32(i, 1);
  return vmulq_f32(vmulq_f32(p, exp2_int(half)), exp2_int(vsubq_s32(i, half)));
}
GE_INLINE VecF scale_by_exp2(VecF p, VecF n) { GE_QUARTERWISE(scale_quarter(p.v[i], n.v[i])); }
#endif

// x[k] becomes exp(x[k]), without the checks of vexp, for -104 <= x <= 104 or NaN. The result is +inf above 88.72 and goes
// down to 0 in subnormals. N vectors go step by step together, because a CPU looks ahead by less than the chain of one.
#if defined(__AVX2__) || defined(GE_NEON)
template <int N>
GE_INLINE void exp_in_range(VecF (&x)[N]) {
  VecF n[N], p[N];
  for (int k = 0; k < N; ++k) n[k] = round_even(x[k] * VecF::set1(ExpConstants::kLog2e));
  for (int k = 0; k < N; ++k) x[k] = fma(n[k], VecF::set1(-ExpConstants::kLn2Hi), x[k]);
  for (int k = 0; k < N; ++k) x[k] = fma(n[k], VecF::set1(-ExpConstants::kLn2Lo), x[k]);
  for (int k = 0; k < N; ++k) p[k] = VecF::set1(ExpConstants::c[0]);
  for (int i = 1; i < 6; ++i) {
    for (int k = 0; k < N; ++k) p[k] = fma(p[k], x[k], VecF::set1(ExpConstants::c[i]));
  }
  for (int k = 0; k < N; ++k) p[k] = fma(p[k], x[k] * x[k], x[k]);
  for (int k = 0; k < N; ++k) x[k] = scale_by_exp2(p[k] + VecF::set1(1.f), n[k]);
}
#else
template <int N>
GE_INLINE void exp_in_range(VecF (&x)[N]) {
  for (VecF& v : x) {
    for (int i = 0; i < kLanes; ++i) v.v[i] = ::expf(v.v[i]);
  }
}
#endif
template <int N>
GE_INLINE void exp_in_range(VecD (&x)[N]) {
  for (VecD& v : x) {
    for (int i = 0; i < kLanes; ++i) v.v[i] = ::exp(v.v[i]);
  }
}

#if defined(__AVX512F__)
GE_INLINE VecF clip_exp(VecF e, VecF x) {
  const __mmask16 low = _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(ExpConstants::kLow), _CMP_LT_OQ);
  const __mmask16 high = _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(ExpConstants::kHigh), _CMP_GT_OQ);
  e.v = _mm512_mask_mov_ps(e.v, low, _mm512_setzero_ps());
  return {_mm512_mask_mov_ps(e.v, high, _mm512_set1_ps(__builtin_inff()))};
}
#elif defined(__AVX2__)
GE_INLINE __m256 clip_half(__m256 e, __m256 x) {
  e = _mm256_andnot_ps(_mm256_cmp_ps(x, _mm256_set1_ps(ExpConstants::kLow), _CMP_LT_OQ), e);
  return _mm256_blendv_ps(e, _mm256_set1_ps(__builtin_inff()),
                          _mm256_cmp_ps(x, _mm256_set1_ps(ExpConstants::kHigh), _CMP_GT_OQ));
}
GE_INLINE VecF clip_exp(VecF e, VecF x) { return {clip_half(e.lo, x.lo), clip_half(e.hi, x.hi)}; }
#elif defined(GE_NEON)
GE_INLINE VecF clip_exp(VecF e, VecF x) {
  e = where_less(x, VecF::set1(ExpConstants::kLow), VecF::zero(), e);
  return where_less(VecF::set1(ExpConstants::kHigh), x, VecF::set1(__builtin_inff()), e);
}
#else
GE_INLINE VecF clip_exp(VecF e, VecF x) {
  for (int i = 0; i < kLanes; ++i) e.v[i] = x.v[i] < ExpConstants::kLow ? 0.f : e.v[i];
  return e;
}
#endif
GE_INLINE VecF vexp(VecF x) {
  // x is the second operand of vmin and vmax, so NaN passes through
  VecF y[1] = {vmin(VecF::set1(ExpConstants::kHigh), vmax(VecF::set1(ExpConstants::kLow), x))};
  exp_in_range(y);
  return clip_exp(y[0], x);
}
GE_INLINE VecD vexp(VecD x) {
  VecD r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = ::exp(x.v[i]);
  return r;
}

// ---------------------------------------------------------------- by comparison

#if defined(__AVX512F__)
// s + e in the lanes where z >= t, s in the others.
GE_INLINE VecF add_where_ge(VecF s, VecF e, VecF z, VecF t) {
  return {_mm512_mask_add_ps(s.v, _mm512_cmp_ps_mask(z.v, t.v, _CMP_GE_OQ), s.v, e.v)};
}
// Stores the lanes with low <= z < high side by side and returns their number. Writes 16 floats.
GE_INLINE int append_between(VecF z, float low, float high, float* out) {
  const __mmask16 inside = _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(z.v, _mm512_set1_ps(low), _CMP_GE_OQ), z.v,
                                                   _mm512_set1_ps(high), _CMP_LT_OQ);
  _mm512_storeu_ps(out, _mm512_maskz_compress_ps(inside, z.v));
  return __builtin_popcount(inside);
}
#else
#if defined(__AVX2__)
GE_INLINE __m256 add_half(__m256 s, __m256 e, __m256 z, __m256 t) {
  return _mm256_add_ps(s, _mm256_and_ps(e, _mm256_cmp_ps(z, t, _CMP_GE_OQ)));
}
GE_INLINE VecF add_where_ge(VecF s, VecF e, VecF z, VecF t) {
  return {add_half(s.lo, e.lo, z.lo, t.lo), add_half(s.hi, e.hi, z.hi, t.hi)};
}
#elif defined(GE_NEON)
GE_INLINE VecF add_where_ge(VecF s, VecF e, VecF z, VecF t) {
  GE_QUARTERWISE(
      vaddq_f32(s.v[i], vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(e.v[i]), vcgeq_f32(z.v[i], t.v[i])))));
}
#else
GE_INLINE VecF add_where_ge(VecF s, VecF e, VecF z, VecF t) {
  for (int i = 0; i < kLanes; ++i) s.v[i] += z.v[i] >= t.v[i] ? e.v[i] : 0.f;
  return s;
}
#endif
GE_INLINE int append_between(VecF z, float low, float high, float* out) {
  float lanes[kLanes];
  z.store(lanes);
  int count = 0;
  for (float lane : lanes) {
    out[count] = lane;
    count += lane >= low && lane < high;
  }
  return count;
}
#endif

// ---------------------------------------------------------------- loops over a row

// Calls body(i, count) for each run of count <= 16 elements from i.
template <typename Body>
GE_INLINE void each_vector(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, kLanes);
  if (i < n) body(i, static_cast<int>(n - i));
}

// Calls body.template operator()<N>(i, count) for runs of N vectors from i. A run has four whole vectors, or one
// of count <= 16 elements.
template <typename Body>
GE_INLINE void each_four_vectors(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) body.template operator()<4>(i, kLanes);
  for (; i + kLanes <= n; i += kLanes) body.template operator()<1>(i, kLanes);
  if (i < n) body.template operator()<1>(i, static_cast<int>(n - i));
}

// The sum of a row in four chains, so an addition need not wait for the one before it. body(i, count, sum) returns `sum`
// plus the terms of `count` elements from i.
template <typename V, typename Body>
GE_INLINE V sum_vectors(int64_t n, Body body) {
  V s[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    for (int k = 0; k < 4; ++k) s[k] = body(i + k * kLanes, kLanes, s[k]);
  }
  for (; i + kLanes <= n; i += kLanes) s[0] = body(i, kLanes, s[0]);
  if (i < n) s[0] = body(i, static_cast<int>(n - i), s[0]);
  return (s[0] + s[1]) + (s[2] + s[3]);
}

template <typename V, typename S>
GE_INLINE V load(const S* p, int n) {
  return n == kLanes ? V::load(p) : V::load_n(p, n);
}
// Lanes >= n are `fill`.
template <typename V, typename S, typename T>
GE_INLINE V load(const S* p, int n, T fill) {
  return n == kLanes ? V::load(p) : V::load_n(p, n, fill);
}
template <typename V, typename S>
GE_INLINE void store(V v, S* p, int n) {
  n == kLanes ? v.store(p) : v.store_n(p, n);
}

// v after a store in S and a load.
template <typename S, typename V>
GE_INLINE V round_to(V v) {
  if constexpr (sizeof(S) == sizeof(bfloat16)) return v.rounded_to_bf16();
  else return v;
}

}  // namespace
}  // namespace grpo_engine::GE_ISA

// Calls `function<S>(args, begin, end)` for the storage type that args.dtype names.
#define GE_FOR_DTYPE(function)                                     \
  switch (args.dtype) {                                            \
    case DType::f32: return function<float>(args, begin, end);     \
    case DType::bf16: return function<bfloat16>(args, begin, end); \
    case DType::f64: return function<double>(args, begin, end);    \
  }
