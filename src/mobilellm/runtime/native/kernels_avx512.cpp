// AVX-512 (F, BW, VL) with VNNI. Compiled with their flags, and only run where the processor has them.
#include <immintrin.h>

#include "kernels.h"

namespace mobilellm {
namespace {

constexpr int kLanes = 16, kTile = 8, kPlainTile = 16;
typedef float floats __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef uint16_t shorts __attribute__((vector_size(32)));
typedef int8_t chars __attribute__((vector_size(16)));

inline floats halves(const uint16_t* from) {
  return floats(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
}

inline chars narrowed(ints v) { return chars(_mm512_cvtepi32_epi8(__m512i(v))); }

inline floats fused(floats a, floats b, floats c) { return floats(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c))); }

inline float sum(floats v) { return _mm512_reduce_add_ps(__m512(v)); }
inline int32_t sum(ints v) { return _mm512_reduce_add_epi32(__m512i(v)); }
inline float largest_of(floats v) { return _mm512_reduce_max_ps(__m512(v)); }
inline int32_t largest_of(ints v) { return _mm512_reduce_max_epi32(__m512i(v)); }

inline shorts halved(floats v) { return shorts(_mm512_cvtps_ph(__m512(v), _MM_FROUND_TO_NEAREST_INT)); }

inline floats swapped(floats v) { return floats(_mm512_permute_ps(__m512(v), 0xB1)); }

#include "kernels_body.h"

inline __m512i bytes64(const void* from) { return _mm512_load_si512(from); }
inline __m512i four(const int8_t* from) { return _mm512_set1_epi32(read<int32_t>(from)); }

// The whole-number sums of one block: N tokens by the panel's 16 rows. One instruction multiplies and adds four
// unsigned bytes, the weights', and four signed ones, the input's, in 16 places; weights become unsigned by an
// offset, and the sums begin with what that is too much.

struct Eight {  // w + 128: the sign bit turned
  static constexpr int bytes = 512, offset_bits = 7;
  template <int N>
  static inline void block(const uint8_t* weights, const int8_t* x, __m512i* sums, const uint8_t* ahead) {
    const __m512i sign = _mm512_set1_epi8(-128);
#pragma GCC unroll 8
    for (int group = 0; group < 8; ++group) {
      if (ahead) __builtin_prefetch(ahead + group * 64, 0, 2);  // one at a time, and into the second cache
      const __m512i w = _mm512_xor_si512(bytes64(weights + group * 64), sign);
#pragma GCC unroll 16
      for (int t = 0; t < N; ++t) sums[t] = _mm512_dpbusd_epi32(sums[t], w, four(x + t * kBlock + group * 4));
    }
  }
};

struct Four {  // nibbles: w + 8
  static constexpr int bytes = 256, offset_bits = 3;
  template <int N>
  static inline void block(const uint8_t* weights, const int8_t* x, __m512i* sums, const uint8_t* ahead) {
    const __m512i mask = _mm512_set1_epi8(15);
    __m512i highs[N] = {};
#pragma GCC unroll 4
    for (int group = 0; group < 4; ++group) {
      if (N >= 4 && ahead) __builtin_prefetch(ahead + group * 64, 0, 2);  // products of fewer have no time for it
      __m512i w = bytes64(weights + group * 64);
      asm("" : "+v"(w));  // loaded once, for units that load are what a single token's product lacks
      const __m512i low = _mm512_and_si512(w, mask);
      // Of few tokens the high nibbles are multiplied where they stand, as sixteen times themselves.
      const __m512i high = N < 4 ? _mm512_andnot_si512(mask, w) : _mm512_and_si512(_mm512_srli_epi16(w, 4), mask);
#pragma GCC unroll 16
      for (int t = 0; t < N; ++t) {
        const int8_t* from = x + t * kBlock + group * 4;
        __m512i& highs_of = N < 4 ? highs[t] : sums[t];
        sums[t] = _mm512_dpbusd_epi32(sums[t], low, four(from));
        highs_of = _mm512_dpbusd_epi32(highs_of, high, four(from + 16));
      }
    }
#pragma GCC unroll 4
    for (int t = 0; N < 4 && t < N; ++t) sums[t] = _mm512_add_epi32(sums[t], _mm512_srai_epi32(highs[t], 4));
  }
};

template <typename Kind, int N>
inline void blocks_tile(const uint8_t* panel, int columns, const Bytes& x, int first, float* out,
                        const uint8_t* ahead) {
  const uint8_t* start = panel;
  const int8_t* numbers = x.numbers + size_t(first) * kBlock;
  const float* x_scales = x.scales + first;
  const int32_t* negated = x.negated + first;
  floats totals[N] = {};
  const auto block = [&](const uint8_t* scales, const uint8_t* weights) {
    __m512i sums[N];
#pragma GCC unroll 16
    for (int t = 0; t < N; ++t) sums[t] = _mm512_slli_epi32(_mm512_set1_epi32(negated[t]), Kind::offset_bits);
    Kind::template block<N>(weights, numbers, sums, ahead ? weights + (ahead - start) : nullptr);
    const floats scale = halves(reinterpret_cast<const uint16_t*>(scales));
#pragma GCC unroll 16
    for (int t = 0; t < N; ++t) {
      totals[t] = fused(floats(_mm512_cvtepi32_ps(sums[t])), scale * all(x_scales[t]), totals[t]);
    }
    numbers += x.tokens * kBlock, x_scales += x.tokens, negated += x.tokens;
  };
  int left = columns / kBlock;
  for (; left > 1; left -= 2, panel += scales_at(2, Kind::bytes)) {
    if (ahead) __builtin_prefetch(panel + (ahead - start), 0, 2);  // two blocks' scales
    block(panel + scales_at(0, Kind::bytes), panel + numbers_at(0, Kind::bytes));
    block(panel + scales_at(1, Kind::bytes), panel + numbers_at(1, Kind::bytes));
  }
  if (left) block(panel + scales_at(0, Kind::bytes), panel + numbers_at(0, Kind::bytes));
  for (int t = 0; t < N; ++t) write(out + t * kPanelRows, totals[t]);
}

template <typename Kind>
void blocks_product(const uint8_t* panel, int columns, const Inputs& x, int first, int count, float* out) {
  in_tiles<kTile>(count, [&](int t, auto n) {
    blocks_tile<Kind, decltype(n)::value>(panel, columns, x.bytes, first + t, out + t * kPanelRows,
                                          t ? nullptr : x.ahead);
  });
}

constexpr int kMixTile = 6;

inline ints dot(ints sums, ints some, ints others) {
  return ints(_mm512_dpbusd_epi32(__m512i(sums), __m512i(some), __m512i(others)));
}

inline ints nearest(floats v) { return ints(_mm512_cvtps_epi32(__m512(v))); }

inline void write_bytes(const ints* v, uint8_t* low, uint8_t* high) {
  const __m512i byte = _mm512_set1_epi16(255);
  const __m512i first = _mm512_packus_epi32(__m512i(v[0]), __m512i(v[1]));
  const __m512i second = _mm512_packus_epi32(__m512i(v[2]), __m512i(v[3]));
  const __m512i lows = _mm512_packus_epi16(_mm512_and_si512(first, byte), _mm512_and_si512(second, byte));
  const __m512i highs = _mm512_packus_epi16(_mm512_srli_epi16(first, 8), _mm512_srli_epi16(second, 8));
  _mm512_storeu_si512(low, lows);
  _mm512_storeu_si512(high, highs);
}

#include "attention_vnni_body.h"

}  // namespace

const Kernels* avx512_kernels() {
  static const Kernels kernels = kernels_with("avx512", blocks_product<Eight>, blocks_product<Four>,
                                              attend_bytes<blocks_product<Eight>, mix_by_bytes>);
  return &kernels;
}

}  // namespace mobilellm
