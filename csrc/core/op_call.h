// op_call.h -- one of our ops calls another by its name, through the dispatcher.
#pragma once
#include <ATen/core/dispatch/Dispatcher.h>

namespace grpo_engine {

// The handle to `grpo_engine::<op>`. Keep it in a static variable.
template <typename Signature>
c10::TypedOperatorHandle<Signature> op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace grpo_engine
