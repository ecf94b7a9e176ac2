// attention_pack.h -- keys in blocks of 16 by position in the sequence, transposed.
#pragma once
#include "core/simd.h"
#include "core/transpose.h"

namespace grpo_engine::GE_ISA {
namespace {

GE_INLINE int64_t blocks_of(int64_t n) { return (n + kLanes - 1) / kLanes; }

// Rows of one sequence and kv head by position: those of its prompt, then its own.
template <typename S>
struct SequenceRows {
  const S* prompt;
  const S* own;
  int64_t prompt_len, len, stride;  // len counts both

  GE_MEMBER const S* at(int64_t position) const {
    return position < prompt_len ? prompt + position * stride : own + (position - prompt_len) * stride;
  }
};

#if defined(__AVX2__) || defined(GE_NEON)
// The same as below for whole 16 bytes of a row. Returns their number of columns.
template <typename S>
GE_INLINE int64_t transpose_whole_words(const S* const* row, int64_t E, float* dst) {
  constexpr int64_t kStep = 16 / static_cast<int64_t>(sizeof(S));
  int64_t e = 0;
  for (; e + kStep <= E; e += kStep) {
    transpose16<S>([&](int i) { return row[i] + e; }, [&](int64_t k, VecF v) { v.store(dst + (e + k) * kLanes); });
  }
  return e;
}
#endif
template <typename S>
GE_INLINE int64_t transpose_whole_words(const S* const*, int64_t, double*) {
  return 0;
}
#if !defined(__AVX2__) && !defined(GE_NEON)
template <typename S>
GE_INLINE int64_t transpose_whole_words(const S* const*, int64_t, float*) {
  return 0;
}
#endif

// dst[e * 16 + lane] = row[lane][e].
template <typename S>
GE_INLINE void transpose_rows(const S* const* row, int64_t E, Arith<S>* dst) {
  for (int64_t e = transpose_whole_words(row, E, dst); e < E; ++e) {
    for (int lane = 0; lane < kLanes; ++lane) dst[e * kLanes + lane] = to_arith(row[lane][e]);
  }
}

// Blocks [begin, end) of 16 rows, each transposed to [E][16]. Lanes past the last row repeat it. Readers mask
// them.
template <typename S>
static void pack_blocks(const SequenceRows<S>& rows, int64_t E, int64_t begin, int64_t end, Arith<S>* packed) {
  for (int64_t b = begin; b < end; ++b) {
    const S* row[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t position = b * kLanes + lane;
      row[lane] = rows.at(position < rows.len ? position : rows.len - 1);
    }
    transpose_rows(row, E, packed + b * E * kLanes);
  }
}

// block[b] = the first of 16 rows `stride` apart, for b in [begin, end). The block with the end of the prompt and the start
// of the sequence is assembled in `seam` [16 * stride].
template <typename S>
static void point_blocks(const SequenceRows<S>& rows, int64_t E, int64_t begin, int64_t end, const S** block, S* seam) {
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
