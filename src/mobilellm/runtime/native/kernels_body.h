// The functions that are written once, in the compiler's vectors of kLanes numbers (4, 8 or 16), and compiled for
// every instruction set. The including file has defined, in its own unnamed namespace: kLanes; kTile and
// kPlainTile, the tokens whose sums fit the registers, of matrices in blocks and of others; floats, ints,
// shorts and chars, kLanes of each; halves (float16 as floats), halved (the reverse, to the nearest, halves to
// even), narrowed (ints as chars), swapped (the numbers of every pair), fused (a * b + c). Nothing here may be visible outside the including file: two files' versions of one name would be
// merged into one, for one of the processors.
#pragma once

template <typename T>
inline T read(const void* from) {
  T value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

inline void write(void* to, floats value) { __builtin_memcpy(to, &value, sizeof value); }

inline floats all(float value) { return value - floats{}; }  // a minus keeps -0

inline floats larger(floats a, floats b) { return a > b ? a : b; }

// The numbers of a vector put together: half with half until one is left. A file with better means has its own
// sum and largest_of.
template <typename Vector, typename Join>
inline auto folded(Vector v, const Join& join) {
  decltype(v[0] + 0) lanes[kLanes];
  __builtin_memcpy(lanes, &v, sizeof v);
#pragma GCC unroll 4
  for (int half = kLanes / 2; half; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) lanes[i] = join(lanes[i], lanes[i + half]);
  }
  return lanes[0];
}

template <typename Vector>
inline auto sum(Vector v) {
  return folded(v, [](auto a, auto b) { return a + b; });
}

template <typename Vector>
inline auto largest_of(Vector v) {
  return folded(v, [](auto a, auto b) { return a > b ? a : b; });
}

// e^x: 2^n times the series of e^r, r within half a doubling; a relative error of about 1e-7.
inline floats exponential(floats x) {
  const floats lowest = all(-87.0f), highest = all(88.0f), round = all(12582912.0f);  // 1.5 * 2^23
  x = x < lowest ? lowest : x;
  x = x > highest ? highest : x;
  const floats n = fused(x, all(1.44269504f), round) - round;
  floats r = fused(n, all(-0.693359375f), x);  // ln 2 in two parts, the first exact in few bits
  r = fused(n, all(2.12194440e-4f), r);
  floats series = all(1.0f / 5040);
  series = fused(series, r, all(1.0f / 720));
  series = fused(series, r, all(1.0f / 120));
  series = fused(series, r, all(1.0f / 24));
  series = fused(series, r, all(1.0f / 6));
  series = fused(series, r, all(0.5f));
  series = fused(series, r, all(1.0f));
  series = fused(series, r, all(1.0f));
  const ints bits = (__builtin_convertvector(n, ints) + 127) << 23;
  return series * read<floats>(&bits);
}

template <int N>
struct Count {
  static constexpr int value = N;
};

// Tiles of N tokens while there are as many, then smaller ones.
template <int N, typename Tile>
inline void in_tiles(int count, const Tile& tile, int done = 0) {
  for (; done + N <= count; done += N) tile(done, Count<N>{});
  if constexpr (N > 1) in_tiles<(N > 8 ? N / 2 : N - 1)>(count, tile, done);
}

struct F32 {
  using Number = float;
  static floats some(const float* from) { return read<floats>(from); }
};
struct F16 {
  using Number = uint16_t;
  static floats some(const uint16_t* from) { return halves(from); }
};
struct BF16 {
  using Number = uint16_t;
  static floats some(const uint16_t* from) {
    const ints bits = __builtin_convertvector(read<shorts>(from), ints) << 16;
    return read<floats>(&bits);
  }
};

// out (N, Panels * 16) = panels side by side, a column (Panels * 16) every `stride` numbers, times x(token,
// column).
template <typename Kind, int N, int Panels, typename Input>
inline void plain_tile(const typename Kind::Number* panel, size_t stride, int columns, const Input& x, float* out,
                       size_t out_stride, const uint8_t* ahead = nullptr) {
  constexpr int vectors = Panels * kPanelRows / kLanes;
  floats sums[vectors][N] = {};
  constexpr int bytes = int(kPanelRows * sizeof(typename Kind::Number));
  for (int column = 0; column < columns; ++column, panel += stride) {
    if (N == 1 && ahead && column * bytes % 64 == 0) __builtin_prefetch(ahead + size_t(column) * bytes, 0, 2);
    floats w[vectors];
#pragma GCC unroll 16
    for (int i = 0; i < vectors; ++i) w[i] = Kind::some(panel + i * kLanes);
#pragma GCC unroll 16
    for (int t = 0; t < N; ++t) {
      const floats value = all(x(t, column));
#pragma GCC unroll 16
      for (int i = 0; i < vectors; ++i) sums[i][t] = fused(w[i], value, sums[i][t]);
    }
  }
  for (int t = 0; t < N; ++t) {
    for (int i = 0; i < vectors; ++i) write(out + t * out_stride + i * kLanes, sums[i][t]);
  }
}

template <typename Kind>
void plain_product(const uint8_t* panel, int columns, const Inputs& x, int first, int count, float* out) {
  in_tiles<kPlainTile>(count, [&](int t, auto n) {
    const float* values = x.values + (first + t) * x.columns;
    plain_tile<Kind, decltype(n)::value, 1>(
        reinterpret_cast<const typename Kind::Number*>(panel), kPanelRows, columns,
        [&](int token, int column) { return values[token * x.columns + column]; }, out + t * kPanelRows, kPanelRows,
        t ? nullptr : x.ahead);
  });
}

void norm(const float* x, const float* weight, float epsilon, int count, float* out) {
  floats squares = {};
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) squares = fused(read<floats>(x + i), read<floats>(x + i), squares);
  float total = sum(squares);
  for (; i < count; ++i) total += x[i] * x[i];
  const float root = __builtin_sqrtf(total / float(count) + epsilon);
  for (i = 0; i + kLanes <= count; i += kLanes) {
    write(out + i, read<floats>(x + i) / all(root) * read<floats>(weight + i));
  }
  for (; i < count; ++i) out[i] = x[i] / root * weight[i];
}

inline void quantise_one(const float* x, int columns, int token, const Bytes& bytes) {
  const floats round = all(12582912.0f);  // adding 1.5 * 2^23 rounds to a whole number, halves to even
  const auto [numbers, scales, negated, tokens] = bytes;  // a copy: bytes that are written might be anything's
  size_t at = size_t(token);
  for (int done = 0; done < columns; done += kBlock, x += kBlock, at += tokens) {
    ints largest = {};  // of bits as whole numbers: infinity's are more than any number's, and those of no number still more
    for (int i = 0; i < kBlock; i += kLanes) {
      const ints magnitude = read<ints>(x + i) & 0x7FFFFFFF;
      largest = magnitude > largest ? magnitude : largest;
    }
    const int32_t bits = largest_of(largest);
    const float scale = read<float>(&bits) / 127.0f;
    const floats inverse = all(scale > 1e-30f ? 1 / scale : 0.0f);  // infinite for the smallest
    ints total = {};
    for (int i = 0; i < kBlock; i += kLanes) {
      const floats rounded = read<floats>(x + i) * inverse + round;
      const ints whole = read<ints>(&rounded) - 0x4B400000;  // the bits of 1.5 * 2^23
      const chars narrow = narrowed(whole);
      __builtin_memcpy(numbers + at * kBlock + i, &narrow, sizeof narrow);
      total -= __builtin_convertvector(narrow, ints);  // bounded whatever x was, where `whole` is not
    }
    scales[at] = scale + (scale - scale);  // no number where it is infinite: bytes say nothing of the rest
    negated[at] = sum(total);
  }
}

void quantise(const float* x, int columns, int first, int tokens, const Bytes& bytes) {
  for (int token = 0; token < tokens; ++token) quantise_one(x + size_t(token) * columns, columns, first + token, bytes);
}

void gate(const float* gate, const float* up, int tokens, float* out, size_t stride) {
  for (int token = 0; token < tokens; ++token, gate += kPanelRows, up += kPanelRows, out += stride) {
#pragma GCC unroll 4
    for (int i = 0; i < kPanelRows; i += kLanes) {
      const floats x = read<floats>(gate + i);
      write(out + i, x / (all(1) + exponential(-x)) * read<floats>(up + i));
    }
  }
}

void add(const float* x, int tokens, float* out, size_t stride) {
  for (int token = 0; token < tokens; ++token, x += kPanelRows, out += stride) {
#pragma GCC unroll 4
    for (int i = 0; i < kPanelRows; i += kLanes) write(out + i, read<floats>(x + i) + read<floats>(out + i));
  }
}

void rotate(float* x, int tokens, const float* cosines, const float* sines, size_t stride) {
  for (int token = 0; token < tokens; ++token, x += kPanelRows, cosines += stride, sines += stride) {
#pragma GCC unroll 4
    for (int i = 0; i < kPanelRows; i += kLanes) {
      const floats value = read<floats>(x + i);
      write(x + i, value * read<floats>(cosines + i) + swapped(value) * read<floats>(sines + i));
    }
  }
}

#include "attention_body.h"
#include "attention_bytes_body.h"

void halve(const float* x, int tokens, uint16_t* out) {
  for (int i = 0; i < tokens * kPanelRows; i += kLanes) {
    const shorts some = halved(read<floats>(x + i));
    __builtin_memcpy(out + i, &some, sizeof some);
  }
}

// The table of an instruction set, whose products with blocks are its own.
inline Kernels kernels_with(const char* name, Product q8_0, Product q4_0, Attend attend_q8_0) {
  return {name, plain_product<F32>, plain_product<F16>, plain_product<BF16>, q8_0, q4_0,
          norm, quantise, gate, add, rotate, attend, attend_q8_0, merge, halve};
}
