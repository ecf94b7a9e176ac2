#include "core/cpu_dispatch.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace grpo_engine {

const char* cpu_isa_name(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::avx512_bf16: return "avx512_bf16";
    case CpuIsa::avx512: return "avx512";
    case CpuIsa::avx2: return "avx2";
    case CpuIsa::neon: return "neon";
    default: return "generic";
  }
}

#if defined(__x86_64__)
// Whether the dot product of bfloat16 pairs adds the second product first and rounds each sum, as Intel's manual has
// it and as gemm.h relies on: other instruction sets compute the same chain.
__attribute__((target("avx512f,avx512bf16"))) static bool dot_is_a_chain() {
  uint32_t state = 1;
  const auto random = [&] { return (state = state * 1664525u + 1013904223u) >> 16; };
  for (int trial = 0; trial < 64; ++trial) {
    uint16_t a[32], b[32];
    float chain[16], dot[16];
    for (int i = 0; i < 32; ++i) {  // signed, from 2^-7 to 2^8
      a[i] = static_cast<uint16_t>((random() & 0x807F) | (120 + random() % 16) << 7);
      b[i] = static_cast<uint16_t>((random() & 0x807F) | (120 + random() % 16) << 7);
    }
    const auto value = [](uint16_t bits) {
      const uint32_t word = static_cast<uint32_t>(bits) << 16;
      float x;
      std::memcpy(&x, &word, 4);
      return x;
    };
    for (int i = 0; i < 16; ++i) {
      const float start = static_cast<float>(random()) / 977.0f - 31.0f;
      dot[i] = start;
      chain[i] = std::fma(value(a[2 * i + 1]), value(b[2 * i + 1]), start);
      chain[i] = std::fma(value(a[2 * i]), value(b[2 * i]), chain[i]);
    }
    const __m512i x = _mm512_loadu_si512(a), y = _mm512_loadu_si512(b);
    _mm512_storeu_ps(dot,
                     _mm512_dpbf16_ps(_mm512_loadu_ps(dot), reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(y)));
    if (std::memcmp(dot, chain, sizeof dot) != 0) return false;
  }
  return true;
}
#endif

bool cpu_has(CpuIsa isa) {
#if defined(__x86_64__)
  // __builtin_cpu_supports also asks the operating system whether it saves the registers
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (isa == CpuIsa::avx2) return avx2;
  if (isa == CpuIsa::avx512) return avx512;
  if (isa == CpuIsa::avx512_bf16) return avx512 && __builtin_cpu_supports("avx512bf16") && dot_is_a_chain();
#elif defined(__aarch64__)
  if (isa == CpuIsa::neon) return true;
#endif
  return isa == CpuIsa::generic;
}

static CpuIsa choose() {
  const char* wanted = std::getenv("GRPO_ENGINE_ISA");
  std::string names;
  CpuIsa best = CpuIsa::generic;
  for (CpuIsa isa : kCpuIsas) {
    const bool has = cpu_has(isa);
    if (has) best = isa;
    if (wanted && std::string(wanted) == cpu_isa_name(isa)) {
      if (has) return isa;
      throw std::runtime_error("GRPO_ENGINE_ISA=" + std::string(wanted) + ": this CPU has no such instruction set");
    }
    names += (names.empty() ? "" : ", ") + std::string(cpu_isa_name(isa));
  }
  if (wanted && *wanted) {
    throw std::runtime_error("GRPO_ENGINE_ISA must be one of " + names + ", got " + std::string(wanted));
  }
  return best;
}

CpuIsa cpu_isa() {
  static const CpuIsa isa = choose();
  return isa;
}

}  // namespace grpo_engine
