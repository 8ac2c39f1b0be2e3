// Registers of 256 bits with VNNI: the files that include this differ in how `dot_bytes`, which adds four unsigned bytes
// times four signed ones in eight places, is encoded. Within their unnamed namespace, as kernels_body.h is.
#pragma once

// Weights become unsigned by an offset, and the sums begin with what that is too much.
template <int OffsetBits>
struct Unsigned {
  __m256i added(__m256i sum, __m256i x) const { return dot_bytes(sum, numbers, x); }
  static __m256i begun(int32_t negated) { return _mm256_slli_epi32(_mm256_set1_epi32(negated), OffsetBits); }
  static __m256i whole(__m256i sum, int32_t) { return sum; }
  __m256i numbers;
};

struct SignedBytes : Unsigned<7> {  // w + 128: the sign bit turned
  SignedBytes(__m256i w) : Unsigned<7>{_mm256_xor_si256(w, _mm256_set1_epi8(-128))} {}
};

struct Nibbles : Unsigned<3> {  // w + 8
  static constexpr bool may_be_in_place = true;
  Nibbles(__m256i w) : Unsigned<3>{w} {}
};

#include "kernels_avx2_body.h"

constexpr int kMixTile = 3;

inline ints dot(ints sums, ints some, ints others) {
  return ints(dot_bytes(__m256i(sums), __m256i(some), __m256i(others)));
}

inline ints nearest(floats v) { return ints(_mm256_cvtps_epi32(__m256(v))); }

inline void write_bytes(const ints* v, uint8_t* low, uint8_t* high) {
  const __m256i byte = _mm256_set1_epi16(255);
  const __m256i first = _mm256_packus_epi32(__m256i(v[0]), __m256i(v[1]));
  const __m256i second = _mm256_packus_epi32(__m256i(v[2]), __m256i(v[3]));
  const __m256i lows = _mm256_packus_epi16(_mm256_and_si256(first, byte), _mm256_and_si256(second, byte));
  const __m256i highs = _mm256_packus_epi16(_mm256_srli_epi16(first, 8), _mm256_srli_epi16(second, 8));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(low), lows);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(high), highs);
}

#include "attention_vnni_body.h"

inline Kernels vnni_kernels(const char* name) {
  return kernels_with(name, blocks_product<Eight>, blocks_product<Four>,
                      attend_bytes<blocks_product<Eight>, mix_by_bytes>);
}
