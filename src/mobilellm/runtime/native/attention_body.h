// Attention of a span of positions, and putting spans together. A part of kernels_body.h, and compiled with it for
// every instruction set.
#pragma once

// Scores (count, kSpan) become weights e^(score - largest), 0 where a query does not look.
inline void weigh(const Attention& a, const Partial& partial) {
  const int width = (a.positions + 15) / 16 * 16;
  const floats inverse = all(1 / __builtin_sqrtf(float(a.head_dim)));
  for (int query = 0; query < a.count; ++query) {
    float* scores = a.scores + size_t(query) * kSpan;
    const int seen = a.visible[query] < a.positions ? a.visible[query] : a.positions;
    if (seen <= 0) {
      partial.largest[query] = -__builtin_inff();
      partial.total[query] = 0;
      for (int i = 0; i < width; ++i) scores[i] = 0;
      continue;
    }
    for (int i = seen; i < width; ++i) scores[i] = -__builtin_inff();
    floats most = all(-__builtin_inff());
    for (int i = 0; i < width; i += kLanes) most = larger(most, read<floats>(scores + i));
    const floats largest = all(largest_of(most));
    for (int i = 0; i < width; i += kLanes) {
      write(scores + i, exponential((read<floats>(scores + i) - largest) * inverse));
    }
    for (int i = seen; i < width; ++i) scores[i] = 0;
    floats total = {};
    for (int i = 0; i < width; i += kLanes) total += read<floats>(scores + i);
    partial.largest[query] = largest[0] * inverse[0];
    partial.total[query] = sum(total);
  }
}

// out (count, value_stride) = scores (count, positions) times values. Few queries take whole positions as they
// lie in memory, many take 16 numbers of each: what their sums leave registers for.
inline void mix(const Attention& a, float* out) {
  const uint16_t* values = reinterpret_cast<const uint16_t*>(a.values);
  in_tiles<kPlainTile>(a.count, [&](int query, auto n) {
    constexpr int N = decltype(n)::value, Most = kPlainTile / N < 4 ? kPlainTile / N : 4;
    const float* scores = a.scores + size_t(query) * kSpan;
    const auto weight = [&](int q, int position) { return scores[q * kSpan + position]; };
    int done = 0;
    for (; done + Most * kPanelRows <= a.value_stride; done += Most * kPanelRows) {
      plain_tile<F16, N, Most>(values + done, a.value_stride, a.positions, weight,
                               out + size_t(query) * a.value_stride + done, a.value_stride);
    }
    for (; done < a.value_stride; done += kPanelRows) {
      plain_tile<F16, N, 1>(values + done, a.value_stride, a.positions, weight,
                            out + size_t(query) * a.value_stride + done, a.value_stride);
    }
  });
}

void attend(const Attention& a, const Partial& partial) {
  for (int tile = 0; tile < a.positions; tile += 16) {
    in_tiles<kPlainTile>(a.count, [&](int query, auto n) {
      const uint16_t* keys = reinterpret_cast<const uint16_t*>(a.keys) + size_t(tile) * a.head_dim;
      plain_tile<F16, decltype(n)::value, 1>(
          keys, 16, a.head_dim,
          [&](int q, int number) { return a.queries[size_t(query + q) * a.head_dim + number]; },
          a.scores + size_t(query) * kSpan + tile, kSpan);
    });
  }
  weigh(a, partial);
  mix(a, partial.out);
}

void merge(const Partial& into, const Partial& part, int count, int value_stride) {
  for (int query = 0; query < count; ++query) {
    if (part.total[query] == 0) continue;
    const float old = into.largest[query], found = part.largest[query];
    const float largest = found > old ? found : old;
    const floats factors = exponential(floats{old - largest, found - largest});
    const floats keep = all(into.total[query] == 0 ? 0 : factors[0]), add = all(factors[1]);
    float* out = into.out + size_t(query) * value_stride;
    const float* more = part.out + size_t(query) * value_stride;
    for (int i = 0; i < value_stride; i += kLanes) {
      write(out + i, fused(read<floats>(more + i), add, read<floats>(out + i) * keep));
    }
    into.largest[query] = largest;
    into.total[query] = into.total[query] * keep[0] + part.total[query] * add[0];
  }
}
