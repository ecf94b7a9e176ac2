// transpose.h -- 16 rows of 16 bytes each, transposed in registers.
#pragma once
#include "core/simd.h"

#if defined(__AVX2__) || defined(GE_NEON)
namespace grpo_engine::GE_ISA {
namespace {

// Four 32-bit words of rows r, r + 4, r + 8, r + 12 in the four quarters of a vector; row(i) points at row i.
#if defined(__AVX512F__)
template <typename Row>
GE_INLINE VecF quarters(Row row, int r) {
  auto at = [&](int i) { return _mm_loadu_ps(reinterpret_cast<const float*>(row(r + i))); };
  __m512 v = _mm512_castps128_ps512(at(0));
  v = _mm512_insertf32x4(v, at(4), 1);
  v = _mm512_insertf32x4(v, at(8), 2);
  return {_mm512_insertf32x4(v, at(12), 3)};
}
GE_INLINE VecF low_words(VecF a, VecF b) { return {_mm512_unpacklo_ps(a.v, b.v)}; }
GE_INLINE VecF high_words(VecF a, VecF b) { return {_mm512_unpackhi_ps(a.v, b.v)}; }
GE_INLINE VecF low_pairs(VecF a, VecF b) {
  return {_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a.v), _mm512_castps_pd(b.v)))};
}
GE_INLINE VecF high_pairs(VecF a, VecF b) {
  return {_mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a.v), _mm512_castps_pd(b.v)))};
}
GE_INLINE VecF first_bf16(VecF a) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a.v), 16))}; }
GE_INLINE VecF second_bf16(VecF a) {
  return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))))};
}
#elif defined(GE_NEON)
template <typename Row>
GE_INLINE VecF quarters(Row row, int r) {
  GE_QUARTERWISE(vld1q_f32(reinterpret_cast<const float*>(row(r + 4 * i))));
}
GE_INLINE VecF low_words(VecF a, VecF b) { GE_QUARTERWISE(vzip1q_f32(a.v[i], b.v[i])); }
GE_INLINE VecF high_words(VecF a, VecF b) { GE_QUARTERWISE(vzip2q_f32(a.v[i], b.v[i])); }
GE_INLINE float32x4_t low_pairs4(float32x4_t a, float32x4_t b) {
  return vreinterpretq_f32_f64(vzip1q_f64(vreinterpretq_f64_f32(a), vreinterpretq_f64_f32(b)));
}
GE_INLINE float32x4_t high_pairs4(float32x4_t a, float32x4_t b) {
  return vreinterpretq_f32_f64(vzip2q_f64(vreinterpretq_f64_f32(a), vreinterpretq_f64_f32(b)));
}
GE_INLINE VecF low_pairs(VecF a, VecF b) { GE_QUARTERWISE(low_pairs4(a.v[i], b.v[i])); }
GE_INLINE VecF high_pairs(VecF a, VecF b) { GE_QUARTERWISE(high_pairs4(a.v[i], b.v[i])); }
GE_INLINE VecF first_bf16(VecF a) { GE_QUARTERWISE(vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(a.v[i]), 16))); }
GE_INLINE VecF second_bf16(VecF a) {
  GE_QUARTERWISE(vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(a.v[i]), vdupq_n_u32(0xFFFF0000u))));
}
#else
template <typename Row>
GE_INLINE VecF quarters(Row row, int r) {
  auto at = [&](int i) { return _mm_loadu_ps(reinterpret_cast<const float*>(row(r + i))); };
  return {_mm256_insertf128_ps(_mm256_castps128_ps256(at(0)), at(4), 1),
          _mm256_insertf128_ps(_mm256_castps128_ps256(at(8)), at(12), 1)};
}
GE_INLINE VecF low_words(VecF a, VecF b) { return {_mm256_unpacklo_ps(a.lo, b.lo), _mm256_unpacklo_ps(a.hi, b.hi)}; }
GE_INLINE VecF high_words(VecF a, VecF b) { return {_mm256_unpackhi_ps(a.lo, b.lo), _mm256_unpackhi_ps(a.hi, b.hi)}; }
GE_INLINE __m256 low_pairs8(__m256 a, __m256 b) {
  return _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(a), _mm256_castps_pd(b)));
}
GE_INLINE __m256 high_pairs8(__m256 a, __m256 b) {
  return _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(a), _mm256_castps_pd(b)));
}
GE_INLINE VecF low_pairs(VecF a, VecF b) { return {low_pairs8(a.lo, b.lo), low_pairs8(a.hi, b.hi)}; }
GE_INLINE VecF high_pairs(VecF a, VecF b) { return {high_pairs8(a.lo, b.lo), high_pairs8(a.hi, b.hi)}; }
GE_INLINE VecF first_bf16(VecF a) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a.lo), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a.hi), 16))};
}
GE_INLINE VecF second_bf16(VecF a) {
  const __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(0xFFFF0000u)));
  return {_mm256_and_ps(a.lo, mask), _mm256_and_ps(a.hi, mask)};
}
#endif

// Calls use(i, lanes) for each part of a vector of 32-bit words. A word holds one float, a pair of bfloat16, or two
// bfloat16, in order or (kDown) in reverse.
template <bool kDown, typename Use>
GE_INLINE void each_operand(VecF v, int64_t word, const float*, Use use) {
  use(word, v);
}
template <bool kDown, typename Use>
GE_INLINE void each_operand(VecF v, int64_t word, const bfloat16*, Use use) {
  if (kDown) use(2 * word + 1, second_bf16(v));
  use(2 * word, first_bf16(v));
  if (!kDown) use(2 * word + 1, second_bf16(v));
}
#if defined(__AVX512BF16__)
template <bool kDown, typename Use>
GE_INLINE void each_operand(VecF v, int64_t word, const Bf16Pair*, Use use) {
  use(word, Vec16<Bf16Pair>{_mm512_castps_si512(v.v)});
}
#endif

// The type as which the 16 bytes are read: values of storage type, or pairs where pairs are the operands.
template <typename S, typename O>
struct StoredAs {
  using type = S;
};
template <>
struct StoredAs<bfloat16, Bf16Pair> {
  using type = Bf16Pair;
};
template <typename S, typename O>
using Stored = typename StoredAs<S, O>::type;

// Calls use(k, operands k of the 16 rows) for the 16 bytes at each row(i), in ascending k or (kDown) descending.
template <typename T, bool kDown = false, typename Row, typename Use>
GE_INLINE void transpose16(Row row, Use use) {
  const T* type = nullptr;
  const VecF r0 = quarters(row, 0), r1 = quarters(row, 1), r2 = quarters(row, 2), r3 = quarters(row, 3);
  const VecF a = low_words(r0, r1), b = low_words(r2, r3);
  const VecF c = high_words(r0, r1), d = high_words(r2, r3);
  if constexpr (kDown) {
    each_operand<kDown>(high_pairs(c, d), 3, type, use);
    each_operand<kDown>(low_pairs(c, d), 2, type, use);
    each_operand<kDown>(high_pairs(a, b), 1, type, use);
    each_operand<kDown>(low_pairs(a, b), 0, type, use);
  } else {
    each_operand<kDown>(low_pairs(a, b), 0, type, use);
    each_operand<kDown>(high_pairs(a, b), 1, type, use);
    each_operand<kDown>(low_pairs(c, d), 2, type, use);
    each_operand<kDown>(high_pairs(c, d), 3, type, use);
  }
}

}  // namespace
}  // namespace grpo_engine::GE_ISA
#endif
