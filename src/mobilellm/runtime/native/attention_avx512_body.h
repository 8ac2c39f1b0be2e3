// Values in 8 bits times weights by whole-number products, in place of mix_bytes. A part of kernels_avx512.cpp.
//
// One instruction multiplies and adds four positions' signed bytes and unsigned ones in 16 places. Weights times their
// values' scales are therefore whole numbers below 2^16, in steps of a 65,535th of the largest of the query's span,
// in two bytes whose products are summed apart: what is lost is below a millionth of the values' own rounding.
#pragma once

// The two bytes of a run's weights (positions), and the size of a step.
inline float weights_in_bytes(const Attention& a, int query, int run, size_t tile_bytes, uint8_t* low, uint8_t* high) {
  floats scaled[kSpan / 16], most = {};
  const float* weights = a.scores + size_t(query) * kSpan;
  const int tiles = (a.positions + 15) / 16;
  for (int tile = 0; tile < tiles; ++tile) {
    const floats weight = read<floats>(weights + tile * 16);
    const floats product = weight * halves(reinterpret_cast<const uint16_t*>(a.values + tile * tile_bytes + run * 32));
    scaled[tile] = weight > 0 ? product : weight;
    most = larger(scaled[tile], most);
  }
  const float step = largest_of(most) / 65535.0f;
  const floats inverse = all(step > 1e-30f ? 1 / step : 0.0f);
  for (int tile = 0; tile < tiles; ++tile) {
    const __m512i whole = _mm512_cvtps_epi32(__m512(scaled[tile] * inverse));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(low + tile * 16), _mm512_cvtepi32_epi8(whole));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(high + tile * 16), _mm512_cvtepi32_epi8(_mm512_srli_epi32(whole, 8)));
  }
  return step;
}

// out (N, 32) = weights (N, kSpan) of both bytes times a run of 32 numbers of each position.
template <int N>
inline void mix_run(const uint8_t* numbers, size_t tile_bytes, int head_dim, int positions, const uint8_t* low,
                    const uint8_t* high, const float* steps, float* out, size_t out_stride) {
  __m512i lows[2][N], highs[2][N];
  for (int t = 0; t < N; ++t) {
    lows[0][t] = lows[1][t] = highs[0][t] = highs[1][t] = _mm512_setzero_si512();
  }
  for (int position = 0; position < positions; position += 4) {
    const uint8_t* from = numbers + position / 16 * tile_bytes + size_t(position % 16) * head_dim;
    prefetch(from + kAhead);
    prefetch(from + kAhead + 64);
    const __m512i values[2] = {bytes64(from), bytes64(from + 64)};
#pragma GCC unroll 8
    for (int t = 0; t < N; ++t) {
      const __m512i its_low = _mm512_set1_epi32(read<int32_t>(low + t * kSpan + position));
      const __m512i its_high = _mm512_set1_epi32(read<int32_t>(high + t * kSpan + position));
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        lows[half][t] = _mm512_dpbusd_epi32(lows[half][t], its_low, values[half]);
        highs[half][t] = _mm512_dpbusd_epi32(highs[half][t], its_high, values[half]);
      }
    }
  }
  for (int t = 0; t < N; ++t) {
    for (int half = 0; half < 2; ++half) {  // 255 * 127 * 128 positions in either byte: their sum stays within 31 bits
      const __m512i whole = _mm512_add_epi32(_mm512_slli_epi32(highs[half][t], 8), lows[half][t]);
      write(out + t * out_stride + half * 16, floats(_mm512_cvtepi32_ps(whole)) * all(steps[t]));
    }
  }
}

void mix_by_bytes(const Attention& a, size_t tile_bytes, float* out) {
  constexpr int kMixTile = 6;  // queries whose sums fit the registers
  uint8_t *low = reinterpret_cast<uint8_t*>(a.room), *high = low + size_t(a.count) * kSpan;
  float* steps = a.room + size_t(a.count) * kSpan / 2;
  for (int run = 0; run < a.head_dim / kBlock; ++run) {
    for (int query = 0; query < a.count; ++query) {
      const size_t at = size_t(query) * kSpan;
      steps[query] = weights_in_bytes(a, query, run, tile_bytes, low + at, high + at);
    }
    const uint8_t* numbers = a.values + value_numbers_at(a.head_dim) + run * kBlock * 4;
    in_tiles<kMixTile>(a.count, [&](int query, auto n) {
      const size_t at = size_t(query) * kSpan;
      mix_run<decltype(n)::value>(numbers, tile_bytes, a.head_dim, a.positions, low + at, high + at, steps + query,
                                  out + size_t(query) * a.value_stride + run * kBlock, a.value_stride);
    });
  }
}
