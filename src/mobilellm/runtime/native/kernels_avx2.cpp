// AVX2 with FMA and F16C. Compiled with their flags, and only run where the processor has them.
#include <immintrin.h>

#include "kernels.h"

namespace mobilellm {
namespace {

typedef float f32x8 __attribute__((vector_size(32)));
typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef uint16_t u16x8 __attribute__((vector_size(16)));
typedef int8_t i8x8 __attribute__((vector_size(8)));

inline f32x8 halves(const uint16_t* from) {
  return f32x8(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}

inline f32x8 fused(f32x8 a, f32x8 b, f32x8 c) { return f32x8(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c))); }

uint16_t to_half(float value) { return uint16_t(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT)); }

#include "kernels_body.h"

inline __m256i bytes32(const void* from) { return _mm256_load_si256(static_cast<const __m256i*>(from)); }
inline __m256i four(const int8_t* from) { return _mm256_set1_epi32(read<int32_t>(from)); }

// Keeps the compiler from turning a chain of sums into a tree, for which there are not enough registers.
inline __m256i as_written(__m256i sum) {
  asm("" : "+x"(sum));
  return sum;
}

// Unsigned by signed bytes in pairs: |w| and x with w's sign, so that 2 * 128 * 127 stays within 16 bits.
struct Eight {
  static constexpr int bytes = 512;
  template <int N>
  static void block(const uint8_t* weights, const int8_t* const* x, const int32_t* const*, int at, __m256i* sums) {
    const __m256i ones = _mm256_set1_epi16(1);
    for (int t = 0; t < N; ++t) sums[t] = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int group = 0; group < 8; ++group) {
      const __m256i w = bytes32(weights + group * 64), magnitude = _mm256_abs_epi8(w);
#pragma GCC unroll 4
      for (int t = 0; t < N; ++t) {
        const __m256i signed_x = _mm256_sign_epi8(four(x[t] + at * kBlock + group * 4), w);
        const __m256i pairs = _mm256_maddubs_epi16(magnitude, signed_x);
        sums[t] = as_written(_mm256_add_epi32(sums[t], _mm256_madd_epi16(pairs, ones)));
      }
    }
  }
};

// Nibbles 0 ... 15 by signed bytes: eight sums of pairs, 8 * 2 * 15 * 127, stay within 16 bits.
struct Four {
  static constexpr int bytes = 256;
  template <int N>
  static void block(const uint8_t* weights, const int8_t* const* x, const int32_t* const* x_sums, int at,
                    __m256i* sums) {
    const __m256i mask = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    __m256i pairs[N];
    for (int t = 0; t < N; ++t) pairs[t] = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int group = 0; group < 4; ++group) {
      const __m256i w = bytes32(weights + group * 64);
      const __m256i low = _mm256_and_si256(w, mask), high = _mm256_and_si256(_mm256_srli_epi16(w, 4), mask);
#pragma GCC unroll 4
      for (int t = 0; t < N; ++t) {
        const int8_t* from = x[t] + at * kBlock + group * 4;
        pairs[t] = as_written(_mm256_add_epi16(pairs[t], _mm256_maddubs_epi16(low, four(from))));
        pairs[t] = as_written(_mm256_add_epi16(pairs[t], _mm256_maddubs_epi16(high, four(from + 16))));
      }
    }
    for (int t = 0; t < N; ++t) {
      const __m256i offset = _mm256_set1_epi32(8 * x_sums[t][at]);  // w = nibble - 8
      sums[t] = _mm256_sub_epi32(_mm256_madd_epi16(pairs[t], ones), offset);
    }
  }
};

constexpr int kAhead = 1024;  // bytes of weights asked for ahead of use: 10 % of a token's time at 8 bits, 25 % at 4

// N tokens by `Halves` of the panel's two halves of eight rows, beginning with `half`.
template <typename Kind, int N, int Halves>
inline void blocks_tile(const uint8_t* panel, int columns, const Inputs& x, int first, int half, float* out) {
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(panel) + half * 8;
  const uint8_t* weights = panel + scale_bytes(columns) + half * 32;
  const int8_t* bytes[N];
  const float* x_scales[N];
  const int32_t* x_sums[N];
  for (int t = 0; t < N; ++t) {
    bytes[t] = x.bytes + (first + t) * x.byte_columns;
    x_scales[t] = x.scales + (first + t) * x.blocks;
    x_sums[t] = x.sums + (first + t) * x.blocks;
  }
  __m256 totals[Halves][N];
  for (int h = 0; h < Halves; ++h)
    for (int t = 0; t < N; ++t) totals[h][t] = _mm256_setzero_ps();
  for (int block = 0; block < columns / kBlock; ++block, weights += Kind::bytes, scales += kPanelRows) {
    if constexpr (N == 1) {  // bound by memory
      for (int line = 0; line < Kind::bytes; line += 64) __builtin_prefetch(weights + kAhead + line);
    }
#pragma GCC unroll 2
    for (int h = 0; h < Halves; ++h) {
      __m256i sums[N];
      Kind::template block<N>(weights + h * 32, bytes, x_sums, block, sums);
      const __m256 scale = __m256(halves(scales + h * 8));
#pragma GCC unroll 4
      for (int t = 0; t < N; ++t) {
        const __m256 both = _mm256_mul_ps(scale, _mm256_set1_ps(x_scales[t][block]));
        totals[h][t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[t]), both, totals[h][t]);
      }
    }
  }
  for (int h = 0; h < Halves; ++h)
    for (int t = 0; t < N; ++t) _mm256_storeu_ps(out + t * kPanelRows + (half + h) * 8, totals[h][t]);
}

template <typename Kind>
void blocks_product(const uint8_t* panel, int columns, const Inputs& x, int first, int count, float* out) {
  in_tiles(count, [&](int t, auto n) {
    constexpr int N = decltype(n)::value;
    float* to = out + t * kPanelRows;
    if constexpr (N == 1) {  // the panel is read once, from front to back
      blocks_tile<Kind, N, 2>(panel, columns, x, first + t, 0, to);
    } else {  // as many sums as there are registers
      for (int half = 0; half < 2; ++half) blocks_tile<Kind, N, 1>(panel, columns, x, first + t, half, to);
    }
  });
}

}  // namespace

const Kernels* avx2_kernels() {
  static const Kernels kernels = {
      "avx2", plain_product<F32>, plain_product<F16>, plain_product<BF16>, blocks_product<Eight>,
      blocks_product<Four>, norm, quantise, gate, attend, merge, to_half,
  };
  return &kernels;
}

}  // namespace mobilellm
