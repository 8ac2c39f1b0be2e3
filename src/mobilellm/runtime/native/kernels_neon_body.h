// NEON, with and without the dot-product extension: the two files that include this differ in `dot` alone.
// Within their unnamed namespace, as kernels_body.h is.
#pragma once

constexpr int kLanes = 4, kTile = 4, kPlainTile = 4;
typedef float floats __attribute__((vector_size(16)));
typedef int32_t ints __attribute__((vector_size(16)));
typedef uint16_t shorts __attribute__((vector_size(8)));
typedef int8_t chars __attribute__((vector_size(4)));

inline floats halves(const uint16_t* from) {
  return floats(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from))));
}

inline chars narrowed(ints v) {
  const int16x4_t words = vqmovn_s32(int32x4_t(v));
  const int8x8_t bytes = vqmovn_s16(vcombine_s16(words, words));
  chars four;
  __builtin_memcpy(&four, &bytes, sizeof four);
  return four;
}

inline floats fused(floats a, floats b, floats c) {
  return floats(vfmaq_f32(float32x4_t(c), float32x4_t(a), float32x4_t(b)));
}

inline shorts halved(floats v) { return shorts(vreinterpret_u16_f16(vcvt_f16_f32(float32x4_t(v)))); }

inline floats swapped(floats v) { return floats(vrev64q_f32(float32x4_t(v))); }

#include "kernels_body.h"

// The whole-number sums of one block: N tokens by the panel's four quarters of four rows. Weights come as 4 rows
// of 4 numbers, a group of 4 columns; `dot<Group>` multiplies them by the numbers of x that stand at the group.

struct Eight {
  static constexpr int bytes = 512, offset = 0;
  template <int Group, int N>
  static inline void group(const uint8_t* weights, const int8x16_t* x, int32x4_t (*sums)[N]) {
    for (int quarter = 0; quarter < 4; ++quarter) {
      const int8x16_t w = vreinterpretq_s8_u8(vld1q_u8(weights + Group * 64 + quarter * 16));
      for (int t = 0; t < N; ++t) sums[quarter][t] = dot<Group>(sums[quarter][t], w, x[t]);
    }
  }
  template <int N>
  static inline void block(const uint8_t* weights, const int8_t* x, int32x4_t (*sums)[N]) {
    for (int half = 0; half < 2; ++half, weights += 256) {
      int8x16_t numbers[N];
      for (int t = 0; t < N; ++t) numbers[t] = vld1q_s8(x + t * kBlock + half * 16);
      group<0>(weights, numbers, sums);
      group<1>(weights, numbers, sums);
      group<2>(weights, numbers, sums);
      group<3>(weights, numbers, sums);
    }
  }
};

struct Four {  // nibbles: w + 8
  static constexpr int bytes = 256, offset = 8;
  template <int Group, int N>
  static inline void group(const uint8_t* weights, const int8x16_t* first, const int8x16_t* second,
                           int32x4_t (*sums)[N]) {
    for (int quarter = 0; quarter < 4; ++quarter) {
      const uint8x16_t w = vld1q_u8(weights + Group * 64 + quarter * 16);
      const int8x16_t low = vreinterpretq_s8_u8(vandq_u8(w, vdupq_n_u8(15)));
      const int8x16_t high = vreinterpretq_s8_u8(vshrq_n_u8(w, 4));
      for (int t = 0; t < N; ++t) {
        sums[quarter][t] = dot<Group>(sums[quarter][t], low, first[t]);
        sums[quarter][t] = dot<Group>(sums[quarter][t], high, second[t]);
      }
    }
  }
  template <int N>
  static inline void block(const uint8_t* weights, const int8_t* x, int32x4_t (*sums)[N]) {
    int8x16_t first[N], second[N];
    for (int t = 0; t < N; ++t) {
      first[t] = vld1q_s8(x + t * kBlock);
      second[t] = vld1q_s8(x + t * kBlock + 16);
    }
    group<0>(weights, first, second, sums);
    group<1>(weights, first, second, sums);
    group<2>(weights, first, second, sums);
    group<3>(weights, first, second, sums);
  }
};

template <typename Kind, int N>
inline void blocks_tile(const uint8_t* panel, int columns, const Bytes& x, int first, float* out) {
  size_t at = size_t(first);
  floats totals[4][N] = {};
  for (int block = 0; block < columns / kBlock; ++block, at += x.tokens) {
    const uint8_t* weights = panel + numbers_at(block, Kind::bytes);
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(panel + scales_at(block, Kind::bytes));
    int32x4_t sums[4][N];
    for (int t = 0; t < N; ++t) {
      const int32x4_t offset = vdupq_n_s32(Kind::offset * x.negated[at + t]);
      for (int quarter = 0; quarter < 4; ++quarter) sums[quarter][t] = offset;
    }
    Kind::template block<N>(weights, x.numbers + at * kBlock, sums);
    for (int quarter = 0; quarter < 4; ++quarter) {
      const floats scale = halves(scales + quarter * 4);
      for (int t = 0; t < N; ++t) {
        const floats whole = floats(vcvtq_f32_s32(sums[quarter][t]));
        totals[quarter][t] = fused(whole, scale * all(x.scales[at + t]), totals[quarter][t]);
      }
    }
  }
  for (int t = 0; t < N; ++t) {
    for (int quarter = 0; quarter < 4; ++quarter) write(out + t * kPanelRows + quarter * 4, totals[quarter][t]);
  }
}

template <typename Kind>
void blocks_product(const uint8_t* panel, int columns, const Inputs& x, int first, int count, float* out) {
  in_tiles<kTile>(count, [&](int t, auto n) {
    blocks_tile<Kind, decltype(n)::value>(panel, columns, x.bytes, first + t, out + t * kPanelRows);
  });
}
