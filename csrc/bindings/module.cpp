// The Python module grpo_engine._C. Loading it registers the ops (TORCH_LIBRARY blocks of csrc/ops);
// pybind11 carries the objects that are not tensors.
#include <pybind11/pybind11.h>

#include "bindings/rollout.h"
#include "core/cpu_dispatch.h"
#include "core/thread_count.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native half of grpo_engine.";
  m.def(
      "cpu_isa", [] { return grpo_engine::cpu_isa_name(grpo_engine::cpu_isa()); },
      "The instruction set that the CPU kernels use: generic, avx2, avx512, avx512_bf16 or neon.");
  m.def(
      "cpu_isas",
      [] {
        using grpo_engine::CpuIsa;
        pybind11::list names;
        for (CpuIsa isa : grpo_engine::kCpuIsas) {
          if (grpo_engine::cpu_has(isa)) names.append(grpo_engine::cpu_isa_name(isa));
        }
        return names;
      },
      "Every instruction set of this CPU that the kernels are compiled for.");
  m.def("start_counting_threads", &grpo_engine::ThreadCount::start,
        "Begins to count the distinct threads that take part in kernels; a second start begins anew.");
  m.def("stop_counting_threads", &grpo_engine::ThreadCount::stop, "Ends the count and returns it; 0 where none was begun.");
  bind_rollout(m);
}
