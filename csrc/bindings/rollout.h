// rollout.h -- Scheduler and StepPlan for Python, in the module grpo_engine._C.
#pragma once
#include <pybind11/pybind11.h>

void bind_rollout(pybind11::module_& module);
