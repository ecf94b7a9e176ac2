// op_call.h -- one op of ours calls another by its name, through the dispatcher.
#pragma once
#include <ATen/core/dispatch/Dispatcher.h>

namespace grpo_engine {

// The handle to `grpo_engine::<op>`; keep it in a static.
template <typename Signature>
c10::TypedOperatorHandle<Signature> op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace grpo_engine
