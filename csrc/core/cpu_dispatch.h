// cpu_dispatch.h -- which copy of a kernel runs on this CPU, decided once.
//
// Kernels (csrc/ops/*_cpu.cpp) are compiled once per instruction set into the namespaces generic,
// avx2 and avx512. GE_CPU_KERNEL(name, Args) declares the copies and a function `name_cpu` that
// calls the chosen one on the work items [begin, end).
#pragma once
#include <cstdint>

namespace grpo_engine {

enum class CpuIsa : int { generic = 0, avx2 = 1, avx512 = 2 };

// The best instruction set of this CPU, or the one that the environment variable GRPO_ENGINE_ISA
// names (generic, avx2, avx512). Throws std::runtime_error when that one is unknown or missing.
CpuIsa cpu_isa();
const char* cpu_isa_name(CpuIsa isa);
bool cpu_has(CpuIsa isa);

// Memory for a kernel, aligned to 64 bytes. Defined outside the kernels, which may not use std::.
// Throws std::bad_alloc.
void* scratch_alloc(int64_t bytes);
void scratch_free(void* memory);

template <typename Args>
using CpuKernel = void (*)(const Args&, int64_t begin, int64_t end);

}  // namespace grpo_engine

#if defined(__x86_64__)
#define GE_CPU_KERNEL(name, Args)                                                            \
  namespace generic { void name(const Args&, int64_t begin, int64_t end); }                  \
  namespace avx2 { void name(const Args&, int64_t begin, int64_t end); }                     \
  namespace avx512 { void name(const Args&, int64_t begin, int64_t end); }                   \
  inline void name##_cpu(const Args& args, int64_t begin, int64_t end) {                     \
    static constexpr CpuKernel<Args> kCopies[] = {generic::name, avx2::name, avx512::name};  \
    kCopies[static_cast<int>(cpu_isa())](args, begin, end);                                  \
  }
#else
#define GE_CPU_KERNEL(name, Args)                                           \
  namespace generic { void name(const Args&, int64_t begin, int64_t end); } \
  inline void name##_cpu(const Args& args, int64_t begin, int64_t end) {    \
    generic::name(args, begin, end);                                        \
  }
#endif
