// Attention of a span of positions whose keys and values are in 8 bits. A part of kernels_body.h, and compiled with it
// for every instruction set.
#pragma once

// In 8 bits: 32 numbers of a value times a weight are a scale times 32 whole numbers times that weight.

// A tile is multiplied in less time than memory takes to answer: while keys are, the values are fetched, and while values
// are, the keys that are next.
inline void fetch_tile(const uint8_t* tile, size_t bytes) {
  for (size_t line = 0; line < bytes; line += 64) __builtin_prefetch(tile + line, 0, 2);  // for the second cache
}

// out (count, kSpan) = weights times the scales of run `run`, of all positions of the tiles that are looked at; a
// scale that nobody looks at may be no number.
inline void scale_weights(const Attention& a, int run, size_t tile_bytes, float* out) {
  for (int query = 0; query < a.count; ++query) {
    const float* weights = a.scores + size_t(query) * kSpan;
    const uint8_t* scales = a.values + run * 32;
    for (int i = 0; i < a.positions; i += 16, scales += tile_bytes) {
      for (int at = 0; at < 16; at += kLanes) {
        const floats weight = read<floats>(weights + i + at);
        const floats scaled = weight * halves(reinterpret_cast<const uint16_t*>(scales) + at);
        write(out + size_t(query) * kSpan + i + at, weight > 0 ? scaled : floats{});
      }
    }
  }
}

// out (N, 16) = weights (N, kSpan) times 16 numbers of each position, four of which stand side by side.
template <int N>
inline void mix_bytes_tile(const uint8_t* numbers, size_t tile_bytes, int head_dim, int positions,
                           const float* weights, float* out, size_t out_stride, const uint8_t* next) {
  constexpr int vectors = kPanelRows / kLanes;
  floats sums[vectors][N] = {};
  for (int position = 0; position < positions; position += 4, weights += 4) {
    const uint8_t* from = numbers + position / 16 * tile_bytes + size_t(position % 16) * head_dim;
    if (next && position % 16 == 0) fetch_tile(next + position / 16 * tile_bytes, tile_bytes);
    ints four[vectors];
#pragma GCC unroll 16
    for (int i = 0; i < vectors; ++i) four[i] = read<ints>(from + i * kLanes * 4);
#pragma GCC unroll 4
    for (int place = 0; place < 4; ++place) {
      floats values[vectors];
#pragma GCC unroll 16
      for (int i = 0; i < vectors; ++i) {
        values[i] = __builtin_convertvector((four[i] << (24 - 8 * place)) >> 24, floats);
      }
#pragma GCC unroll 16
      for (int t = 0; t < N; ++t) {
        const floats weight = all(weights[t * kSpan + place]);
#pragma GCC unroll 16
        for (int i = 0; i < vectors; ++i) sums[i][t] = fused(values[i], weight, sums[i][t]);
      }
    }
  }
  for (int t = 0; t < N; ++t) {
    for (int i = 0; i < vectors; ++i) write(out + t * out_stride + i * kLanes, sums[i][t]);
  }
}

inline void mix_bytes(const Attention& a, size_t tile_bytes, float* out) {
  for (int run = 0; run < a.head_dim / kBlock; ++run) {
    scale_weights(a, run, tile_bytes, a.room);
    for (int begin = run * kBlock; begin < (run + 1) * kBlock; begin += kPanelRows) {
      in_tiles<kPlainTile>(a.count, [&](int query, auto n) {
        mix_bytes_tile<decltype(n)::value>(
            a.values + value_numbers_at(a.head_dim) + begin * 4, tile_bytes, a.head_dim, a.positions,
            a.room + size_t(query) * kSpan, out + size_t(query) * a.value_stride + begin, a.value_stride,
            begin || query ? nullptr : a.next);
      });
    }
  }
}

// `product` multiplies a panel in Q8_0, as which 16 positions' keys lie; `mix` is mix_bytes, or what computes the
// same.
template <Product product, void (*mix)(const Attention&, size_t, float*)>
void attend_bytes(const Attention& a, const Partial& partial) {
  const size_t tile_bytes = cache_tile_bytes(a.head_dim);
  const Inputs queries{nullptr, 0, a.rounded};
  for (int tile = 0; tile < a.positions; tile += 16) {
    fetch_tile(a.values + tile / 16 * tile_bytes, tile_bytes);
    product(a.keys + tile / 16 * tile_bytes, a.head_dim, queries, a.first, a.count, a.room);
    for (int query = 0; query < a.count; ++query) {
      __builtin_memcpy(a.scores + size_t(query) * kSpan + tile, a.room + query * 16, 16 * sizeof(float));
    }
  }
  weigh(a, partial);
  mix(a, tile_bytes, partial.out);
}
