#include "ops/paged_attention.h"

#include "core/attention.h"

namespace grpo_engine::GE_ISA {
namespace {

// A work item, and the addresses of the blocks of 16 keys and values that it sees.
template <typename S>
struct PagedItem {
  const S **key, **value;  // [blocks]
  AttentionItem item;
  int64_t first_visible;   // keys that its first token sees
};

constexpr int64_t kFetchedLines = 12;  // of a block of keys or values; the processor fetches the rest

// Finds the item and asks for the beginning of every block: pages lie anywhere, and the processor
// fetches ahead by itself only within one.
template <typename S>
void find_paged(const PagedAttentionArgs& a, int64_t index, PagedItem<S>& p) {
  const KvPageShape shape = a.shape;
  p.item = find_item(a.plan, index);
  const int64_t n = p.item.sequence, num_queries = a.plan.cu[n + 1] - a.plan.cu[n];
  p.first_visible = a.kv_len[n] - num_queries + p.item.first_token + 1;
  const int64_t blocks = blocks_of(p.first_visible + p.item.num_tokens - 1);
  const int32_t* page = a.page_table + n * a.max_pages;
  for (int64_t b = 0; b < blocks; ++page) {
    const int64_t offset = kv_page_offset(shape, *page, p.item.kv_head);
    const S* key = static_cast<const S*>(a.key_pages) + offset;
    const S* value = static_cast<const S*>(a.value_pages) + offset;
    for (int64_t slot = 0; slot < shape.page && b < blocks; slot += kLanes, ++b) {
      p.key[b] = key + slot;
      p.value[b] = value + slot * shape.E;
      for (int64_t i = 0; i < kFetchedLines; ++i) {
        __builtin_prefetch(reinterpret_cast<const char*>(p.key[b]) + i * 64, 0, 2);
        __builtin_prefetch(reinterpret_cast<const char*>(p.value[b]) + i * 64, 0, 2);
      }
    }
  }
}

template <typename S>
void attend_pages(const PagedAttentionArgs& a, int64_t begin, int64_t end) {
  using A = Arith<S>;
  const int64_t E = a.shape.E, group = a.H / a.plan.K, max_blocks = blocks_of(a.plan.max_len);
  Arena arena(4 * Arena::bytes<const S*>(max_blocks) + Attend<S, S>::bytes(E, a.plan.max_len));
  PagedItem<S> items[2];  // this one and the next
  for (PagedItem<S>& p : items) {
    p.key = arena.take<const S*>(max_blocks);
    p.value = arena.take<const S*>(max_blocks);
  }
  const Attend<S, S> attend(arena, E, a.plan.max_len);
  find_paged(a, begin, items[begin % 2]);
  for (int64_t i = begin; i < end; ++i) {
    if (i + 1 < end) find_paged(a, i + 1, items[(i + 1) % 2]);
    const PagedItem<S>& p = items[i % 2];
    const int64_t first = a.plan.cu[p.item.sequence] + p.item.first_token;
    const int64_t first_head = p.item.kv_head * group;
    QueryRows<S> rows{};
    rows.query = static_cast<const S*>(a.query) + first * a.query_stride + first_head * E;
    rows.out = static_cast<S*>(a.out) + (first * a.H + first_head) * E;
    rows.query_stride = a.query_stride;
    rows.out_stride = a.H * E;
    rows.num_tokens = p.item.num_tokens;
    rows.group = group;
    rows.E = E;
    rows.first_visible = p.first_visible;
    attend(rows, KeyBlocks<S, S>{p.key, p.value, a.shape.page, E}, static_cast<A>(a.scale));
  }
}

}  // namespace

void paged_attention(const PagedAttentionArgs& args, int64_t begin, int64_t end) { GE_FOR_DTYPE(attend_pages) }

}  // namespace grpo_engine::GE_ISA
