// Values in 8 bits times weights by whole-number products, in place of mix_bytes: for processors that multiply and add
// four positions' signed bytes and unsigned ones in one instruction. The including file has defined, after
// kernels_body.h: dot (sums of ints plus unsigned bytes times signed ones, by fours); nearest (floats as ints);
// write_bytes (four registers of ints below 2^16 packed into one of their low bytes, and one of their high ones); and
// kMixTile, the queries whose sums fit the registers.
//
// Weights times their values' scales are whole numbers below 2^16, in steps of a 65,535th of the largest of the query's
// span, in two bytes whose products are summed apart: what is lost is a 500th of the values' own rounding.
#pragma once

constexpr int kPacked = 4 * kLanes;  // positions whose weights' bytes fill a register

// Where the bytes of positions position ... position + 3 stand in a row of kSpan: as four registers of kLanes numbers
// come out when they are packed into one.
inline int packed_at(int position) {
  return position / kPacked * kPacked + position % kLanes * 4 + position % kPacked / kLanes * 4;
}

// The two bytes of a query's weights (kSpan each), which are weights times scales, and the size of a step. Where a query
// does not look, a scale may be no number; beyond the positions that are looked at, anything may stand for a weight and
// scales are 0.
inline float weights_in_bytes(const float* weights, const floats* scales, uint8_t* low, uint8_t* high) {
  floats scaled[kSpan / kLanes], most = {};
#pragma GCC unroll 16
  for (int i = 0; i < kSpan / kLanes; ++i) {
    const floats weight = read<floats>(weights + i * kLanes), product = weight * scales[i];
    scaled[i] = weight > 0 ? product : floats{};
    most = larger(scaled[i], most);
  }
  const float step = largest_of(most) / 65535.0f;
  const floats inverse = all(step > 1e-30f ? 1 / step : 0.0f);
#pragma GCC unroll 4
  for (int i = 0; i < kSpan / kLanes; i += 4) {
    ints whole[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) whole[k] = nearest(scaled[i + k] * inverse);
    write_bytes(whole, low + i * kLanes, high + i * kLanes);
  }
  return step;
}

// out (N, 2 * kLanes) = weights (N, kSpan) of both bytes times as many numbers of each position.
template <int N>
inline void mix_numbers(const uint8_t* numbers, size_t tile_bytes, int head_dim, int positions, const uint8_t* low,
                        const uint8_t* high, const float* steps, float* out, size_t out_stride, const uint8_t* next) {
  ints lows[2][N] = {}, highs[2][N] = {};
  for (int tile = 0; tile * 16 < positions; ++tile, numbers += tile_bytes) {
    if (next) fetch_tile(next + tile * tile_bytes, tile_bytes);
#pragma GCC unroll 4
    for (int four = 0; four < 4; ++four) {
      const uint8_t* from = numbers + size_t(four) * 4 * head_dim;
      const ints values[2] = {read<ints>(from), read<ints>(from + 4 * kLanes)};
      const int packed = packed_at(tile * 16 + four * 4);
#pragma GCC unroll 8
      for (int t = 0; t < N; ++t) {
        const size_t at = size_t(t) * kSpan + packed;
        const ints its_low = read<int32_t>(low + at) - ints{}, its_high = read<int32_t>(high + at) - ints{};
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          lows[half][t] = dot(lows[half][t], its_low, values[half]);
          highs[half][t] = dot(highs[half][t], its_high, values[half]);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < N; ++t) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {  // either byte's sum is below 255 * 128 * kSpan: both stay within 31 bits
      const floats whole = __builtin_convertvector((highs[half][t] << 8) + lows[half][t], floats);
      write(out + t * out_stride + half * kLanes, whole * all(steps[t]));
    }
  }
}

void mix_by_bytes(const Attention& a, size_t tile_bytes, float* out) {
  uint8_t *low = reinterpret_cast<uint8_t*>(a.room), *high = low + size_t(a.count) * kSpan;
  float* steps = a.room + size_t(a.count) * kSpan / 2;
  const int tiles = (a.positions + 15) / 16;
  for (int run = 0; run < a.head_dim / kBlock; ++run) {
    floats scales[kSpan / kLanes] = {};
    for (int i = 0; i < tiles * 16 / kLanes; ++i) {
      const uint8_t* tile = a.values + i * kLanes / 16 * tile_bytes;
      scales[i] = halves(reinterpret_cast<const uint16_t*>(tile + run * 32) + i * kLanes % 16);
    }
    for (int query = 0; query < a.count; ++query) {
      const size_t at = size_t(query) * kSpan;
      steps[query] = weights_in_bytes(a.scores + at, scales, low + at, high + at);
    }
    for (int begin = run * kBlock; begin < (run + 1) * kBlock; begin += 2 * kLanes) {
      const uint8_t* numbers = a.values + value_numbers_at(a.head_dim) + begin * 4;
      in_tiles<kMixTile>(a.count, [&](int query, auto n) {
        const size_t at = size_t(query) * kSpan;
        mix_numbers<decltype(n)::value>(numbers, tile_bytes, a.head_dim, a.positions, low + at, high + at, steps + query,
                                        out + size_t(query) * a.value_stride + begin, a.value_stride,
                                        begin || query ? nullptr : a.next);
      });
    }
  }
}
