#include "ops/paged_attention.h"

#include "core/attention.h"

namespace grpo_engine::GE_ISA {
namespace {

template <typename S>
void attend_pages(const PagedAttentionArgs& a, int64_t begin, int64_t end) {
  using A = Arith<S>;
  const KvPageShape shape = a.shape;
  const int64_t E = shape.E, group = a.H / a.plan.K, max_blocks = blocks_of(a.plan.max_len);
  Arena arena(2 * Arena::bytes<const S*>(max_blocks) + Attend<S, S>::bytes(E, a.plan.max_len));
  const S** key = arena.take<const S*>(max_blocks);
  const S** value = arena.take<const S*>(max_blocks);
  const Attend<S, S> attend(arena, E, a.plan.max_len);
  for (int64_t i = begin; i < end; ++i) {
    const AttentionItem item = find_item(a.plan, i);
    const int64_t n = item.sequence, first = a.plan.cu[n] + item.first_token;
    const int64_t num_queries = a.plan.cu[n + 1] - a.plan.cu[n];
    const int64_t first_visible = a.kv_len[n] - num_queries + item.first_token + 1;
    const int64_t blocks = blocks_of(first_visible + item.num_tokens - 1);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t page = b * kLanes / shape.page, offset = b * kLanes % shape.page;
      const int64_t slot = a.page_table[n * a.max_pages + page] * shape.page + offset;
      key[b] = static_cast<const S*>(a.key_pages) + key_offset(shape, slot, item.kv_head);
      value[b] = static_cast<const S*>(a.value_pages) + value_offset(shape, slot, item.kv_head);
    }
    QueryRows<S> rows{};
    rows.query = static_cast<const S*>(a.query) + first * a.query_stride + item.kv_head * group * E;
    rows.out = static_cast<S*>(a.out) + (first * a.H + item.kv_head * group) * E;
    rows.query_stride = a.query_stride;
    rows.out_stride = a.H * E;
    rows.num_tokens = item.num_tokens;
    rows.group = group;
    rows.E = E;
    rows.first_visible = first_visible;
    attend(rows, KeyBlocks<S, S>{key, value, shape.page, E}, static_cast<A>(a.scale));
  }
}

}  // namespace

void paged_attention(const PagedAttentionArgs& args, int64_t begin, int64_t end) {
  GE_FOR_DTYPE(attend_pages)
}

}  // namespace grpo_engine::GE_ISA
