// gemm.h -- one matmul for every layer, forward and backward.
//
//   C[m,n] = sum_k A[m,k] B[k,n]  (+ bias[n])
//
// Strides make x W^T, dY W and dY^T X the same function. Each C[m,n] is ONE chain of fused multiply-adds over k. It starts
// from 0, or from C when accumulating. The bias is added once at the end, and the result is rounded once to the type of C.
// Tiles only decide which chains advance together. So the bits of C[m,n] depend on row m of A and column n of B alone. M, N,
// the tile sizes, the threads and the CPU's vector instructions change no bit.
//
// k ascends. For two bfloat16 operands it descends, and subnormals count as 0. The dot product of AVX512_BF16 does so: of a
// pair of values it adds the second product first, each sum rounded. A CPU that has it multiplies pairs, at twice the rate,
// and gives the bits of a CPU without it.
//
// Structure. For each slice of k and each panel of up to three vectors of columns, B is copied to [k][column]. The copy
// transposes when k is its adjacent index. Then tiles of TileShape::rows rows run down the panel with their sums in
// registers. A few rows against weights (the steps of a decoder) need no copy: they are as fast as memory gives the weights.
// Between slices the sums rest in C, or in a float copy of C when C is narrower. A and B are read in place when they are in
// arithmetic type already and are not used often enough to pay for the copy.
#pragma once
#include "core/scratch.h"
#include "core/simd.h"
#include "core/transpose.h"

namespace grpo_engine::GE_ISA {
namespace {

template <typename SA, typename SB, typename SC>
struct Gemm {
  int64_t M, N, K;
  const SA* a;  // A[m,k] = a[m * a_row + k * a_col]; one of the two strides is 1
  int64_t a_row, a_col;
  const SB* b;  // B[k,n] = b[k * b_row + n * b_col]; one of the two strides is 1
  int64_t b_row, b_col;
  const SB* bias;  // [N], or null
  SC* c;  // C[m,n] = c[m * c_row + n]
  int64_t c_row;
  bool accumulate;  // start the chains from C; only where C has arithmetic type
};

// Registers hold kTileRows x kTileVectors sums, kTileVectors of B and one of A.
#if defined(__AVX512F__)
template <typename A>
struct TileShape {
  static constexpr int rows = 2, vectors = 1;
};
template <>
struct TileShape<float> {
  static constexpr int rows = 8, vectors = 3;
};
#elif defined(__AVX2__)
template <typename A>
struct TileShape {
  static constexpr int rows = 2, vectors = 1;
};
template <>
struct TileShape<float> {
  static constexpr int rows = 6, vectors = 1;
};
#elif defined(GE_NEON)
template <typename A>
struct TileShape {
  static constexpr int rows = 2, vectors = 1;
};
template <>
struct TileShape<float> {
  static constexpr int rows = 6, vectors = 1;
};  // 24 of 32 registers
#else
template <typename A>
struct TileShape {
  static constexpr int rows = 2, vectors = 1;
};
#endif

// Operands along k in a slice: many, so that sums rarely travel.
constexpr int64_t kSlice = 256;
// A copy pays when a value is used this often: B by so many rows, A by so many columns (fewer where its rows lie across).
// (Rows that lie a power of two apart compete for the same cache sets.)
constexpr int64_t kCopyRows = 200, kCopyColumns = 96, kCopyColumnsAcross = 40;

template <typename T, typename U>
struct Same {
  static constexpr bool value = false;
};
template <typename T>
struct Same<T, T> {
  static constexpr bool value = true;
};

template <typename SA, typename SB>
constexpr bool kDescends = Same<SA, bfloat16>::value && Same<SB, bfloat16>::value;

// The operand of one multiply-add: a value in arithmetic type, or two bfloat16 of adjacent k.
template <typename SA, typename SB, typename A>
struct OperandOf {
  using type = A;
};
#if defined(__AVX512BF16__)
template <>
struct OperandOf<bfloat16, bfloat16, float> {
  using type = Bf16Pair;
};
#endif
template <typename O>
constexpr int64_t kValues = Same<O, Bf16Pair>::value ? 2 : 1;

// ---------------------------------------------------------------- copies of slices
//
// `depth` counts operands. Those of pairs read `values` of k and fill an odd last pair up with 0.

// Vectors of the next panel when `columns` are left. A lone vector runs at the speed of its latency, so four are split into
// two and two, not three and one.
template <typename A>
GE_INLINE int panel_vectors(int64_t columns) {
  constexpr int kMax = TileShape<A>::vectors;
  const int64_t left = (columns + kLanes - 1) / kLanes;
  if (kMax == 3 && left == 4) return 2;
  return static_cast<int>(left < kMax ? left : kMax);
}

// Operand k of a line of values src[k * stride].
template <typename A, typename S>
GE_INLINE void gather(const S* src, int64_t stride, int64_t k, int64_t, A* out) {
  *out = to_arith(src[k * stride]);
}
GE_INLINE void gather(const bfloat16* src, int64_t stride, int64_t k, int64_t values, Bf16Pair* out) {
  out->first = src[2 * k * stride];
  out->second = 2 * k + 1 < values ? src[(2 * k + 1) * stride] : bfloat16{0};
}

// dst[k * width + i] = operand k of src[i + k * stride] for i < count; lanes past count are 0.
template <typename A, typename S>
void copy_across(const S* src, int64_t stride, int64_t values, int64_t count, A* dst, int64_t width) {
  using V = Vec16<A>;
  for (int64_t k = 0; k < values; ++k, src += stride, dst += width) {
    each_vector(count, [&](int64_t i, int n) { load<V>(src + i, n).store(dst + i); });
  }
}
#if defined(__AVX512BF16__)
void copy_across(const bfloat16* src, int64_t stride, int64_t values, int64_t count, Bf16Pair* dst, int64_t width) {
  for (int64_t k = 0; k < values; k += 2, src += 2 * stride, dst += width) {
    const bool whole = k + 1 < values;
    each_vector(count, [&](int64_t i, int n) {
      Vec16<Bf16Pair>::join(src + i, whole ? src + stride + i : nullptr, n).store(dst + i);
    });
  }
}
#endif

// dst[r * width + k] = operand k of row r, src[r * stride + k].
template <typename A, typename S>
void copy_rows(const S* src, int64_t stride, int64_t rows, int64_t values, A* dst, int64_t width) {
  for (int64_t r = 0; r < rows; ++r, src += stride, dst += width) {
    each_vector(values, [&](int64_t k, int n) { store(load<Vec16<A>>(src + k, n), dst + k, n); });
  }
}
GE_INLINE void copy_rows(const bfloat16* src, int64_t stride, int64_t rows, int64_t values, Bf16Pair* dst, int64_t width) {
  for (int64_t r = 0; r < rows; ++r, src += stride, dst += width) {
    memcpy(dst, src, static_cast<size_t>(values / 2) * sizeof(Bf16Pair));
    if (values % 2) gather(src, 1, values / 2, values, dst + values / 2);
  }
}

// dst[i] = operand k of src[k * stride + i] for the R rows of a tile.
template <int R, typename O, typename S>
GE_INLINE void copy_line(const S* src, int64_t stride, int64_t k, int64_t values, O* dst) {
  for (int i = 0; i < R; ++i) gather(src + i, stride, k, values, dst + i);
}
template <int R>
GE_INLINE void copy_line(const float* src, int64_t stride, int64_t k, int64_t, float* dst) {
  memcpy(dst, src + k * stride, R * sizeof(float));
}
#if defined(__AVX2__)
template <int R>
GE_INLINE void copy_line(const bfloat16* src, int64_t stride, int64_t k, int64_t, float* dst) {
  static_assert(R == 2 || R == 6 || R == 8);  // those of TileShape
  const bfloat16* line = src + k * stride;
  __m128i bits;  // read without touching what lies behind
  if constexpr (R == 8) {
    bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(line));
  } else {
    int last;
    memcpy(&last, line + R - 2, sizeof last);
    bits = R == 2 ? _mm_cvtsi32_si128(last)
                  : _mm_insert_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(line)), last, 2);
  }
  const __m256i values = _mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
  memcpy(dst, &values, R * sizeof(float));
}
#endif

// Tiles of R rows, [R * kSlice] each: dst[k * R + i] = operand k of src[k * stride + i]. A line of src is read once,
// for kAcross tiles at a time: more would be too many addresses to write to.
template <int R, typename O, typename S>
void copy_tiles(const S* src, int64_t stride, int64_t depth, int64_t values, int64_t rows, O* dst) {
  constexpr int64_t kAcross = 4;
  int64_t m = 0;
  while (m + R <= rows) {
    const int64_t tiles = (rows - m) / R < kAcross ? (rows - m) / R : kAcross;
    for (int64_t k = 0; k < depth; ++k) {
      const S* from = src + m;
      O* to = dst + m * kSlice + k * R;
      for (int64_t t = 0; t < tiles; ++t, from += R, to += R * kSlice) copy_line<R>(from, stride, k, values, to);
    }
    m += tiles * R;
  }
  for (int64_t k = 0; k < depth; ++k) {
    for (int64_t i = 0; m + i < rows; ++i) gather(src + m + i, stride, k, values, dst + m * kSlice + k * R + i);
  }
}

#if defined(__AVX2__) || defined(GE_NEON)
// Fetches 16 rows of `values` in the order of memory, four lines a call. transpose_whole makes as many calls as fetch all
// rows. One line of each row in turn would open 16 pages of memory at a time, at half the rate.
template <typename S>
class RowFetcher {
 public:
  GE_MEMBER RowFetcher(const S* rows, int64_t stride, int64_t values)
      : row_(reinterpret_cast<const char*>(rows)),
        stride_(stride * static_cast<int64_t>(sizeof(S))),
        bytes_(values * static_cast<int64_t>(sizeof(S))) {}
  GE_MEMBER void fetch() {
    for (int i = 0; i < 4; ++i) {
      __builtin_prefetch(row_ + at_, 0, 2);
      at_ += 64;
      if (at_ < bytes_) continue;
      at_ = 0;
      row_ += stride_;
    }
  }

 private:
  const char* row_;
  int64_t stride_, bytes_, at_ = 0;
};

// dst[k * width + i] = operand k of src[i * stride + k] for i < 16. Returns how many operands are done. The caller does the
// rest one by one.
template <typename O, typename S>
int64_t transpose_whole(const S* src, int64_t stride, int64_t values, O* dst, int64_t width) {
  RowFetcher<S> next(src + width * stride, stride, values);
  constexpr int64_t kStep = 16 / static_cast<int64_t>(sizeof(S));
  int64_t k = 0;
  for (; k + kStep <= values; k += kStep) {
    next.fetch();
    transpose16<Stored<S, O>>([&](int i) { return src + i * stride + k; },
                              [&](int64_t i, Vec16<O> v) GE_LAMBDA { v.store(dst + (k / kValues<O> + i) * width); });
  }
  return k / kValues<O>;
}
#endif
template <typename S>
int64_t transpose_whole(const S*, int64_t, int64_t, double*, int64_t) {
  return 0;
}
#if !defined(__AVX2__) && !defined(GE_NEON)
template <typename S>
int64_t transpose_whole(const S*, int64_t, int64_t, float*, int64_t) {
  return 0;
}
#endif

// dst[k * width + i] = operand k of src[i * stride + k] for i < count. Lanes past count repeat the last row. Their sums are
// never stored.
template <typename O, typename S>
void copy_transposed(const S* src, int64_t stride, int64_t depth, int64_t values, int64_t count, O* dst, int64_t width) {
  constexpr int64_t kRow = kSlice * kValues<O>;
  S padded[kLanes * kRow];
  for (int64_t first = 0; first < width; first += kLanes, src += kLanes * stride, dst += kLanes) {
    const S* rows = src;
    int64_t row = stride;
    if (first + kLanes > count) {
      for (int64_t i = 0; i < kLanes; ++i) {
        const int64_t from = first + i < count ? i : count - 1 - first;
        memcpy(padded + i * kRow, src + from * stride, static_cast<size_t>(values) * sizeof(S));
      }
      rows = padded;
      row = kRow;
    }
    for (int64_t k = transpose_whole(rows, row, values, dst, width); k < depth; ++k) {
      for (int64_t i = 0; i < kLanes; ++i) gather(rows + i * row, 1, k, values, dst + k * width + i);
    }
  }
}

// ---------------------------------------------------------------- tiles

template <typename O, typename A>
struct Tile {
  const O* a;  // a[i * a_row + k * a_col], i < rows of the tile
  int64_t a_row, a_col;
  const O* b;  // b[k * b_row + j], j < columns of the tile
  int64_t b_row;
  int64_t depth;
  const A* init;  // sums so far, or null for 0
  int64_t init_row;
  const A* bias;  // [vectors * 16], or null
  int last;  // columns of the last vector that exist
};

template <typename O, typename A, typename S, int R, int NV, bool kWhole>
GE_INLINE void run_tile_of(const Tile<O, A>& tile, S* out, int64_t out_row) {
  using V = Vec16<A>;
  const Tile<O, A> t = tile;  // a copy: stores to `out` cannot change it
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
  // the lines of these sums, and those of the next tile: they lie a row apart, which no CPU predicts
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
    __builtin_prefetch(out + i * out_row, 1, 3);
    if (t.init) __builtin_prefetch(t.init + (R + i) * t.init_row, 0, 3);
  }
  const O* a = t.a;
  const O* b = t.b;
  for (int64_t k = 0; k < t.depth; ++k, a += t.a_col, b += t.b_row) {
    Vec16<O> bs[NV];
#pragma GCC unroll 3
    for (int j = 0; j < NV; ++j) bs[j] = Vec16<O>::load(b + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const Vec16<O> x = Vec16<O>::set1(a[i * t.a_row]);
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

template <typename O, typename A, typename S, int R, int NV>
void run_tile(const Tile<O, A>& t, S* out, int64_t out_row) {
  if (t.last == kLanes) return run_tile_of<O, A, S, R, NV, true>(t, out, out_row);
  run_tile_of<O, A, S, R, NV, false>(t, out, out_row);
}

template <typename O, typename A, typename S, int NV>
GE_INLINE void run_tile_of(int rows, const Tile<O, A>& t, S* out, int64_t out_row) {
  constexpr int kMax = TileShape<A>::rows;
  switch (rows) {
    case 1: return run_tile<O, A, S, 1, NV>(t, out, out_row);
    case 2: return run_tile<O, A, S, 2, NV>(t, out, out_row);
    case 3: return run_tile < O, A, S, kMax<3 ? kMax : 3, NV>(t, out, out_row);
    case 4: return run_tile < O, A, S, kMax<4 ? kMax : 4, NV>(t, out, out_row);
    case 5: return run_tile < O, A, S, kMax<5 ? kMax : 5, NV>(t, out, out_row);
    case 6: return run_tile < O, A, S, kMax<6 ? kMax : 6, NV>(t, out, out_row);
    case 7: return run_tile < O, A, S, kMax<7 ? kMax : 7, NV>(t, out, out_row);
    default: return run_tile<O, A, S, kMax, NV>(t, out, out_row);
  }
}

template <typename O, typename A, typename S>
GE_INLINE void run_tile_of(int vectors, int rows, const Tile<O, A>& t, S* out, int64_t out_row) {
  constexpr int kMax = TileShape<A>::vectors;
  if (vectors == 1) return run_tile_of<O, A, S, 1>(rows, t, out, out_row);
  if (vectors == 2) return run_tile_of < O, A, S, kMax<2 ? kMax : 2>(rows, t, out, out_row);
  run_tile_of<O, A, S, kMax>(rows, t, out, out_row);
}

// ---------------------------------------------------------------- few rows

// With few rows B is used too seldom to pay for a copy. So 16 columns at a time are transposed in registers on their way
// into the chains. kChainRows rows share one transposition.
#if defined(__AVX512F__)
constexpr int kChainRows = 16;
constexpr double kFewRowsPasses = 1.5;  // over B, at most: more passes cost more than the copy
constexpr int kPairedRows = 4;  // so few rows have chains of two vectors in the registers
#elif defined(__AVX2__) || defined(GE_NEON)
constexpr int kChainRows = 4;
constexpr double kFewRowsPasses = 4;
constexpr int kPairedRows = 2;
#endif

#if defined(__AVX2__) || defined(GE_NEON)
constexpr int64_t kMaxFewRows = static_cast<int64_t>(kFewRowsPasses * kChainRows);
constexpr int64_t kAhead = 2;  // vectors of columns between those that are summed and those that are fetched

// A few rows of A as operands, [M, x_row], and the columns of B as they are stored.
template <typename O, typename SB, typename SC>
struct FewRows {
  int64_t M, N, K;
  const O* x;
  int64_t x_row;
  const SB* b;  // B[k,n] = b[k + n * b_col]
  int64_t b_col;
  const SB* bias;
  SC* c;
  int64_t c_row;
};

// R rows by G * 16 columns from column n on: G * R chains advance together.
template <int R, int G, bool kDown, typename O, typename SB, typename SC>
void few_rows_panel(const FewRows<O, SB, SC>& g, int64_t m, int64_t n) {
  constexpr int64_t kStep = 16 / static_cast<int64_t>(sizeof(SB)), kOperands = kStep / kValues<O>;
  const int64_t stride = g.b_col, x_row = g.x_row, depth = (g.K + kValues<O> - 1) / kValues<O>, whole = g.K / kStep;
  const O* x = g.x + m * x_row;
  const SB* b = g.b + n * stride;
  VecF sums[G][R];
  for (auto& column : sums) {
    for (VecF& sum : column) sum = VecF::zero();
  }
  const auto add = [&](int j, int64_t k, Vec16<O> v) GE_LAMBDA {
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) sums[j][i] = fma(Vec16<O>::set1(x[i * x_row + k]), v, sums[j][i]);
  };
  const auto one = [&](int64_t k) {
    for (int j = 0; j < G; ++j) {
      O lanes[kLanes];
      for (int i = 0; i < kLanes; ++i) gather(b + (j * kLanes + i) * stride, 1, k, g.K, lanes + i);
      add(j, k, Vec16<O>::load(lanes));
    }
  };
  if constexpr (kDown) {
    for (int64_t k = depth; k-- > whole * kOperands;) one(k);
  }
  RowFetcher<SB> ahead(b + kAhead * kLanes * stride, stride, g.K);
  for (int64_t step = 0; step < whole; ++step) {
    const int64_t at = kDown ? whole - 1 - step : step, k = at * kStep;
#pragma GCC unroll 2
    for (int j = 0; j < G; ++j) {
      if (m == 0) ahead.fetch();
      transpose16<Stored<SB, O>, kDown>([&](int i) { return b + (j * kLanes + i) * stride + k; },
                                        [&](int64_t i, Vec16<O> v) GE_LAMBDA { add(j, at * kOperands + i, v); });
    }
  }
  if constexpr (!kDown) {
    for (int64_t k = whole * kOperands; k < depth; ++k) one(k);
  }
  for (int j = 0; j < G; ++j, n += kLanes) {
    for (int i = 0; i < R; ++i) {
      const VecF sum = g.bias ? sums[j][i] + VecF::load(g.bias + n) : sums[j][i];
      sum.store(g.c + (m + i) * g.c_row + n);
    }
  }
}

// Blocks of R rows. The last one starts early enough to be whole, and does some rows again.
template <int R, int G, bool kDown, typename O, typename SB, typename SC>
GE_INLINE int64_t few_rows_panels(const FewRows<O, SB, SC>& g, int64_t n) {
  for (; n + G * kLanes <= g.N; n += G * kLanes) {
    for (int64_t m = 0; m < g.M; m += R) few_rows_panel<R, G, kDown>(g, m + R <= g.M ? m : g.M - R, n);
  }
  return n;
}

template <int R, bool kDown, typename O, typename SB, typename SC>
void few_rows(const FewRows<O, SB, SC>& g) {
  int64_t n = 0;
  if constexpr (R <= kPairedRows) n = few_rows_panels<R, 2, kDown>(g, n);
  few_rows_panels<R, 1, kDown>(g, n);
}

// All whole vectors of columns.
template <typename SA, typename SB, typename SC>
void run_few_rows(const Gemm<SA, SB, SC>& g) {
  using O = typename OperandOf<SA, SB, float>::type;
  constexpr bool kDown = kDescends<SA, SB>;
  FewRows<O, SB, SC> f{g.M, g.N, g.K, nullptr, 0, g.b, g.b_col, g.bias, g.c, g.c_row};
  if constexpr (Same<SA, O>::value) {
    f.x = g.a;
    f.x_row = g.a_row;
  } else {
    f.x_row = g.K + kLanes;  // rows a power of two apart would compete for the same cache sets
    O* x = thread_scratch<O>(ScratchUse::gemm_a, g.M * f.x_row);
    copy_rows(g.a, g.a_row, g.M, g.K, x, f.x_row);
    f.x = x;
  }
  // the smallest block that needs the fewest passes over B and is no taller than A
  constexpr int kSizes[] = {1, 2, 3, 4, 6, 8, 12, 16};
  int rows = 1;
  for (int64_t passes = (g.M + kChainRows - 1) / kChainRows, i = 0; i < 8; ++i) {
    rows = kSizes[i];
    if (rows * passes >= g.M) {
      if (rows <= g.M) break;
      ++passes;
      i = -1;
    }
  }
  switch (rows) {
    case 1: return few_rows<1, kDown>(f);
    case 2: return few_rows<2, kDown>(f);
    case 3: return few_rows < kChainRows<3 ? 1 : 3, kDown>(f);
    case 4: return few_rows < kChainRows<4 ? 1 : 4, kDown>(f);
    case 6: return few_rows < kChainRows<6 ? 1 : 6, kDown>(f);
    case 8: return few_rows < kChainRows<8 ? 1 : 8, kDown>(f);
    case 12: return few_rows < kChainRows<12 ? 1 : 12, kDown>(f);
    default: return few_rows < kChainRows<16 ? 1 : 16, kDown>(f);
  }
}
#endif

// ---------------------------------------------------------------- the matmul

template <typename SA, typename SB, typename SC>
__attribute__((noinline)) void run_chains(Gemm<SA, SB, SC> g) {
  using A = Arith<SC>;
  using O = typename OperandOf<SA, SB, A>::type;
  constexpr bool kDown = kDescends<SA, SB>;
  constexpr int kRows = TileShape<A>::rows;
  constexpr int64_t kColumns = TileShape<A>::vectors * kLanes;

#if defined(__AVX2__) || defined(GE_NEON)
  if constexpr (Same<A, float>::value) {
    if (g.M <= kMaxFewRows && g.a_col == 1 && g.b_row == 1 && g.N >= kLanes && !g.accumulate) {
      run_few_rows(g);
      const int64_t whole = g.N / kLanes * kLanes;  // the tail goes the common way
      g.N -= whole;
      g.b += whole * g.b_col;
      g.bias += g.bias ? whole : 0;
      g.c += whole;
      if (g.N == 0) return;
    }
  }
#endif

  const int64_t operands = (g.K + kValues<O> - 1) / kValues<O>;
  const bool a_by_rows = g.a_col == 1;
  const bool copy_a = !Same<SA, O>::value || g.N > (a_by_rows ? kCopyColumns : kCopyColumnsAcross);
  O* a_copy = copy_a ? thread_scratch<O>(ScratchUse::gemm_a, (g.M + kRows) * kSlice) : nullptr;
  const bool b_by_rows = g.b_col == 1;
  const bool copy_b = !Same<SB, O>::value || !b_by_rows || g.N % kLanes != 0 || g.M > kCopyRows;
  O* b_copy = copy_b ? thread_scratch<O>(ScratchUse::gemm_b, kColumns * kSlice) : nullptr;
  A bias[kColumns];

  // where the sums rest between slices
  A* carry = nullptr;
  int64_t carry_row = g.c_row;
  if constexpr (Same<SC, A>::value) {
    carry = g.c;
  } else if (operands > kSlice) {
    carry = thread_scratch<A>(ScratchUse::gemm_c, g.M * g.N);
    carry_row = g.N;
  }

  const int64_t slices = operands > kSlice ? (operands + kSlice - 1) / kSlice : 1;  // one for K = 0: the result is the bias
  for (int64_t s = 0; s < slices; ++s) {
    const int64_t start = (kDown ? slices - 1 - s : s) * kSlice, k = start * kValues<O>;
    const int64_t depth = operands - start < kSlice ? operands - start : kSlice;
    const int64_t values = g.K - k < depth * kValues<O> ? g.K - k : depth * kValues<O>;
    const bool first = s == 0 && !g.accumulate, last = s == slices - 1;
    if (copy_a && a_by_rows) copy_rows(g.a + k, g.a_row, g.M, values, a_copy, kSlice);
    if (copy_a && !a_by_rows) copy_tiles<kRows>(g.a + k * g.a_col, g.a_col, depth, values, g.M, a_copy);
    int vectors = 0;
    for (int64_t n = 0; n < g.N; n += vectors * kLanes) {
      vectors = panel_vectors<A>(g.N - n);
      const int64_t width = vectors * kLanes;
      const int64_t columns = g.N - n < width ? g.N - n : width;
      Tile<O, A> tile{};
      const SB* b = g.b + k * g.b_row + n * g.b_col;
      if (copy_b) {
        if (b_by_rows) {
          copy_across(b, g.b_row, values, columns, b_copy, width);
        } else {
          copy_transposed(b, g.b_col, depth, values, columns, b_copy, width);
        }
        tile.b = b_copy;
        tile.b_row = width;
      } else if constexpr (Same<SB, O>::value) {
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
      if (copy_a) {
        tile.a_row = a_by_rows ? kSlice : 1;
        tile.a_col = a_by_rows ? 1 : kRows;
      } else {
        tile.a_row = g.a_row;
        tile.a_col = g.a_col;
      }
      if constexpr (kDown) {  // from the last operand to the first
        tile.b += (depth - 1) * tile.b_row;
        tile.b_row = -tile.b_row;
        tile.a_col = -tile.a_col;
      }
      // while these are multiplied, the next panel is fetched: a line or a few of each of its rows, far apart
      const SB* ahead = b + width;
      int64_t left = copy_b && b_by_rows && n + width < g.N ? values : 0;
      const int64_t tiles = (g.M + kRows - 1) / kRows, share = (left + tiles - 1) / tiles;
      for (int64_t m = 0; m < g.M; m += kRows) {
        const int rows = static_cast<int>(g.M - m < kRows ? g.M - m : kRows);
        for (int64_t i = 0; i < share && left > 0; ++i, --left, ahead += g.b_row) {
          for (int64_t column = 0; column < width; column += 64 / static_cast<int64_t>(sizeof(SB))) {
            __builtin_prefetch(ahead + column, 0, 2);
          }
        }
        if (copy_a) {
          tile.a = a_copy + m * kSlice;
        } else if constexpr (Same<SA, O>::value) {
          tile.a = g.a + m * g.a_row + k * g.a_col;
        }
        if constexpr (kDown) tile.a -= (depth - 1) * tile.a_col;
        tile.init = first ? nullptr : carry + m * carry_row + n;
        if (last) {
          run_tile_of<O, A, SC>(vectors, rows, tile, g.c + m * g.c_row + n, g.c_row);
        } else {
          run_tile_of<O, A, A>(vectors, rows, tile, carry + m * carry_row + n, carry_row);
        }
      }
    }
  }
}

#if defined(GE_NEON)
// ARM flushes a sum that is below the smallest normal number before rounding, x86 one that is below it after rounding. They
// differ in sums that round up to that number, which are 0 on ARM. ARM counts what it flushes. Where it has flushed a sum,
// the chains run again, one by one, as on x86. Numbers that small are rare.

// a * b + c. Products of two bfloat16 are exact in float64, and so is the sum where it is near the limits.
GE_INLINE float fma_of_x86(float a, float b, float c) {
  const double sum = static_cast<double>(a) * static_cast<double>(b) + static_cast<double>(c);
  const double size = sum < 0.0 ? -sum : sum;
  if (size >= 0x1.ffffffp-127 && size <= 0x1p-126) return sum < 0.0 ? -0x1p-126f : 0x1p-126f;
  return __builtin_fmaf(a, b, c);
}

// `before` [M, N] is C where the chains start from it, or null.
template <typename SC>
__attribute__((noinline)) void run_chains_of_x86(const Gemm<bfloat16, bfloat16, SC>& g, const float* before) {
  for (int64_t m = 0; m < g.M; ++m) {
    for (int64_t n = 0; n < g.N; ++n) {
      float sum = before ? before[m * g.N + n] : 0.f;
      for (int64_t k = g.K; k-- > 0;) {
        sum = fma_of_x86(to_arith(g.a[m * g.a_row + k * g.a_col]), to_arith(g.b[k * g.b_row + n * g.b_col]), sum);
      }
      if (g.bias) sum += to_arith(g.bias[n]);
      from_arith(sum, g.c + m * g.c_row + n);
    }
  }
}

GE_INLINE uint64_t read_flags() {
  uint64_t flags;
  asm volatile("mrs %0, fpsr" : "=r"(flags) : : "memory");
  return flags;
}
GE_INLINE void write_flags(uint64_t flags) { asm volatile("msr fpsr, %0" : : "r"(flags) : "memory"); }

template <typename SC>
void run_chains_flushing(const Gemm<bfloat16, bfloat16, SC>& g) {
  constexpr uint64_t kUnderflow = 1 << 3;
  const float* before = nullptr;
  if constexpr (Same<SC, float>::value) {
    if (g.accumulate) {
      float* copy = thread_scratch<float>(ScratchUse::gemm_before, g.M * g.N);
      for (int64_t m = 0; m < g.M; ++m) memcpy(copy + m * g.N, g.c + m * g.c_row, g.N * sizeof(float));
      before = copy;
    }
  }
  const uint64_t flags = read_flags();
  write_flags(flags & ~kUnderflow);
  run_chains(g);
  const bool flushed = read_flags() & kUnderflow;
  write_flags(read_flags() | flags);
  if (flushed) run_chains_of_x86(g, before);
}
#endif

template <typename SA, typename SB, typename SC>
void run_gemm(const Gemm<SA, SB, SC>& g) {
  if (g.M <= 0 || g.N <= 0) return;
  if constexpr (kDescends<SA, SB>) {
    const FlushSubnormals flush;
#if defined(GE_NEON)
    run_chains_flushing(g);
#else
    run_chains(g);
#endif
  } else {
    run_chains(g);
  }
}

}  // namespace
}  // namespace grpo_engine::GE_ISA
