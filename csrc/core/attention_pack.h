// attention_pack.h -- keys in blocks of 16 by position in the sequence, transposed.
#pragma once
#include "core/simd.h"

namespace grpo_engine::GE_ISA {
namespace {

GE_INLINE int64_t blocks_of(int64_t n) { return (n + kLanes - 1) / kLanes; }

// Rows of one sequence and kv head by position: those of the prompt that it continues, then its own.
template <typename S>
struct SequenceRows {
  const S* prompt;
  const S* own;
  int64_t prompt_len, len, stride;  // len counts both

  GE_MEMBER const S* at(int64_t position) const {
    return position < prompt_len ? prompt + position * stride : own + (position - prompt_len) * stride;
  }
};

#if defined(__AVX2__)
#if defined(__AVX512F__)
// Four words of rows r, r + 4, r + 8, r + 12 in the four quarters of a vector.
GE_INLINE VecF quarters(const float* const* row, int r, int64_t e) {
  __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(row[r] + e));
  v = _mm512_insertf32x4(v, _mm_loadu_ps(row[r + 4] + e), 1);
  v = _mm512_insertf32x4(v, _mm_loadu_ps(row[r + 8] + e), 2);
  return {_mm512_insertf32x4(v, _mm_loadu_ps(row[r + 12] + e), 3)};
}
GE_INLINE VecF low_words(VecF a, VecF b) { return {_mm512_unpacklo_ps(a.v, b.v)}; }
GE_INLINE VecF high_words(VecF a, VecF b) { return {_mm512_unpackhi_ps(a.v, b.v)}; }
GE_INLINE VecF low_pairs(VecF a, VecF b) { return {_mm512_shuffle_ps(a.v, b.v, 0x44)}; }
GE_INLINE VecF high_pairs(VecF a, VecF b) { return {_mm512_shuffle_ps(a.v, b.v, 0xEE)}; }
#else
GE_INLINE __m256 two_rows(const float* low, const float* high) {
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low)), _mm_loadu_ps(high), 1);
}
GE_INLINE VecF quarters(const float* const* row, int r, int64_t e) {
  return {two_rows(row[r] + e, row[r + 4] + e), two_rows(row[r + 8] + e, row[r + 12] + e)};
}
GE_INLINE VecF low_words(VecF a, VecF b) {
  return {_mm256_unpacklo_ps(a.lo, b.lo), _mm256_unpacklo_ps(a.hi, b.hi)};
}
GE_INLINE VecF high_words(VecF a, VecF b) {
  return {_mm256_unpackhi_ps(a.lo, b.lo), _mm256_unpackhi_ps(a.hi, b.hi)};
}
GE_INLINE VecF low_pairs(VecF a, VecF b) {
  return {_mm256_shuffle_ps(a.lo, b.lo, 0x44), _mm256_shuffle_ps(a.hi, b.hi, 0x44)};
}
GE_INLINE VecF high_pairs(VecF a, VecF b) {
  return {_mm256_shuffle_ps(a.lo, b.lo, 0xEE), _mm256_shuffle_ps(a.hi, b.hi, 0xEE)};
}
#endif

// As below for the first multiple of four columns, which it returns.
GE_INLINE int64_t transpose_fours(const float* const* row, int64_t E, float* dst) {
  int64_t e = 0;
  for (; e + 4 <= E; e += 4, dst += 4 * kLanes) {
    const VecF r0 = quarters(row, 0, e), r1 = quarters(row, 1, e);
    const VecF r2 = quarters(row, 2, e), r3 = quarters(row, 3, e);
    const VecF a = low_words(r0, r1), b = low_words(r2, r3);
    const VecF c = high_words(r0, r1), d = high_words(r2, r3);
    low_pairs(a, b).store(dst);
    high_pairs(a, b).store(dst + kLanes);
    low_pairs(c, d).store(dst + 2 * kLanes);
    high_pairs(c, d).store(dst + 3 * kLanes);
  }
  return e;
}
#endif
template <typename S>
GE_INLINE int64_t transpose_fours(const S* const*, int64_t, Arith<S>*) { return 0; }

// dst[e * 16 + lane] = row[lane][e].
template <typename S>
GE_INLINE void transpose_rows(const S* const* row, int64_t E, Arith<S>* dst) {
  for (int64_t e = transpose_fours(row, E, dst); e < E; ++e) {
    for (int lane = 0; lane < kLanes; ++lane) dst[e * kLanes + lane] = to_arith(row[lane][e]);
  }
}

// Blocks [begin, end) of 16 rows, each transposed to [E][16]. Lanes past the last row repeat it, which
// is as good as anything: whoever reads them masks them.
template <typename S>
static void pack_blocks(const SequenceRows<S>& rows, int64_t E, int64_t begin, int64_t end,
                        Arith<S>* packed) {
  for (int64_t b = begin; b < end; ++b) {
    const S* row[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t position = b * kLanes + lane;
      row[lane] = rows.at(position < rows.len ? position : rows.len - 1);
    }
    transpose_rows(row, E, packed + b * E * kLanes);
  }
}

// block[b] = the first of 16 rows `stride` apart, for b in [begin, end). The block in which the prompt
// ends and the sequence goes on is assembled in `seam` [16 * stride].
template <typename S>
static void point_blocks(const SequenceRows<S>& rows, int64_t E, int64_t begin, int64_t end,
                         const S** block, S* seam) {
  for (int64_t b = begin; b < end; ++b) block[b] = rows.at(b * kLanes);
  const int64_t b = rows.prompt_len / kLanes;
  if (rows.prompt_len % kLanes == 0 || b < begin || b >= end) return;
  for (int64_t lane = 0; lane < kLanes && b * kLanes + lane < rows.len; ++lane) {
    memcpy(seam + lane * rows.stride, rows.at(b * kLanes + lane), E * sizeof(S));
  }
  block[b] = seam;
}

}  // namespace
}  // namespace grpo_engine::GE_ISA
