#include "ops/kv_write.h"

#include "core/simd.h"

namespace grpo_engine::GE_ISA {
namespace {

template <typename S>
void write(const KvWriteArgs& a, int64_t begin, int64_t end) {
  const int64_t E = a.shape.E, page = a.shape.page;
  for (int64_t k = begin; k < end; ++k) {
    for (int64_t t = 0; t < a.T; ++t) {
      if (a.slot[t] < 0) continue;
      const S* key = static_cast<const S*>(a.key) + t * a.key_stride + k * E;
      const S* value = static_cast<const S*>(a.value) + t * a.value_stride + k * E;
      S* key_out = static_cast<S*>(a.key_pages) + key_offset(a.shape, a.slot[t], k);
      S* value_out = static_cast<S*>(a.value_pages) + value_offset(a.shape, a.slot[t], k);
      for (int64_t e = 0; e < E; ++e) key_out[e * page] = key[e];
      memcpy(value_out, value, E * sizeof(S));
    }
  }
}

}  // namespace

void kv_write(const KvWriteArgs& args, int64_t begin, int64_t end) { GE_FOR_DTYPE(write) }

}  // namespace grpo_engine::GE_ISA
