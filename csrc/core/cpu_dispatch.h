// cpu_dispatch.h -- which copy of a kernel runs on this CPU, decided once.
//
// Kernels (csrc/ops/*_cpu.cpp) are compiled once per instruction set into the namespaces generic and, on x86,
// avx2 and avx512; those with matrix products also into avx512_bf16, which multiplies bfloat16 twice as
// fast and is avx512 otherwise. On 64-bit ARM they are generic and neon. GE_CPU_KERNEL(name, Args) or GE_CPU_PRODUCT_KERNEL declares the copies and
// a function `name_cpu` that calls the chosen one on the work items [begin, end).
#pragma once
#include <cstdint>

namespace grpo_engine {

enum class CpuIsa : int { generic, avx2, avx512, avx512_bf16, neon };

// The best instruction set of this CPU, or the one that the environment variable GRPO_ENGINE_ISA
// names. Throws std::runtime_error when that one is unknown or missing.
CpuIsa cpu_isa();
const char* cpu_isa_name(CpuIsa isa);
bool cpu_has(CpuIsa isa);
inline constexpr CpuIsa kCpuIsas[] = {CpuIsa::generic, CpuIsa::avx2, CpuIsa::avx512, CpuIsa::avx512_bf16, CpuIsa::neon};

// Memory for a kernel, aligned to 64 bytes. Defined outside the kernels, which may not use std::.
// Throws std::bad_alloc.
void* scratch_alloc(int64_t bytes);
void scratch_free(void* memory);

template <typename Args>
using CpuKernel = void (*)(const Args&, int64_t begin, int64_t end);

}  // namespace grpo_engine

#if defined(__x86_64__)
#define GE_CPU_KERNEL(name, Args) GE_CPU_KERNEL_COPIES(name, Args, avx512)
#define GE_CPU_PRODUCT_KERNEL(name, Args)                                                     \
  namespace avx512_bf16 { void name(const Args&, int64_t begin, int64_t end); }              \
  GE_CPU_KERNEL_COPIES(name, Args, avx512_bf16)
#define GE_CPU_KERNEL_COPIES(name, Args, best)                                               \
  namespace generic { void name(const Args&, int64_t begin, int64_t end); }                  \
  namespace avx2 { void name(const Args&, int64_t begin, int64_t end); }                     \
  namespace avx512 { void name(const Args&, int64_t begin, int64_t end); }                   \
  inline void name##_cpu(const Args& args, int64_t begin, int64_t end) {                     \
    static constexpr CpuKernel<Args> kCopies[] = {generic::name, avx2::name, avx512::name,   \
                                                  best::name};                               \
    kCopies[static_cast<int>(cpu_isa())](args, begin, end);                                  \
  }
#elif defined(__aarch64__)
#define GE_CPU_KERNEL(name, Args)                                                            \
  namespace generic { void name(const Args&, int64_t begin, int64_t end); }                  \
  namespace neon { void name(const Args&, int64_t begin, int64_t end); }                     \
  inline void name##_cpu(const Args& args, int64_t begin, int64_t end) {                     \
    (cpu_isa() == CpuIsa::neon ? neon::name : generic::name)(args, begin, end);              \
  }
#define GE_CPU_PRODUCT_KERNEL(name, Args) GE_CPU_KERNEL(name, Args)
#else
#define GE_CPU_KERNEL(name, Args)                                           \
  namespace generic { void name(const Args&, int64_t begin, int64_t end); } \
  inline void name##_cpu(const Args& args, int64_t begin, int64_t end) {    \
    generic::name(args, begin, end);                                        \
  }
#define GE_CPU_PRODUCT_KERNEL(name, Args) GE_CPU_KERNEL(name, Args)
#endif
