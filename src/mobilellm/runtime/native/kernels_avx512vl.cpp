// The kernels for AVX-VNNI in AVX-512's encoding of the same instruction (VL, VNNI). Compiled with their flags, and only
// run where the processor has them.
#include <immintrin.h>

#include "kernels.h"

namespace mobilellm {
namespace {

inline __m256i dot_bytes(__m256i sums, __m256i some, __m256i others) {
  return _mm256_dpbusd_epi32(sums, some, others);
}

#include "kernels_avxvnni_body.h"

}  // namespace

const Kernels* avx512vl_kernels() {
  static const Kernels kernels = vnni_kernels("avx512vl");
  return &kernels;
}

}  // namespace mobilellm
