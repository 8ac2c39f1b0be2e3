// AVX2 with FMA and F16C. Compiled with their flags, and only run where the processor has them.
#include <immintrin.h>

#include "kernels.h"

namespace mobilellm {
namespace {

constexpr int kLanes = 8, kTile = 4, kPlainTile = 4;
typedef float floats __attribute__((vector_size(32)));
typedef int32_t ints __attribute__((vector_size(32)));
typedef uint16_t shorts __attribute__((vector_size(16)));
typedef int8_t chars __attribute__((vector_size(8)));

inline floats halves(const uint16_t* from) {
  return floats(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}

inline chars narrowed(ints v) {
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(__m256i(v)), _mm256_extracti128_si256(__m256i(v), 1));
  chars bytes;
  _mm_storel_epi64(reinterpret_cast<__m128i*>(&bytes), _mm_packs_epi16(words, words));
  return bytes;
}

inline floats fused(floats a, floats b, floats c) { return floats(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c))); }

inline shorts halved(floats v) { return shorts(_mm256_cvtps_ph(__m256(v), _MM_FROUND_TO_NEAREST_INT)); }

inline floats swapped(floats v) { return floats(_mm256_permute_ps(__m256(v), 0xB1)); }

#include "kernels_body.h"

inline __m256i bytes32(const void* from) { return _mm256_load_si256(static_cast<const __m256i*>(from)); }
inline __m256i four(const int8_t* from) { return _mm256_set1_epi32(read<int32_t>(from)); }

// Keeps the compiler from turning a chain of sums into a tree, for which there are not enough registers.
inline __m256i as_written(__m256i sum) {
  asm("" : "+x"(sum));
  return sum;
}

// The whole-number sums of one block: N tokens by the panel's two halves of eight rows. A number of x that is
// spread over a register serves both halves, for spreading takes the same units as multiplying.

// Unsigned by signed bytes in pairs: |w| and x with w's sign, so that 2 * 128 * 127 stays within 16 bits.
struct Eight {
  static constexpr int bytes = 512;
  template <int N>
  static inline void block(const uint8_t* weights, const int8_t* x, const int32_t*, __m256i (*sums)[N]) {
    const __m256i ones = _mm256_set1_epi16(1);
    for (int t = 0; t < N; ++t) sums[0][t] = sums[1][t] = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int group = 0; group < 8; ++group) {
      const __m256i w[2] = {bytes32(weights + group * 64), bytes32(weights + group * 64 + 32)};
      const __m256i magnitude[2] = {_mm256_abs_epi8(w[0]), _mm256_abs_epi8(w[1])};
#pragma GCC unroll 4
      for (int t = 0; t < N; ++t) {
        const __m256i spread = four(x + t * kBlock + group * 4);
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          const __m256i pairs = _mm256_maddubs_epi16(magnitude[half], _mm256_sign_epi8(spread, w[half]));
          sums[half][t] = as_written(_mm256_add_epi32(sums[half][t], _mm256_madd_epi16(pairs, ones)));
        }
      }
    }
  }
};

// Nibbles 0 ... 15 by signed bytes: eight sums of pairs, 8 * 2 * 15 * 127, stay within 16 bits.
struct Four {
  static constexpr int bytes = 256;
  template <int N>
  static inline void block(const uint8_t* weights, const int8_t* x, const int32_t* negated, __m256i (*sums)[N]) {
    const __m256i mask = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    for (int t = 0; t < N; ++t) sums[0][t] = sums[1][t] = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int group = 0; group < 4; ++group) {
      __m256i low[2], high[2];
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const __m256i w = bytes32(weights + group * 64 + half * 32);
        low[half] = _mm256_and_si256(w, mask);
        high[half] = _mm256_and_si256(_mm256_srli_epi16(w, 4), mask);
      }
#pragma GCC unroll 4
      for (int t = 0; t < N; ++t) {
        const int8_t* from = x + t * kBlock + group * 4;
        const __m256i first = four(from), second = four(from + 16);
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          sums[half][t] = as_written(_mm256_add_epi16(sums[half][t], _mm256_maddubs_epi16(low[half], first)));
          sums[half][t] = as_written(_mm256_add_epi16(sums[half][t], _mm256_maddubs_epi16(high[half], second)));
        }
      }
    }
    for (int t = 0; t < N; ++t) {
      const __m256i offset = _mm256_set1_epi32(8 * negated[t]);  // w = nibble - 8
      for (int half = 0; half < 2; ++half) {
        sums[half][t] = _mm256_add_epi32(_mm256_madd_epi16(sums[half][t], ones), offset);
      }
    }
  }
};

template <typename Kind, int N>
inline void blocks_tile(const uint8_t* panel, int columns, const Bytes& x, int first, float* out) {
  size_t at = size_t(first);
  __m256 totals[2][N];
  for (int t = 0; t < N; ++t) totals[0][t] = totals[1][t] = _mm256_setzero_ps();
  for (int block = 0; block < columns / kBlock; ++block, at += x.tokens) {
    const uint8_t* weights = panel + numbers_at(block, Kind::bytes);
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(panel + scales_at(block, Kind::bytes));
    __m256i sums[2][N];
    Kind::template block<N>(weights, x.numbers + at * kBlock, x.negated + at, sums);
    const __m256 scale[2] = {__m256(halves(scales)), __m256(halves(scales + 8))};
#pragma GCC unroll 4
    for (int t = 0; t < N; ++t) {
      const __m256 x_scale = _mm256_set1_ps(x.scales[at + t]);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        totals[half][t] =
            _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[half][t]), _mm256_mul_ps(scale[half], x_scale), totals[half][t]);
      }
    }
  }
  for (int t = 0; t < N; ++t) {
    for (int half = 0; half < 2; ++half) _mm256_storeu_ps(out + t * kPanelRows + half * 8, totals[half][t]);
  }
}

template <typename Kind>
void blocks_product(const uint8_t* panel, int columns, const Inputs& x, int first, int count, float* out) {
  in_tiles<kTile>(count, [&](int t, auto n) {
    blocks_tile<Kind, decltype(n)::value>(panel, columns, x.bytes, first + t, out + t * kPanelRows);
  });
}

}  // namespace

const Kernels* avx2_kernels() {
  static const Kernels kernels = kernels_with("avx2", blocks_product<Eight>, blocks_product<Four>,
                                              attend_bytes<blocks_product<Eight>, mix_bytes>);
  return &kernels;
}

}  // namespace mobilellm
