// tasks.h -- the embedded tasks' generators for Python, in the module grpo_engine._C.
#pragma once
#include <pybind11/pybind11.h>

void bind_tasks(pybind11::module_& module);
