// Values in 8 bits times weights by whole-number products, in place of mix_bytes. A part of kernels_avx512.cpp.
//
// One instruction multiplies and adds four positions' signed bytes and unsigned ones in 16 places. Weights times their
// values' scales are therefore whole numbers below 2^16, in steps of a 65,535th of the largest of the query's span,
// in two bytes whose products are summed apart: what is lost is a 500th of the values' own rounding.
#pragma once

constexpr int kTiles = kSpan / 16;

// Where the bytes of positions position ... position + 3 stand in a row of kSpan: as four registers of 16 numbers come
// out when they are packed into one.
inline int packed_at(int position) { return position / 64 * 64 + position % 16 * 4 + position % 64 / 16 * 4; }

// The two bytes of a query's weights (kSpan each), which are weights times scales, and the size of a step. Where a query
// does not look, a scale may be no number; beyond the positions that are looked at, anything may stand for a weight and
// scales are 0.
inline float weights_in_bytes(const float* weights, const floats* scales, uint8_t* low, uint8_t* high) {
  floats scaled[kTiles], most = {};
#pragma GCC unroll 8
  for (int tile = 0; tile < kTiles; ++tile) {
    const floats weight = read<floats>(weights + tile * 16), product = weight * scales[tile];
    scaled[tile] = weight > 0 ? product : floats{};
    most = larger(scaled[tile], most);
  }
  const float step = largest_of(most) / 65535.0f;
  const floats inverse = all(step > 1e-30f ? 1 / step : 0.0f);
  const __m512i byte = _mm512_set1_epi16(255);
#pragma GCC unroll 2
  for (int tile = 0; tile < kTiles; tile += 4) {
    __m512i whole[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) whole[i] = _mm512_cvtps_epi32(__m512(scaled[tile + i] * inverse));
    const __m512i first = _mm512_packus_epi32(whole[0], whole[1]), second = _mm512_packus_epi32(whole[2], whole[3]);
    const __m512i lows = _mm512_packus_epi16(_mm512_and_si512(first, byte), _mm512_and_si512(second, byte));
    const __m512i highs = _mm512_packus_epi16(_mm512_srli_epi16(first, 8), _mm512_srli_epi16(second, 8));
    _mm512_storeu_si512(low + tile * 16, lows);
    _mm512_storeu_si512(high + tile * 16, highs);
  }
  return step;
}

// out (N, 32) = weights (N, kSpan) of both bytes times a run of 32 numbers of each position.
template <int N>
inline void mix_run(const uint8_t* numbers, size_t tile_bytes, int head_dim, int positions, const uint8_t* low,
                    const uint8_t* high, const float* steps, float* out, size_t out_stride, const uint8_t* next) {
  __m512i lows[2][N], highs[2][N];
#pragma GCC unroll 8
  for (int t = 0; t < N; ++t) lows[0][t] = lows[1][t] = highs[0][t] = highs[1][t] = _mm512_setzero_si512();
  for (int tile = 0; tile * 16 < positions; ++tile, numbers += tile_bytes) {
    const int packed = packed_at(tile * 16);
    if (next) fetch_tile(next + tile * tile_bytes, tile_bytes);
#pragma GCC unroll 4
    for (int four = 0; four < 4; ++four) {
      const uint8_t* from = numbers + size_t(four) * 4 * head_dim;
      const __m512i values[2] = {bytes64(from), bytes64(from + 64)};
#pragma GCC unroll 8
      for (int t = 0; t < N; ++t) {
        const size_t at = size_t(t) * kSpan + packed + four * 16;
        const __m512i its_low = _mm512_set1_epi32(read<int32_t>(low + at));
        const __m512i its_high = _mm512_set1_epi32(read<int32_t>(high + at));
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          lows[half][t] = _mm512_dpbusd_epi32(lows[half][t], its_low, values[half]);
          highs[half][t] = _mm512_dpbusd_epi32(highs[half][t], its_high, values[half]);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < N; ++t) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {  // either byte's sum is below 255 * 128 * kSpan: both stay within 31 bits
      const __m512i whole = _mm512_add_epi32(_mm512_slli_epi32(highs[half][t], 8), lows[half][t]);
      write(out + t * out_stride + half * 16, floats(_mm512_cvtepi32_ps(whole)) * all(steps[t]));
    }
  }
}

void mix_by_bytes(const Attention& a, size_t tile_bytes, float* out) {
  constexpr int kMixTile = 6;  // queries whose sums fit the registers
  uint8_t *low = reinterpret_cast<uint8_t*>(a.room), *high = low + size_t(a.count) * kSpan;
  float* steps = a.room + size_t(a.count) * kSpan / 2;
  const int tiles = (a.positions + 15) / 16;
  for (int run = 0; run < a.head_dim / kBlock; ++run) {
    floats scales[kTiles] = {};
    for (int tile = 0; tile < tiles; ++tile) {
      scales[tile] = halves(reinterpret_cast<const uint16_t*>(a.values + tile * tile_bytes + run * 32));
    }
    for (int query = 0; query < a.count; ++query) {
      const size_t at = size_t(query) * kSpan;
      steps[query] = weights_in_bytes(a.scores + at, scales, low + at, high + at);
    }
    const uint8_t* numbers = a.values + value_numbers_at(a.head_dim) + run * kBlock * 4;
    in_tiles<kMixTile>(a.count, [&](int query, auto n) {
      const size_t at = size_t(query) * kSpan;
      mix_run<decltype(n)::value>(numbers, tile_bytes, a.head_dim, a.positions, low + at, high + at, steps + query,
                                  out + size_t(query) * a.value_stride + run * kBlock, a.value_stride,
                                  run || query ? nullptr : a.next);
    });
  }
}
