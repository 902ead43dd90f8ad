#include "objslot/dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(OBJSLOT_X86) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace objslot {

const char* name(Isa isa) {
  switch (isa) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "base";
  }
}

Isa best_isa() {
#ifdef OBJSLOT_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#ifdef OBJSLOT_AVX512
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
#endif
#ifdef OBJSLOT_AVX2
  if (avx2) return Isa::avx2;
#endif
  (void)avx2;
#endif
  return Isa::base;
}

Isa active_isa() {
  static const Isa isa = [] {
    const char* variable = std::getenv("OBJSLOT_ISA");
    const std::string wanted = variable ? variable : "";
    if (wanted.empty()) return best_isa();
    for (Isa level : {Isa::base, Isa::avx2, Isa::avx512}) {
      if (wanted != name(level)) continue;
      if (level > best_isa())
        throw std::invalid_argument("OBJSLOT_ISA: expected at most " + std::string(name(best_isa())) +
                                    ", the best level of this processor and build, got " + wanted);
      return level;
    }
    throw std::invalid_argument("OBJSLOT_ISA: expected base, avx2 or avx512, got " + wanted);
  }();
  return isa;
}

bool has_tiles() {
#if defined(OBJSLOT_X86) && defined(__linux__)
  static const bool usable = [] {
    if (active_isa() != Isa::avx512) return false;
    unsigned a, b, c, d;
    constexpr unsigned tiles = (1u << 25) | (1u << 24) | (1u << 22);  // AMX-INT8, AMX-TILE, AMX-BF16
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & tiles) != tiles) return false;
    constexpr unsigned brain_vectors = 1u << 5;  // AVX512-BF16, which all of these processors have
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & brain_vectors)) return false;
    constexpr long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  }();
  return usable;
#else
  return false;
#endif
}

}  // namespace objslot
