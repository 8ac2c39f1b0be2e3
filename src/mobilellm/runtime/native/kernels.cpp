#include "kernels.h"

#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace mobilellm {
namespace {

#if defined(__x86_64__)
// What older compilers have no name for is asked of the processor itself.
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx >> 29 & 1);
}

bool has_avxvnni() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 4 & 1);
}
#elif defined(__aarch64__)
bool has_dotprod() {
#if defined(__linux__)
  constexpr unsigned long kDotProduct = 1ul << 20;  // HWCAP_ASIMDDP
  return getauxval(AT_HWCAP) & kDotProduct;
#elif defined(__APPLE__)
  return true;  // from the first on, the M1
#else
  return false;
#endif
}
#endif

}  // namespace

const Kernels* kernels_for(const char* isa) {
  const auto wanted = [&](const char* name) { return !*isa || !std::strcmp(isa, name); };
#if defined(__x86_64__)
  // The first says, too, that the system keeps these registers.
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
  if (has_avx512 && wanted("avx512")) return avx512_kernels();
  if (has_avx512 && wanted("avx512vl")) return avx512vl_kernels();
  if (has_avx2 && has_avxvnni() && avxvnni_kernels() && wanted("avxvnni")) return avxvnni_kernels();
  if (has_avx2 && wanted("avx2")) return avx2_kernels();
#elif defined(__aarch64__)
  if (has_dotprod() && wanted("dotprod")) return dotprod_kernels();
  if (wanted("neon")) return neon_kernels();
#endif
  return wanted("scalar") ? scalar_kernels() : nullptr;
}

}  // namespace mobilellm
