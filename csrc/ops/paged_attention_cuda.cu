#include "ops/paged_attention.h"

#include "core/attention.cuh"

namespace grpo_engine {
namespace {

template <typename S>
struct PagedKeys {
  KvPageShape shape;
  int64_t kv_head, num_pages, before;
  const int32_t* pages;  // of the sequence
  const S *key_pages, *value_pages;

  __device__ KeyPlace<S> at(int position) const {
    const int size = static_cast<int>(shape.page), page = pages[position / size], slot = position % size;
    if (page < 0 || page >= num_pages) return {nullptr, nullptr, 0, false};
    const int64_t offset = kv_page_offset(shape, page, kv_head);
    return {key_pages + offset + slot, value_pages + offset + slot * shape.E, shape.page, true};
  }
};

struct PagedSource {
  PagedAttentionArgs a;

  template <typename S>
  __device__ PagedKeys<S> open(int64_t sequence, int64_t kv_head, int64_t tokens) const {
    const int64_t keys = a.kv_len[sequence];
    const bool possible = keys >= tokens && keys <= a.max_pages * a.shape.page;
    return {a.shape, kv_head, a.num_pages, possible ? keys - tokens : -tokens - 1, a.page_table + sequence * a.max_pages,
            static_cast<const S*>(a.key_pages), static_cast<const S*>(a.value_pages)};
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
  rows.stretches = ceil_div(a.max_pages * a.shape.page, kStretch);
  return rows;
}

// Tiles that leave a GPU waiting get a warp for each stretch of keys (not for float64). Either way gives the same bits.
constexpr int64_t kFewTiles = 2048;
constexpr int64_t kMostParts = 16384;  // bounds the scratch: 68 MB at E = 128

}  // namespace

int64_t paged_attention_scratch(const PagedAttentionArgs& args) {
  const AttentionRows rows = rows_of(args);
  const int64_t tiles = rows.K * rows.tiles(), parts = tiles * rows.stretches;
  const bool split = tiles < kFewTiles && rows.stretches > 1 && parts <= kMostParts && args.dtype != DType::f64;
  return split ? parts * (rows.E + 2) * kTileRows : 0;
}

void paged_attention_cuda(const PagedAttentionArgs& args, CudaStream stream) {
  const AttentionRows rows = rows_of(args);
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
