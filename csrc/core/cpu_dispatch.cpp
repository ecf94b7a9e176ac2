#include "core/cpu_dispatch.h"

#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>

namespace grpo_engine {

const char* cpu_isa_name(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::avx512: return "avx512";
    case CpuIsa::avx2: return "avx2";
    default: return "generic";
  }
}

bool cpu_has(CpuIsa isa) {
#if defined(__x86_64__)
  // __builtin_cpu_supports also asks the operating system whether it saves the registers
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == CpuIsa::avx2) return avx2;
  if (isa == CpuIsa::avx512) {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return isa == CpuIsa::generic;
}

static CpuIsa choose() {
  constexpr CpuIsa kBestFirst[] = {CpuIsa::avx512, CpuIsa::avx2, CpuIsa::generic};
  const char* wanted = std::getenv("GRPO_ENGINE_ISA");
  for (CpuIsa isa : kBestFirst) {
    if (wanted && *wanted && std::string(wanted) != cpu_isa_name(isa)) continue;
    if (cpu_has(isa)) return isa;
    if (wanted && *wanted) {
      throw std::runtime_error("GRPO_ENGINE_ISA=" + std::string(wanted) +
                               ": this CPU has no such instruction set");
    }
  }
  throw std::runtime_error("GRPO_ENGINE_ISA must be generic, avx2 or avx512, got " +
                           std::string(wanted ? wanted : ""));
}

CpuIsa cpu_isa() {
  static const CpuIsa isa = choose();
  return isa;
}

void* scratch_alloc(int64_t bytes) {
  void* memory = std::aligned_alloc(64, (static_cast<std::size_t>(bytes) + 64) / 64 * 64);
  if (!memory) throw std::bad_alloc();
  return memory;
}

void scratch_free(void* memory) { std::free(memory); }

}  // namespace grpo_engine
