// cpu_dispatch.h -- which copy of a kernel runs on this CPU, decided once.
//
// Kernels (csrc/ops/*_cpu.cpp) are compiled once per instruction set. On x86 the namespaces of the copies are generic, avx2
// and avx512. Kernels with matmuls also have a copy avx512_bf16, which multiplies bfloat16 twice as fast; the other kernels
// run their avx512 copy there. On 64-bit ARM the namespaces are generic and neon.
//
// GE_CPU_KERNEL(name, Args) or GE_CPU_MATMUL_KERNEL declares the copies and a function `name_cpu`, which calls the chosen
// copy on the work items [begin, end).
#pragma once
#include <cstdint>

namespace grpo_engine {

enum class CpuIsa : int { generic, avx2, avx512, avx512_bf16, neon };

// The best instruction set of this CPU, or the one that the environment variable GRPO_ENGINE_ISA names. Throws
// std::runtime_error when the named one is unknown, or this CPU lacks it.
CpuIsa cpu_isa();
const char* cpu_isa_name(CpuIsa isa);
bool cpu_has(CpuIsa isa);
inline constexpr CpuIsa kCpuIsas[] = {CpuIsa::generic, CpuIsa::avx2, CpuIsa::avx512, CpuIsa::avx512_bf16, CpuIsa::neon};

template <typename Args>
using CpuKernel = void (*)(const Args&, int64_t begin, int64_t end);

}  // namespace grpo_engine

#if defined(__x86_64__)
#define GE_CPU_KERNEL(name, Args) GE_CPU_KERNEL_COPIES(name, Args, avx512)
#define GE_CPU_MATMUL_KERNEL(name, Args)                                        \
  namespace avx512_bf16 { void name(const Args&, int64_t begin, int64_t end); } \
  GE_CPU_KERNEL_COPIES(name, Args, avx512_bf16)
#define GE_CPU_KERNEL_COPIES(name, Args, best)                                                          \
  namespace generic { void name(const Args&, int64_t begin, int64_t end); }                             \
  namespace avx2 { void name(const Args&, int64_t begin, int64_t end); }                                \
  namespace avx512 { void name(const Args&, int64_t begin, int64_t end); }                              \
  inline void name##_cpu(const Args& args, int64_t begin, int64_t end) {                                \
    static constexpr CpuKernel<Args> kCopies[] = {generic::name, avx2::name, avx512::name, best::name}; \
    kCopies[static_cast<int>(cpu_isa())](args, begin, end);                                             \
  }
#elif defined(__aarch64__)
#define GE_CPU_KERNEL(name, Args)                                               \
  namespace generic { void name(const Args&, int64_t begin, int64_t end); }     \
  namespace neon { void name(const Args&, int64_t begin, int64_t end); }        \
  inline void name##_cpu(const Args& args, int64_t begin, int64_t end) {        \
    (cpu_isa() == CpuIsa::neon ? neon::name : generic::name)(args, begin, end); \
  }
#define GE_CPU_MATMUL_KERNEL(name, Args) GE_CPU_KERNEL(name, Args)
#else
#define GE_CPU_KERNEL(name, Args)                                           \
  namespace generic { void name(const Args&, int64_t begin, int64_t end); } \
  inline void name##_cpu(const Args& args, int64_t begin, int64_t end) { generic::name(args, begin, end); }
#define GE_CPU_MATMUL_KERNEL(name, Args) GE_CPU_KERNEL(name, Args)
#endif
