#include "ops/paged_attention.h"

#include "core/attention_mma.cuh"

namespace grpo_engine {
namespace {

template <typename S>
struct PagedKeys {
  KvPageShape shape;
  int64_t kv_head, num_pages, before;
  const int32_t* pages;  // of the sequence
  const S *key_pages, *value_pages;

  static constexpr bool kAcross = true;
  const S* anything = key_pages;
  struct Octet {
    bool known;
    const S *keys, *values;
    int64_t page, E;

    __device__ const S* key(int e) const { return keys + e * page; }
    __device__ const S* value_row(int i) const { return values + i * E; }
  };
  __device__ Octet octet(int position) const {  // a page holds whole octets
    const KeyAddress<S> address = at(position);
    return {address.known, address.key, address.value, shape.page, shape.E};
  }

  __device__ KeyAddress<S> at(int position) const {
    const int size = static_cast<int>(shape.page), page = pages[position / size], slot = position % size;
    if (page < 0 || page >= num_pages) return {nullptr, nullptr, 0, false};
    const int64_t offset = kv_page_offset(shape, page, kv_head);
    return {key_pages + offset + slot, value_pages + offset + slot * shape.E, shape.page, true};
  }
};

struct PagedSource {
  PagedAttentionArgs a;
  bool query_aligned = false, key_aligned = false, value_aligned = false;

  template <typename S>
  __device__ PagedKeys<S> open(int64_t sequence, int64_t kv_head, int64_t tokens) const {
    const int64_t keys = a.kv_len[sequence];
    const bool possible = keys >= tokens && keys <= a.max_pages * a.shape.page;
    return {a.shape,
            kv_head,
            a.num_pages,
            possible ? keys - tokens : -tokens - 1,
            a.page_table + sequence * a.max_pages,
            static_cast<const S*>(a.key_pages),
            static_cast<const S*>(a.value_pages)};
  }

  __device__ bool same_pages(int64_t n, int begin, int end) const {
    const int32_t* cu = a.plan.cu;
    if (n < 0 || n + 1 >= a.plan.N || cu[n + 1] - cu[n] != 1 || cu[n + 2] - cu[n + 1] != 1) return false;
    const int64_t page = a.shape.page, most = a.max_pages * page;
    for (int i = 0; i < 2; ++i) {
      if (a.kv_len[n + i] < end || a.kv_len[n + i] > most) return false;
    }
    const int32_t *one = a.page_table + n * a.max_pages, *other = one + a.max_pages;
    bool same = true;
    for (int64_t i = begin / page; i < (end + page - 1) / page; ++i) same = same && one[i] == other[i];
    return same;
  }
};

AttentionRows rows_of(const PagedAttentionArgs& a) {
  AttentionRows rows{};
  rows.N = a.plan.N;
  rows.T = a.T;
  rows.H = a.H;
  rows.K = a.shape.K;
  rows.E = a.shape.E;
  rows.query_stride = a.query_stride;
  rows.scale = a.scale;
  rows.cu = a.plan.cu;
  rows.query = a.query;
  rows.out = a.out;
  rows.partial = a.partial;
  rows.stretches = ceil_div(a.max_pages * a.shape.page, attends_by_mma(a.dtype, rows.E) ? kKeyChunk : kStretch);
  return rows;
}

// Tiles that leave a GPU waiting get a warp for each stretch of keys (not for float64). Either way gives the same bits.
constexpr int64_t kFewTiles = 2048;
constexpr int64_t kMostParts = 16384;  // bounds the scratch: 68 MB at E = 128

// On the tensor cores every sequence with one new token is cut into chunks, unless its scratch passes 256 MB.
constexpr int64_t kMostPartial = int64_t{1} << 26;

int64_t mma_scratch(const AttentionRows& rows) {
  const int64_t elements = rows.N * rows.H * rows.stretches * (rows.E + 2);
  return rows.stretches > 1 && elements <= kMostPartial ? elements : 0;
}

void attend_by_mma(const PagedAttentionArgs& a, AttentionRows rows, CudaStream stream) {
  const bool columns = a.shape.E % kPack<bfloat16> == 0;
  const PagedSource source{a, columns && rows_aligned<bfloat16>(a.query, a.query_stride),
                           rows_aligned<bfloat16>(a.key_pages, a.shape.page),
                           columns && rows_aligned<bfloat16>(a.value_pages, a.shape.E)};
  if (mma_scratch(rows) > 0) {
    launch_attention_chunks("paged_attention_chunks", source, rows, stream);
  } else {
    rows.partial = nullptr;
  }
  launch_attention_mma("paged_attention", source, rows, stream);
}

}  // namespace

int64_t paged_attention_scratch(const PagedAttentionArgs& args) {
  const AttentionRows rows = rows_of(args);
  if (attends_by_mma(args.dtype, rows.E)) return mma_scratch(rows);
  const int64_t tiles = rows.K * rows.tiles(), parts = tiles * rows.stretches;
  const bool split = tiles < kFewTiles && rows.stretches > 1 && parts <= kMostParts && args.dtype != DType::f64;
  return split ? parts * (rows.E + 2) * kTileRows : 0;
}

void paged_attention_cuda(const PagedAttentionArgs& args, CudaStream stream) {
  const AttentionRows rows = rows_of(args);
  if (attends_by_mma(args.dtype, rows.E)) return attend_by_mma(args, rows, stream);
  for_dtype(args.dtype, [&]<typename S>() {
    if constexpr (sizeof(S) < sizeof(double)) {
      if (paged_attention_scratch(args) > 0) {
        launch_attention<Attend::part, S>("paged_attention", PagedSource{args}, rows, stream);
        launch_attention<Attend::join, S>("paged_attention_join", PagedSource{args}, rows, stream);
        return;
      }
    }
    launch_attention<Attend::whole, S>("paged_attention", PagedSource{args}, rows, stream);
  });
}

}  // namespace grpo_engine
