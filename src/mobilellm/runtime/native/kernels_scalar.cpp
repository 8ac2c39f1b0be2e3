// The portable kernels: what every other instruction set must agree with.
#include "kernels.h"

namespace mobilellm {
namespace {

constexpr int kLanes = 8, kPlainTile = 4;
typedef float floats __attribute__((vector_size(32)));
typedef int32_t ints __attribute__((vector_size(32)));
typedef uint16_t shorts __attribute__((vector_size(16)));
typedef int8_t chars __attribute__((vector_size(8)));

inline float from_half(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, rest = half & 0x7FFF;
  float value;
  if (rest >= 0x7C00) {  // infinite or no number
    const uint32_t bits = sign | 0x7F800000 | (rest & 0x3FF) << 13;
    __builtin_memcpy(&value, &bits, 4);
    return value;
  }
  const uint32_t bits = rest << 13;  // the exponent is 112 too small, also where it is 0
  __builtin_memcpy(&value, &bits, 4);
  value *= 0x1p112f;
  return sign ? -value : value;
}

inline floats halves(const uint16_t* from) {
  floats values;
  for (int i = 0; i < kLanes; ++i) values[i] = from_half(from[i]);
  return values;
}

inline chars narrowed(ints v) { return __builtin_convertvector(v, chars); }

inline floats fused(floats a, floats b, floats c) { return a * b + c; }

inline uint16_t to_half(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  const uint32_t sign = bits >> 16 & 0x8000, rest = bits & 0x7FFFFFFF;
  if (rest > 0x7F800000) return uint16_t(sign | 0x7E00);
  if (rest >= 0x477FF000) return uint16_t(sign | 0x7C00);  // 65,520 and more round to infinity
  if (rest < 0x38800000) {  // below the smallest normal number: steps of 2^-24
    const float steps = __builtin_fabsf(value) * 0x1p24f + 8388608.0f;  // 2^23: rounds to a whole number
    uint32_t whole;
    __builtin_memcpy(&whole, &steps, 4);
    return uint16_t(sign | (whole - 0x4B000000));
  }
  return uint16_t(sign | (rest - 0x38000000 + 0xFFF + (rest >> 13 & 1)) >> 13);
}

inline shorts halved(floats v) {
  shorts bits;
  for (int i = 0; i < kLanes; ++i) bits[i] = to_half(v[i]);
  return bits;
}

inline floats swapped(floats v) {
  floats pairs;
  for (int i = 0; i < kLanes; ++i) pairs[i] = v[i ^ 1];
  return pairs;
}

#include "kernels_body.h"

struct Eight {
  static int number(const uint8_t* weights, int row, int column) {
    return int8_t(weights[column / 4 * 64 + row * 4 + column % 4]);
  }
  static constexpr int bytes = 512;
};

struct Four {
  static int number(const uint8_t* weights, int row, int column) {
    const int nibbles = weights[column % 16 / 4 * 64 + row * 4 + column % 4];
    return (column < 16 ? nibbles & 15 : nibbles >> 4) - 8;
  }
  static constexpr int bytes = 256;
};

template <typename Kind>
void blocks_product(const uint8_t* panel, int columns, const Inputs& x, int first, int count, float* out) {
  const int blocks = columns / kBlock;
  for (int token = first; token < first + count; ++token) {
    for (int row = 0; row < kPanelRows; ++row) {
      float total = 0;
      for (int block = 0; block < blocks; ++block) {
        const uint8_t* weights = panel + numbers_at(block, Kind::bytes);
        const uint8_t* scales = panel + scales_at(block, Kind::bytes);
        const size_t at = block * x.bytes.tokens + token;
        int32_t whole = 0;
        for (int i = 0; i < kBlock; ++i) whole += Kind::number(weights, row, i) * x.bytes.numbers[at * kBlock + i];
        const float scale = from_half(read<uint16_t>(scales + row * 2));
        total += float(whole) * (scale * x.bytes.scales[at]);
      }
      *out++ = total;
    }
  }
}

}  // namespace

const Kernels* scalar_kernels() {
  static const Kernels kernels = kernels_with("scalar", blocks_product<Eight>, blocks_product<Four>,
                                              attend_bytes<blocks_product<Eight>, mix_bytes>);
  return &kernels;
}

}  // namespace mobilellm
