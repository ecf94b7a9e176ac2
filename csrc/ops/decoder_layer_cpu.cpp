#include "ops/decoder_layer.h"

#include "core/simd.h"

namespace grpo_engine::GE_ISA {
namespace {

template <typename S>
void add(const AddRowsArgs& args, int64_t begin, int64_t end) {
  using V = Vec16<Arith<S>>;
  const S* a = static_cast<const S*>(args.a) + begin * args.D;
  S* b = static_cast<S*>(args.b) + begin * args.D;
  each_vector((end - begin) * args.D, [&](int64_t i, int n) { store(load<V>(a + i, n) + load<V>(b + i, n), b + i, n); });
}

}  // namespace

void add_rows(const AddRowsArgs& args, int64_t begin, int64_t end) { GE_FOR_DTYPE(add) }

}  // namespace grpo_engine::GE_ISA
