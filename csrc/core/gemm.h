// gemm.h -- one matrix product for every layer, forward and backward.
//
//   C[m,n] = sum_k A[m,k] B[k,n]  (+ bias[n])
//
// Strides make x W^T, dY W and dY^T X the same function. Each C[m,n] is ONE chain of fused
// multiply-adds in ascending k that starts from 0 (or from C, when accumulating); the bias is added
// once at the end and the result is rounded once to the type of C. Tiles only decide which chains
// advance together, so the bits of C[m,n] depend on row m of A and column n of B alone: not on M, N,
// the tile sizes, the threads, or whether the CPU has AVX2 or AVX-512.
//
// Structure: for each slice of k and each panel of up to three vectors of columns, B is copied to
// [k][column] (transposed on the way when k is its adjacent index), then tiles of TileShape::rows rows
// run down the panel with their sums in registers. Between slices the sums rest in C, or in a float
// copy of it when C is narrower. A and B are read in place when they are already in arithmetic type
// and are not used often enough to pay for the copy.
#pragma once
#include <stdlib.h>

#include "core/simd.h"

namespace grpo_engine::GE_ISA {
namespace {

template <typename SA, typename SB, typename SC>
struct Gemm {
  int64_t M, N, K;
  const SA* a;            // A[m,k] = a[m * a_row + k * a_col]; one of the two strides is 1
  int64_t a_row, a_col;
  const SB* b;            // B[k,n] = b[k * b_row + n * b_col]; one of the two strides is 1
  int64_t b_row, b_col;
  const SB* bias;         // [N], or null
  SC* c;                  // C[m,n] = c[m * c_row + n]
  int64_t c_row;
  bool accumulate;        // start the chains from C; only where C has arithmetic type
};

// Registers hold kTileRows x kTileVectors sums, kTileVectors of B and one of A.
#if defined(__AVX512F__)
template <typename A>
struct TileShape { static constexpr int rows = 2, vectors = 1; };
template <>
struct TileShape<float> { static constexpr int rows = 8, vectors = 3; };
#elif defined(__AVX2__)
template <typename A>
struct TileShape { static constexpr int rows = 2, vectors = 1; };
template <>
struct TileShape<float> { static constexpr int rows = 6, vectors = 1; };
#else
template <typename A>
struct TileShape { static constexpr int rows = 2, vectors = 1; };
#endif

// Values of k in a slice: many, so that sums rarely travel; few when few rows use a panel, so that
// copying the next panel overlaps the sums of this one.
constexpr int64_t kSlice = 256, kShortSlice = 64, kFewRows = 32;
// Copying pays when a value is used this often: B by so many rows, A (rows adjacent) by so many columns.
constexpr int64_t kCopyRows = 48, kCopyColumns = 96;

template <typename T, typename U>
struct Same { static constexpr bool value = false; };
template <typename T>
struct Same<T, T> { static constexpr bool value = true; };

// Memory that a thread keeps between calls, by purpose.
struct Scratch {
  void* data = nullptr;
  int64_t bytes = 0;
  ~Scratch() { ::free(data); }

  void* reserve(int64_t want) {
    if (want > bytes) {
      ::free(data);
      bytes = 0;
      if (::posix_memalign(&data, 64, static_cast<size_t>(want)) != 0) ::abort();
      bytes = want;
    }
    return data;
  }
};
enum ScratchUse { kScratchA, kScratchB, kScratchC, kScratchTile, kScratchUses };

template <typename T>
T* scratch(ScratchUse use, int64_t count) {
  static thread_local Scratch buffers[kScratchUses];
  return static_cast<T*>(buffers[use].reserve(count * static_cast<int64_t>(sizeof(T))));
}

// ---------------------------------------------------------------- copies of slices

// Vectors of the next panel when `columns` are left: a lone vector runs at the speed of its latency,
// so four are split in two halves and not three and one.
template <typename A>
GE_INLINE int panel_vectors(int64_t columns) {
  constexpr int kMax = TileShape<A>::vectors;
  const int64_t left = (columns + kLanes - 1) / kLanes;
  if (kMax == 3 && left == 4) return 2;
  return static_cast<int>(left < kMax ? left : kMax);
}

// dst[k * width + i] = src[k * stride + i] for i < count; lanes past count are 0.
template <typename A, typename S>
void copy_across(const S* src, int64_t stride, int64_t depth, int64_t count, A* dst, int64_t width) {
  using V = Vec16<A>;
  const int64_t whole = count / kLanes;
  const int tail = static_cast<int>(count % kLanes);
  for (int64_t k = 0; k < depth; ++k, src += stride, dst += width) {
    for (int64_t j = 0; j < whole; ++j) V::load(src + j * kLanes).store(dst + j * kLanes);
    if (tail) V::load_n(src + whole * kLanes, tail).store(dst + whole * kLanes);
  }
}

// dst[r * width + k] = src[r * stride + k] in arithmetic type.
template <typename A, typename S>
void copy_rows(const S* src, int64_t stride, int64_t rows, int64_t depth, A* dst, int64_t width) {
  for (int64_t r = 0; r < rows; ++r, src += stride, dst += width) {
    each_vector(depth, [&](int64_t k, int n) { store(load<Vec16<A>>(src + k, n), dst + k, n); });
  }
}

// Tiles of R rows, [R * kSlice] each: dst[k * R + i] = src[k * stride + i].
template <int R, typename A, typename S>
void copy_tiles(const S* src, int64_t stride, int64_t depth, int64_t rows, A* dst) {
  for (int64_t m = 0; m < rows; m += R, src += R, dst += R * kSlice) {
    if (m + R <= rows) {
      for (int64_t k = 0; k < depth; ++k) {
        for (int i = 0; i < R; ++i) dst[k * R + i] = to_arith(src[k * stride + i]);
      }
    } else {
      for (int64_t k = 0; k < depth; ++k) {
        for (int64_t i = 0; i < rows - m; ++i) dst[k * R + i] = to_arith(src[k * stride + i]);
      }
    }
  }
}

#if defined(__AVX2__)
// Four 32-bit words at p + k of rows r, r+4, r+8, r+12 in the four quarters of a vector.
#if defined(__AVX512F__)
GE_INLINE VecF quarters(const void* const* rows, int r, int64_t byte) {
  auto at = [&](int i) {
    return _mm_loadu_ps(reinterpret_cast<const float*>(static_cast<const char*>(rows[i]) + byte));
  };
  __m512 v = _mm512_castps128_ps512(at(r));
  v = _mm512_insertf32x4(v, at(r + 4), 1);
  v = _mm512_insertf32x4(v, at(r + 8), 2);
  return {_mm512_insertf32x4(v, at(r + 12), 3)};
}
GE_INLINE VecF low_words(VecF a, VecF b) { return {_mm512_unpacklo_ps(a.v, b.v)}; }
GE_INLINE VecF high_words(VecF a, VecF b) { return {_mm512_unpackhi_ps(a.v, b.v)}; }
GE_INLINE VecF low_pairs(VecF a, VecF b) {
  return {_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a.v), _mm512_castps_pd(b.v)))};
}
GE_INLINE VecF high_pairs(VecF a, VecF b) {
  return {_mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a.v), _mm512_castps_pd(b.v)))};
}
GE_INLINE VecF first_bf16(VecF a) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a.v), 16))};
}
GE_INLINE VecF second_bf16(VecF a) {
  return {_mm512_castsi512_ps(
      _mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))))};
}
#else
GE_INLINE VecF quarters(const void* const* rows, int r, int64_t byte) {
  auto at = [&](int i) {
    return _mm_loadu_ps(reinterpret_cast<const float*>(static_cast<const char*>(rows[i]) + byte));
  };
  return {_mm256_insertf128_ps(_mm256_castps128_ps256(at(r)), at(r + 4), 1),
          _mm256_insertf128_ps(_mm256_castps128_ps256(at(r + 8)), at(r + 12), 1)};
}
GE_INLINE VecF low_words(VecF a, VecF b) {
  return {_mm256_unpacklo_ps(a.lo, b.lo), _mm256_unpacklo_ps(a.hi, b.hi)};
}
GE_INLINE VecF high_words(VecF a, VecF b) {
  return {_mm256_unpackhi_ps(a.lo, b.lo), _mm256_unpackhi_ps(a.hi, b.hi)};
}
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

GE_INLINE void store_words(VecF v, int64_t word, int64_t width, float* dst, const float*) {
  v.store(dst + word * width);
}
GE_INLINE void store_words(VecF v, int64_t word, int64_t width, float* dst, const bfloat16*) {
  first_bf16(v).store(dst + 2 * word * width);
  second_bf16(v).store(dst + (2 * word + 1) * width);
}

// 16 rows of 16 words each, transposed: word w of every row goes to dst + w * width (twice as many
// columns of half a word for bfloat16).
template <typename S>
GE_INLINE void transpose16(const void* const* rows, int64_t byte, int64_t width, float* dst) {
  const S* type = nullptr;
#pragma GCC unroll 4
  for (int64_t q = 0; q < 16; q += 4) {
    const VecF r0 = quarters(rows, 0, byte + 4 * q), r1 = quarters(rows, 1, byte + 4 * q);
    const VecF r2 = quarters(rows, 2, byte + 4 * q), r3 = quarters(rows, 3, byte + 4 * q);
    const VecF a = low_words(r0, r1), b = low_words(r2, r3);
    const VecF c = high_words(r0, r1), d = high_words(r2, r3);
    store_words(low_pairs(a, b), q, width, dst, type);
    store_words(high_pairs(a, b), q + 1, width, dst, type);
    store_words(low_pairs(c, d), q + 2, width, dst, type);
    store_words(high_pairs(c, d), q + 3, width, dst, type);
  }
}

template <typename S>
int64_t transpose_whole(const S* const* rows, int64_t depth, int64_t width, float* dst) {
  constexpr int64_t step = 64 / static_cast<int64_t>(sizeof(S));
  const void* bytes[kLanes];
  for (int i = 0; i < kLanes; ++i) bytes[i] = rows[i];
  int64_t k = 0;
  for (; k + step <= depth; k += step) {
    transpose16<S>(bytes, k * static_cast<int64_t>(sizeof(S)), width, dst + k * width);
  }
  return k;
}
#endif
// How many values of k the fast transposition has done; the caller does the rest one by one.
template <typename A, typename S>
int64_t transpose_whole(const S* const*, int64_t, int64_t, A*) { return 0; }

// dst[k * width + i] = src[i * stride + k] for i < count. Lanes past count repeat the last row, which
// is as good as anything: their sums are never stored.
template <typename A, typename S>
void copy_transposed(const S* src, int64_t stride, int64_t depth, int64_t count, A* dst,
                     int64_t width) {
  for (int64_t first = 0; first < width; first += kLanes) {
    const S* rows[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) {
      rows[i] = src + (first + i < count ? first + i : count - 1) * stride;
    }
    for (int64_t k = transpose_whole(rows, depth, width, dst + first); k < depth; ++k) {
      for (int i = 0; i < kLanes; ++i) dst[k * width + first + i] = to_arith(rows[i][k]);
    }
  }
}

// ---------------------------------------------------------------- tiles

template <typename A>
struct Tile {
  const A* a;             // a[i * a_row + k * a_col], i < rows of the tile
  int64_t a_row, a_col;
  const A* b;             // b[k * b_row + j], j < columns of the tile
  int64_t b_row;
  int64_t depth;
  const A* init;          // sums so far, or null for 0
  int64_t init_row;
  const A* bias;          // [vectors * 16], or null
  int last;               // columns of the last vector that exist
};

template <typename A, typename S, int R, int NV, bool kWhole>
GE_INLINE void run_tile_of(const Tile<A>& tile, S* out, int64_t out_row) {
  using V = Vec16<A>;
  const Tile<A> t = tile;  // a copy: stores to `out` cannot change it
  const int last = kWhole ? kLanes : t.last;
  V sums[R][NV];
  if (t.init) {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 3
      for (int j = 0; j < NV; ++j) {
        sums[i][j] = load<V>(t.init + i * t.init_row + j * kLanes, j < NV - 1 ? kLanes : last);
      }
    }
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 3
      for (int j = 0; j < NV; ++j) sums[i][j] = V::zero();
    }
  }
  const A* a = t.a;
  const A* b = t.b;
  for (int64_t k = 0; k < t.depth; ++k, a += t.a_col, b += t.b_row) {
    V bs[NV];
#pragma GCC unroll 3
    for (int j = 0; j < NV; ++j) bs[j] = V::load(b + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const V x = V::set1(a[i * t.a_row]);
#pragma GCC unroll 3
      for (int j = 0; j < NV; ++j) sums[i][j] = fma(x, bs[j], sums[i][j]);
    }
  }
  if (t.bias) {
#pragma GCC unroll 3
    for (int j = 0; j < NV; ++j) {
      const V bias = V::load(t.bias + j * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) sums[i][j] = sums[i][j] + bias;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 3
    for (int j = 0; j < NV; ++j) {
      store(sums[i][j], out + i * out_row + j * kLanes, j < NV - 1 ? kLanes : last);
    }
  }
}

template <typename A, typename S, int R, int NV>
void run_tile(const Tile<A>& t, S* out, int64_t out_row) {
  if (t.last == kLanes) return run_tile_of<A, S, R, NV, true>(t, out, out_row);
  run_tile_of<A, S, R, NV, false>(t, out, out_row);
}

template <typename A, typename S, int NV>
GE_INLINE void run_tile_of(int rows, const Tile<A>& t, S* out, int64_t out_row) {
  constexpr int kMax = TileShape<A>::rows;
  switch (rows) {
    case 1: return run_tile<A, S, 1, NV>(t, out, out_row);
    case 2: return run_tile<A, S, 2, NV>(t, out, out_row);
    case 3: return run_tile<A, S, kMax < 3 ? kMax : 3, NV>(t, out, out_row);
    case 4: return run_tile<A, S, kMax < 4 ? kMax : 4, NV>(t, out, out_row);
    case 5: return run_tile<A, S, kMax < 5 ? kMax : 5, NV>(t, out, out_row);
    case 6: return run_tile<A, S, kMax < 6 ? kMax : 6, NV>(t, out, out_row);
    case 7: return run_tile<A, S, kMax < 7 ? kMax : 7, NV>(t, out, out_row);
    default: return run_tile<A, S, kMax, NV>(t, out, out_row);
  }
}

template <typename A, typename S>
GE_INLINE void run_tile_of(int vectors, int rows, const Tile<A>& t, S* out, int64_t out_row) {
  constexpr int kMax = TileShape<A>::vectors;
  if (vectors == 1) return run_tile_of<A, S, 1>(rows, t, out, out_row);
  if (vectors == 2) return run_tile_of<A, S, kMax < 2 ? kMax : 2>(rows, t, out, out_row);
  run_tile_of<A, S, kMax>(rows, t, out, out_row);
}

// ---------------------------------------------------------------- the product

template <typename SA, typename SB, typename SC>
void run_gemm(const Gemm<SA, SB, SC>& g) {
  using A = Arith<SC>;
  constexpr int kRows = TileShape<A>::rows;
  constexpr int64_t kColumns = TileShape<A>::vectors * kLanes;
  if (g.M <= 0 || g.N <= 0) return;

  const int64_t slice = g.M <= kFewRows ? kShortSlice : kSlice;
  const bool a_by_rows = g.a_col == 1;
  const bool copy_a = !Same<SA, A>::value || (!a_by_rows && g.N > kCopyColumns);
  A* a_copy = copy_a ? scratch<A>(kScratchA, (g.M + kRows) * kSlice) : nullptr;
  const bool b_by_rows = g.b_col == 1;
  const bool copy_b = !Same<SB, A>::value || !b_by_rows || g.N % kLanes != 0 || g.M > kCopyRows;
  A* b_copy = copy_b ? scratch<A>(kScratchB, kColumns * kSlice) : nullptr;
  A bias[kColumns];

  // where the sums rest between slices
  A* carry = nullptr;
  int64_t carry_row = g.c_row;
  if constexpr (Same<SC, A>::value) {
    carry = g.c;
  } else if (g.K > slice) {
    carry = scratch<A>(kScratchC, g.M * g.N);
    carry_row = g.N;
  }

  int64_t k = 0;
  do {  // once for K = 0: the result is then the bias
    const int64_t depth = g.K - k < slice ? g.K - k : slice;
    const bool first = k == 0 && !g.accumulate, last = k + depth == g.K;
    if (copy_a && a_by_rows) copy_rows(g.a + k, g.a_row, g.M, depth, a_copy, kSlice);
    if (copy_a && !a_by_rows) copy_tiles<kRows>(g.a + k * g.a_col, g.a_col, depth, g.M, a_copy);
    int vectors = 0;
    for (int64_t n = 0; n < g.N; n += vectors * kLanes) {
      vectors = panel_vectors<A>(g.N - n);
      const int64_t width = vectors * kLanes;
      const int64_t columns = g.N - n < width ? g.N - n : width;
      Tile<A> tile{};
      const SB* b = g.b + k * g.b_row + n * g.b_col;
      if (copy_b) {
        if (b_by_rows) {
          copy_across(b, g.b_row, depth, columns, b_copy, width);
        } else {
          copy_transposed(b, g.b_col, depth, columns, b_copy, width);
        }
        tile.b = b_copy;
        tile.b_row = width;
      } else if constexpr (Same<SB, A>::value) {
        tile.b = b;
        tile.b_row = g.b_row;
      }
      tile.depth = depth;
      tile.init_row = carry_row;
      tile.last = static_cast<int>(columns - (vectors - 1) * kLanes);
      if (g.bias && last) {
        for (int64_t i = 0; i < width; ++i) bias[i] = i < columns ? to_arith(g.bias[n + i]) : A(0);
        tile.bias = bias;
      }
      for (int64_t m = 0; m < g.M; m += kRows) {
        const int rows = static_cast<int>(g.M - m < kRows ? g.M - m : kRows);
        if (copy_a) {
          tile.a = a_copy + m * kSlice;
          tile.a_row = a_by_rows ? kSlice : 1;
          tile.a_col = a_by_rows ? 1 : kRows;
        } else if constexpr (Same<SA, A>::value) {
          tile.a = g.a + m * g.a_row + k * g.a_col;
          tile.a_row = g.a_row;
          tile.a_col = g.a_col;
        }
        tile.init = first ? nullptr : carry + m * carry_row + n;
        if (last) {
          run_tile_of<A, SC>(vectors, rows, tile, g.c + m * g.c_row + n, g.c_row);
        } else {
          run_tile_of<A, A>(vectors, rows, tile, carry + m * carry_row + n, carry_row);
        }
      }
    }
    k += depth;
  } while (k < g.K);
}

}  // namespace
}  // namespace grpo_engine::GE_ISA
