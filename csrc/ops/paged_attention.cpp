#include "ops/paged_attention.h"

#include <ATen/Functions.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "core/attention_checks.h"
#include "core/cuda_call.h"
#include "core/parallel.h"

namespace grpo_engine {
namespace {

constexpr const char* kOp = "paged_attention";

at::Tensor meta(const at::Tensor& query, const at::Tensor& key_pages, const at::Tensor& value_pages,
                const at::Tensor& page_table, const at::Tensor& cu_query, const at::Tensor& kv_len, double scale) {
  require_query(kOp, query);
  const int64_t H = query.size(1), E = query.size(2);
  require_tensor(kOp, "key_pages", key_pages, {-1, -1, E, -1}, "[num_pages, K, E, page]", query.scalar_type(), query);
  const int64_t K = key_pages.size(1), page = key_pages.size(3);
  require_groups(kOp, "key_pages", K, H);
  TORCH_CHECK_VALUE(page > 0 && page % 16 == 0, kOp, ": key_pages needs a page size that is a multiple of 16, got ",
                    key_pages.sizes());
  require_tensor(kOp, "value_pages", value_pages, {key_pages.size(0), K, page, E}, "[num_pages, K, page, E]",
                 query.scalar_type(), query);
  require_cu(kOp, "cu_query", cu_query, "[N + 1]", query);
  const int64_t N = cu_query.size(0) - 1;
  require_tensor(kOp, "page_table", page_table, {N, -1}, "[N, max_pages]", at::kInt, query);
  require_tensor(kOp, "kv_len", kv_len, {N}, "[N]", at::kInt, query);
  require_positive(kOp, "scale", scale);
  return at::empty(query.sizes(), query.options());
}

// Throws unless the pages of every sequence with queries are there.
void check_pages(const PagedAttentionArgs& a) {
  const int64_t page = a.shape.page;
  for (int64_t n = 0; n < a.plan.N; ++n) {
    const int64_t num_queries = a.plan.cu[n + 1] - a.plan.cu[n];
    TORCH_CHECK_VALUE(a.kv_len[n] >= num_queries, kOp, ": kv_len must be at least the ", num_queries,
                      " new tokens of its sequence, got ", a.kv_len[n], " at sequence ", n);
    if (num_queries == 0) continue;
    const int64_t needed = (a.kv_len[n] + page - 1) / page;
    TORCH_CHECK_VALUE(needed <= a.max_pages, kOp, ": page_table has ", a.max_pages, " pages a sequence, but kv_len ",
                      a.kv_len[n], " needs ", needed, " at sequence ", n);
    for (int64_t i = 0; i < needed; ++i) {
      const int32_t p = a.page_table[n * a.max_pages + i];
      TORCH_CHECK_VALUE(p >= 0 && p < a.num_pages, kOp, ": page_table must be in [0, ", a.num_pages, ") for the first ",
                        needed, " pages of sequence ", n, ", got ", p, " at page ", i);
    }
  }
}

at::Tensor forward(const at::Tensor& query, const at::Tensor& key_pages, const at::Tensor& value_pages,
                   const at::Tensor& page_table, const at::Tensor& cu_query, const at::Tensor& kv_len, double scale) {
  at::Tensor out = meta(query, key_pages, value_pages, page_table, cu_query, kv_len, scale);
  PagedAttentionArgs args{};
  args.dtype = dtype_of(query);
  args.shape = {key_pages.size(1), query.size(2), key_pages.size(3)};
  args.T = query.size(0);
  args.H = query.size(1);
  args.num_pages = key_pages.size(0);
  args.max_pages = page_table.size(1);
  args.query_stride = query.stride(0);
  args.scale = scale;
  args.page_table = page_table.const_data_ptr<int32_t>();
  args.kv_len = kv_len.const_data_ptr<int32_t>();
  args.plan.N = args.plan.M = kv_len.size(0);
  args.plan.K = args.shape.K;
  args.plan.cu = cu_query.const_data_ptr<int32_t>();
  args.query = query.const_data_ptr();
  args.key_pages = key_pages.const_data_ptr();
  args.value_pages = value_pages.const_data_ptr();
  args.out = out.mutable_data_ptr();
  if (!on_cuda(query)) {
    require_offsets(kOp, "cu_query", cu_query, args.T);
    check_pages(args);
  }
  if (out.numel() == 0) return out;
  const auto on_gpu = [&](auto stream) {
    const at::Tensor partial = at::empty({paged_attention_scratch(args)}, arithmetic(query));
    args.partial = partial.mutable_data_ptr();
    paged_attention_cuda(args, stream);
  };
  if (cuda_call(query, on_gpu)) return out;
  std::vector<int64_t> first_chunk(args.plan.N + 1);
  plan_chunks(args.plan, first_chunk.data());
  for (int64_t n = 0; n < args.plan.N; ++n) {
    const int64_t num_queries = args.plan.cu[n + 1] - args.plan.cu[n];
    if (num_queries == 0) continue;
    args.plan.max_len = std::max<int64_t>(args.plan.max_len, args.kv_len[n]);
    args.plan.pairs += static_cast<double>(num_queries) * args.kv_len[n];
  }
  const int64_t items = num_items(args.plan);
  parallel_items(paged_attention_cpu, args, items, args.plan.pairs * args.H * args.shape.E * 4 / items);
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(grpo_engine, m) {
  m.def(
      "paged_attention(Tensor query, Tensor key_pages, Tensor value_pages, Tensor page_table,"
      " Tensor cu_query, Tensor kv_len, float scale) -> Tensor");
}
GE_DEVICE_IMPL(m) { m.impl("paged_attention", &forward); }
TORCH_LIBRARY_IMPL(grpo_engine, Meta, m) { m.impl("paged_attention", &meta); }

}  // namespace grpo_engine
