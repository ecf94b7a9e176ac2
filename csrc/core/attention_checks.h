// attention_checks.h -- the checks of the arguments of paged_attention and ragged_attention.
#pragma once
#include "core/checks.h"

namespace grpo_engine {

// Throws unless cu = [0, ..., T] never falls.
inline void require_offsets(const char* op, const char* name, const at::Tensor& cu, int64_t T) {
  const int32_t* c = cu.const_data_ptr<int32_t>();
  const int64_t N = cu.size(0) - 1;
  TORCH_CHECK_VALUE(c[0] == 0 && c[N] == T, op, ": ", name, " must start at 0 and end at T = ", T, ", got ", c[0], " and ",
                    c[N]);
  for (int64_t n = 0; n < N; ++n) {
    TORCH_CHECK_VALUE(c[n] <= c[n + 1], op, ": ", name, " must not fall, got ", c[n], " then ", c[n + 1], " at sequence ",
                      n);
  }
}

// Shapes of query [T, H, E] against K kv heads of width E.
inline void require_query(const char* op, const at::Tensor& query) {
  require_shape(op, "query", query, {-1, -1, -1}, "[T, H, E]");
  require_float(op, "query", query);
  require_row_contiguous(op, "query", query);
  TORCH_CHECK_VALUE(query.size(1) > 0 && query.size(2) > 0, op, ": query needs H >= 1 heads and E >= 1, got ",
                    query.sizes());
}

inline void require_groups(const char* op, const char* name, int64_t K, int64_t H) {
  TORCH_CHECK_VALUE(K > 0 && H % K == 0, op, ": ", name, " must have a number of kv heads that divides H = ", H, ", got ",
                    K);
}

inline void require_cu(const char* op, const char* name, const at::Tensor& cu, const char* layout, const at::Tensor& like) {
  require_tensor(op, name, cu, {-1}, layout, at::kInt, like);
  TORCH_CHECK_VALUE(cu.size(0) >= 1, op, ": ", name, " needs ", layout, " with at least one entry, got ", cu.sizes());
}

}  // namespace grpo_engine
