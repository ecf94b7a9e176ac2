#include "ops/kv_write.h"

#include "core/checks.h"
#include "core/cuda_call.h"
#include "core/parallel.h"

namespace grpo_engine {
namespace {

constexpr const char* kOp = "kv_write";

void meta(const at::Tensor& key, const at::Tensor& value, at::Tensor& key_pages, at::Tensor& value_pages,
          const at::Tensor& slot) {
  require_shape(kOp, "key", key, {-1, -1, -1}, "[T, K, E]");
  require_float(kOp, "key", key);
  require_row_contiguous(kOp, "key", key);
  const int64_t T = key.size(0), K = key.size(1), E = key.size(2);
  require_shape(kOp, "value", value, key.sizes(), "[T, K, E]");
  require_dtype(kOp, "value", value, key.scalar_type());
  require_row_contiguous(kOp, "value", value);
  require_same_device(kOp, "value", value, key);
  require_tensor(kOp, "key_pages", key_pages, {-1, K, E, -1}, "[num_pages, K, E, page]", key.scalar_type(), key);
  const int64_t page = key_pages.size(3);
  TORCH_CHECK_VALUE(page > 0 && page % 16 == 0, kOp, ": key_pages needs a page size that is a multiple of 16, got ",
                    key_pages.sizes());
  require_tensor(kOp, "value_pages", value_pages, {key_pages.size(0), K, page, E}, "[num_pages, K, page, E]",
                 key.scalar_type(), key);
  require_tensor(kOp, "slot", slot, {T}, "[T]", at::kLong, key);
}

void write(const at::Tensor& key, const at::Tensor& value, at::Tensor& key_pages, at::Tensor& value_pages,
           const at::Tensor& slot) {
  meta(key, value, key_pages, value_pages, slot);
  KvWriteArgs args{};
  args.dtype = dtype_of(key);
  args.T = key.size(0);
  args.num_pages = key_pages.size(0);
  args.shape = {key.size(1), key.size(2), key_pages.size(3)};
  args.slot = slot.const_data_ptr<int64_t>();
  const int64_t num_slots = args.num_pages * args.shape.page;
  for (int64_t t = 0; t < args.T && !on_cuda(slot); ++t) {
    TORCH_CHECK_VALUE(args.slot[t] >= -1 && args.slot[t] < num_slots, kOp, ": slot must be -1 or in [0, ", num_slots,
                      "), got ", args.slot[t], " at row ", t);
  }
  if (key.numel() == 0) return;
  args.key_stride = key.stride(0);
  args.value_stride = value.stride(0);
  args.key = key.const_data_ptr();
  args.value = value.const_data_ptr();
  args.key_pages = key_pages.mutable_data_ptr();
  args.value_pages = value_pages.mutable_data_ptr();
  if (cuda_call(key, [&](auto stream) { kv_write_cuda(args, stream); })) return;
  parallel_items(kv_write_cpu, args, args.shape.K, 2.0 * args.T * args.shape.E);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(grpo_engine, m) {
  m.def(
      "kv_write(Tensor key, Tensor value, Tensor(a!) key_pages, Tensor(b!) value_pages,"
      " Tensor slot) -> ()");
}
GE_DEVICE_IMPL(m) { m.impl("kv_write", &write); }
TORCH_LIBRARY_IMPL(grpo_engine, Meta, m) { m.impl("kv_write", &meta); }

}  // namespace grpo_engine
