// AVX2 with AVX-VNNI, as processors without AVX-512 have it. Compiled with their flags, and only run where the processor
// has them.
#include <immintrin.h>

#include "kernels.h"

namespace mobilellm {

#if defined(__AVXVNNI__)
namespace {

inline __m256i dot_bytes(__m256i sums, __m256i some, __m256i others) {
  return _mm256_dpbusd_avx_epi32(sums, some, others);
}

#include "kernels_avxvnni_body.h"

}  // namespace

const Kernels* avxvnni_kernels() {
  static const Kernels kernels = vnni_kernels("avxvnni");
  return &kernels;
}
#else  // the compiler is older than these instructions
const Kernels* avxvnni_kernels() { return nullptr; }
#endif

}  // namespace mobilellm
