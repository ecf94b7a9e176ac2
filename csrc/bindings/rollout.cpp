#include "bindings/rollout.h"
void bind_rollout(pybind11::module_&) {}
