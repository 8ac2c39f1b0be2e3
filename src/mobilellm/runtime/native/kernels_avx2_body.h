// Registers of 256 bits, with and without VNNI. Within the unnamed namespace of the file that includes this, as
// kernels_body.h is. That has defined, for N tokens' sums, SignedBytes and Nibbles: a register of weights, four columns
// of eight rows, of which a number x of a token's bytes is added to sums that were begun, and made whole in the end.
#pragma once

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

// The upper half joined with the lower, and so on: what the compiler makes of `folded` takes half as long again.
template <typename Join>
inline int32_t folded_in_registers(ints v, const Join& join) {
  __m128i four = join(_mm256_castsi256_si128(__m256i(v)), _mm256_extracti128_si256(__m256i(v), 1));
  four = join(four, _mm_shuffle_epi32(four, 0x4E));
  return _mm_cvtsi128_si32(join(four, _mm_shuffle_epi32(four, 0xB1)));
}

inline int32_t sum(ints v) {
  return folded_in_registers(v, [](__m128i a, __m128i b) { return _mm_add_epi32(a, b); });
}
inline int32_t largest_of(ints v) {
  return folded_in_registers(v, [](__m128i a, __m128i b) { return _mm_max_epi32(a, b); });
}

inline shorts halved(floats v) { return shorts(_mm256_cvtps_ph(__m256(v), _MM_FROUND_TO_NEAREST_INT)); }

inline floats swapped(floats v) { return floats(_mm256_permute_ps(__m256(v), 0xB1)); }

#include "kernels_body.h"

inline __m256i bytes32(const void* from) { return _mm256_load_si256(static_cast<const __m256i*>(from)); }
inline __m256i four(const int8_t* from) { return _mm256_set1_epi32(read<int32_t>(from)); }

// The whole-number sums of one block: N tokens by the panel's two halves of eight rows. A number of x that is
// spread over a register serves both halves, for spreading takes the same units as multiplying.

struct Eight {
  using Weights = SignedBytes;
  static constexpr int bytes = 512;
  template <int N>
  static inline void block(const uint8_t* weights, const int8_t* x, __m256i (*sums)[N], const uint8_t* ahead) {
#pragma GCC unroll 8
    for (int group = 0; group < 8; ++group) {
      if (ahead) __builtin_prefetch(ahead + group * 64, 0, 2);  // one at a time, and into the second cache
      const SignedBytes w[2] = {bytes32(weights + group * 64), bytes32(weights + group * 64 + 32)};
#pragma GCC unroll 8
      for (int t = 0; t < N; ++t) {
        const __m256i spread = four(x + t * kBlock + group * 4);
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) sums[half][t] = w[half].added(sums[half][t], spread);
      }
    }
  }
};

struct Four {
  using Weights = Nibbles;
  static constexpr int bytes = 256;
  template <int N>
  static inline void block(const uint8_t* weights, const int8_t* x, __m256i (*sums)[N], const uint8_t*) {
    const __m256i mask = _mm256_set1_epi8(15);
    // Of few tokens high nibbles are multiplied where they stand, as sixteen times themselves, if sums have room for it.
    constexpr bool in_place = Nibbles::may_be_in_place && N < 4;
    __m256i highs[2][N];
    for (int t = 0; in_place && t < N; ++t) highs[0][t] = highs[1][t] = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int group = 0; group < 4; ++group) {
      const __m256i w[2] = {bytes32(weights + group * 64), bytes32(weights + group * 64 + 32)};
      const auto low_of = [&](__m256i bytes) { return _mm256_and_si256(bytes, mask); };
      const auto high_of = [&](__m256i bytes) {
        return in_place ? _mm256_andnot_si256(mask, bytes) : low_of(_mm256_srli_epi16(bytes, 4));
      };
      const Nibbles low[2] = {low_of(w[0]), low_of(w[1])}, high[2] = {high_of(w[0]), high_of(w[1])};
#pragma GCC unroll 8
      for (int t = 0; t < N; ++t) {
        const int8_t* from = x + t * kBlock + group * 4;
        const __m256i first = four(from), second = four(from + 16);
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          __m256i& of_high = in_place ? highs[half][t] : sums[half][t];
          sums[half][t] = low[half].added(sums[half][t], first);
          of_high = high[half].added(of_high, second);
        }
      }
    }
    for (int t = 0; in_place && t < N; ++t) {
      for (int half = 0; half < 2; ++half) {
        sums[half][t] = _mm256_add_epi32(sums[half][t], _mm256_srai_epi32(highs[half][t], 4));
      }
    }
  }
};

template <typename Kind, int N>
inline void blocks_tile(const uint8_t* panel, int columns, const Bytes& x, int first, float* out,
                        const uint8_t* ahead) {
  using Weights = typename Kind::Weights;
  size_t at = size_t(first);
  __m256 totals[2][N];
  for (int t = 0; t < N; ++t) totals[0][t] = totals[1][t] = _mm256_setzero_ps();
  for (int block = 0; block < columns / kBlock; ++block, at += x.tokens) {
    const uint8_t* weights = panel + numbers_at(block, Kind::bytes);
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(panel + scales_at(block, Kind::bytes));
    __m256i sums[2][N];
#pragma GCC unroll 8
    for (int t = 0; t < N; ++t) sums[0][t] = sums[1][t] = Weights::begun(x.negated[at + t]);
    Kind::template block<N>(weights, x.numbers + at * kBlock, sums, ahead ? weights + (ahead - panel) : nullptr);
    const __m256 scale[2] = {__m256(halves(scales)), __m256(halves(scales + 8))};
#pragma GCC unroll 8
    for (int t = 0; t < N; ++t) {
      const __m256 x_scale = _mm256_set1_ps(x.scales[at + t]);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const __m256 whole = _mm256_cvtepi32_ps(Weights::whole(sums[half][t], x.negated[at + t]));
        totals[half][t] = _mm256_fmadd_ps(whole, _mm256_mul_ps(scale[half], x_scale), totals[half][t]);
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
    blocks_tile<Kind, decltype(n)::value>(panel, columns, x.bytes, first + t, out + t * kPanelRows,
                                          t ? nullptr : x.ahead);
  });
}

