// The functions that are written once, in the compiler's vectors of eight numbers, and compiled for every
// instruction set. The including file has defined, in its own unnamed namespace: f32x8, halves (eight
// float16 as f32x8), narrowed (i32x8 as i8x8), fused (a * b + c), to_half. Nothing here may be visible outside
// the including file: two files' versions of one name would be merged into one, for one of the processors.
#pragma once

template <typename T>
inline T read(const void* from) {
  T value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

inline void write(void* to, f32x8 value) { __builtin_memcpy(to, &value, sizeof value); }

inline f32x8 all(float value) { return f32x8{value, value, value, value, value, value, value, value}; }

inline f32x8 larger(f32x8 a, f32x8 b) { return a > b ? a : b; }

inline float sum(f32x8 v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

// e^x: 2^n times the series of e^r, r within half a doubling; a relative error of about 1e-7.
inline f32x8 exponential(f32x8 x) {
  const f32x8 lowest = all(-87.0f), highest = all(88.0f), round = all(12582912.0f);  // 1.5 * 2^23
  x = x < lowest ? lowest : x;
  x = x > highest ? highest : x;
  const f32x8 n = fused(x, all(1.44269504f), round) - round;
  f32x8 r = fused(n, all(-0.693359375f), x);  // ln 2 in two parts, the first exact in few bits
  r = fused(n, all(2.12194440e-4f), r);
  f32x8 series = all(1.0f / 5040);
  series = fused(series, r, all(1.0f / 720));
  series = fused(series, r, all(1.0f / 120));
  series = fused(series, r, all(1.0f / 24));
  series = fused(series, r, all(1.0f / 6));
  series = fused(series, r, all(0.5f));
  series = fused(series, r, all(1.0f));
  series = fused(series, r, all(1.0f));
  const i32x8 bits = (__builtin_convertvector(n, i32x8) + 127) << 23;
  return series * read<f32x8>(&bits);
}

template <int N>
struct Count {
  static constexpr int value = N;
};

// Tiles of four tokens, and one of the rest.
template <typename Tile>
inline void in_tiles(int count, const Tile& tile) {
  int done = 0;
  for (; done + 4 <= count; done += 4) tile(done, Count<4>{});
  if (count - done == 3) tile(done, Count<3>{});
  if (count - done == 2) tile(done, Count<2>{});
  if (count - done == 1) tile(done, Count<1>{});
}

struct F32 {
  using Number = float;
  static f32x8 eight(const float* from) { return read<f32x8>(from); }
};
struct F16 {
  using Number = uint16_t;
  static f32x8 eight(const uint16_t* from) { return halves(from); }
};
struct BF16 {
  using Number = uint16_t;
  static f32x8 eight(const uint16_t* from) {
    const i32x8 bits = __builtin_convertvector(read<u16x8>(from), i32x8) << 16;
    return read<f32x8>(&bits);
  }
};

// out (N, 16 ...) = panel (columns, 16; a column every `stride` numbers) times x (N, columns).
template <typename Kind, int N>
inline void plain_tile(const typename Kind::Number* panel, size_t stride, int columns, const float* x,
                       size_t x_stride, float* out, size_t out_stride) {
  f32x8 low[N] = {}, high[N] = {};
  for (int column = 0; column < columns; ++column, panel += stride) {
    const f32x8 first = Kind::eight(panel), second = Kind::eight(panel + 8);
    for (int t = 0; t < N; ++t) {
      const f32x8 value = all(x[t * x_stride + column]);
      low[t] = fused(first, value, low[t]);
      high[t] = fused(second, value, high[t]);
    }
  }
  for (int t = 0; t < N; ++t) write(out + t * out_stride, low[t]), write(out + t * out_stride + 8, high[t]);
}

template <typename Kind>
inline void plain_tiles(const typename Kind::Number* panel, size_t stride, int columns, const float* x,
                        size_t x_stride, int count, float* out, size_t out_stride) {
  in_tiles(count, [&](int t, auto n) {
    plain_tile<Kind, decltype(n)::value>(panel, stride, columns, x + t * x_stride, x_stride,
                                         out + t * out_stride, out_stride);
  });
}

template <typename Kind>
void plain_product(const uint8_t* panel, int columns, const Inputs& x, int first, int count, float* out) {
  plain_tiles<Kind>(reinterpret_cast<const typename Kind::Number*>(panel), kPanelRows, columns,
                    x.values + first * x.columns, x.columns, count, out, kPanelRows);
}

void norm(const float* x, const float* weight, float epsilon, int count, float* out) {
  f32x8 squares = {};
  int i = 0;
  for (; i + 8 <= count; i += 8) squares = fused(read<f32x8>(x + i), read<f32x8>(x + i), squares);
  float total = sum(squares);
  for (; i < count; ++i) total += x[i] * x[i];
  const float root = __builtin_sqrtf(total / float(count) + epsilon);
  for (i = 0; i + 8 <= count; i += 8) write(out + i, read<f32x8>(x + i) / all(root) * read<f32x8>(weight + i));
  for (; i < count; ++i) out[i] = x[i] / root * weight[i];
}

void quantise(const float* x, int count, int8_t* bytes, float* scales, int32_t* sums) {
  const f32x8 round = all(12582912.0f);  // adding 1.5 * 2^23 rounds to a whole number, halves to even
  for (int block = 0; block < count / kBlock; ++block, x += kBlock, bytes += kBlock) {
    f32x8 largest = {};
    for (int i = 0; i < kBlock; i += 8) {
      const f32x8 value = read<f32x8>(x + i);
      largest = larger(largest, larger(value, -value));
    }
    float most = largest[0];
    for (int i = 1; i < 8; ++i) most = largest[i] > most ? largest[i] : most;
    const float scale = most / 127.0f;
    const f32x8 inverse = all(scale != 0 ? 1 / scale : 0.0f);
    i32x8 total = {};
    for (int i = 0; i < kBlock; i += 8) {
      const f32x8 rounded = read<f32x8>(x + i) * inverse + round;
      const i32x8 whole = read<i32x8>(&rounded) - 0x4B400000;  // the bits of 1.5 * 2^23
      const i8x8 narrow = narrowed(whole);
      __builtin_memcpy(bytes + i, &narrow, 8);
      total += __builtin_convertvector(narrow, i32x8);  // bounded whatever x was, where `whole` is not
    }
    scales[block] = scale;
    sums[block] = 0;
    for (int i = 0; i < 8; ++i) sums[block] += total[i];
  }
}

void gate(const float* gate, const float* up, int count, float* out) {
  for (int i = 0; i < count; i += 8) {
    const f32x8 x = read<f32x8>(gate + i);
    write(out + i, x / (all(1) + exponential(-x)) * read<f32x8>(up + i));
  }
}

void attend(const Attention& a, const Partial& partial) {
  const int span = a.end - a.start, width = (span + 15) / 16 * 16;
  for (int tile = 0; tile < width; tile += 16) {
    plain_tiles<F16>(a.keys + size_t(a.start + tile) * a.head_dim, 16, a.head_dim, a.queries, a.head_dim,
                     a.count, a.scores + tile, width);
  }
  const float scale = __builtin_sqrtf(float(a.head_dim));
  for (int query = 0; query < a.count; ++query) {
    float* scores = a.scores + size_t(query) * width;
    const int seen = a.visible[query] - a.start < span ? a.visible[query] - a.start : span;
    if (seen <= 0) {
      partial.largest[query] = -__builtin_inff();
      partial.total[query] = 0;
      for (int i = 0; i < width; ++i) scores[i] = 0;
      continue;
    }
    for (int i = seen; i < width; ++i) scores[i] = -__builtin_inff();
    f32x8 most = all(-__builtin_inff());
    for (int i = 0; i < width; i += 8) {
      const f32x8 scaled = read<f32x8>(scores + i) / all(scale);
      write(scores + i, scaled);
      most = larger(most, scaled);
    }
    float largest = most[0];
    for (int i = 1; i < 8; ++i) largest = most[i] > largest ? most[i] : largest;
    f32x8 total = {};
    for (int i = 0; i < width; i += 8) {
      const f32x8 weight = exponential(read<f32x8>(scores + i) - all(largest));
      write(scores + i, weight);
    }
    for (int i = seen; i < width; ++i) scores[i] = 0;
    for (int i = 0; i < width; i += 8) total += read<f32x8>(scores + i);
    partial.largest[query] = largest;
    partial.total[query] = sum(total);
  }
  for (int part = 0; part < a.value_stride; part += 16) {
    plain_tiles<F16>(a.values + size_t(a.start) * a.value_stride + part, a.value_stride, span, a.scores, width,
                     a.count, partial.out + part, a.value_stride);
  }
}

void merge(const Partial& into, const Partial& part, int count, int value_stride) {
  for (int query = 0; query < count; ++query) {
    if (part.total[query] == 0) continue;
    const float old = into.largest[query], found = part.largest[query];
    const float largest = found > old ? found : old;
    const f32x8 factors = exponential(f32x8{old - largest, found - largest});
    const f32x8 keep = all(into.total[query] == 0 ? 0 : factors[0]), add = all(factors[1]);
    float* out = into.out + size_t(query) * value_stride;
    const float* more = part.out + size_t(query) * value_stride;
    for (int i = 0; i < value_stride; i += 8) {
      write(out + i, fused(read<f32x8>(more + i), add, read<f32x8>(out + i) * keep));
    }
    into.largest[query] = largest;
    into.total[query] = into.total[query] * keep[0] + part.total[query] * add[0];
  }
}
