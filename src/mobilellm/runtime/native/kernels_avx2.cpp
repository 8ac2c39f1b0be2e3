// AVX2 with FMA and F16C. Compiled with their flags, and only run where the processor has them.
#include <immintrin.h>

#include "kernels.h"

namespace mobilellm {
namespace {

// Keeps the compiler from turning a chain of sums into a tree, for which there are not enough registers.
inline __m256i as_written(__m256i sum) {
  asm("" : "+x"(sum));
  return sum;
}

// Unsigned by signed bytes in pairs: |w| and x with w's sign, so that 2 * 128 * 127 stays within 16 bits.
struct SignedBytes {
  SignedBytes(__m256i w) : signs(w), magnitudes(_mm256_abs_epi8(w)) {}
  __m256i added(__m256i sum, __m256i x) const {
    const __m256i pairs = _mm256_maddubs_epi16(magnitudes, _mm256_sign_epi8(x, signs));
    return as_written(_mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))));
  }
  static __m256i begun(int32_t) { return _mm256_setzero_si256(); }
  static __m256i whole(__m256i sum, int32_t) { return sum; }
  __m256i signs, magnitudes;
};

// Nibbles 0 ... 15 by signed bytes: eight sums of pairs, 8 * 2 * 15 * 127, stay within 16 bits.
struct Nibbles {
  static constexpr bool may_be_in_place = false;
  Nibbles(__m256i w) : numbers(w) {}
  __m256i added(__m256i sum, __m256i x) const {
    return as_written(_mm256_add_epi16(sum, _mm256_maddubs_epi16(numbers, x)));
  }
  static __m256i begun(int32_t) { return _mm256_setzero_si256(); }
  static __m256i whole(__m256i sum, int32_t negated) {  // w = nibble - 8
    return _mm256_add_epi32(_mm256_madd_epi16(sum, _mm256_set1_epi16(1)), _mm256_set1_epi32(8 * negated));
  }
  __m256i numbers;
};

#include "kernels_avx2_body.h"

}  // namespace

const Kernels* avx2_kernels() {
  static const Kernels kernels = kernels_with("avx2", blocks_product<Eight>, blocks_product<Four>,
                                              attend_bytes<blocks_product<Eight>, mix_bytes>);
  return &kernels;
}

}  // namespace mobilellm
