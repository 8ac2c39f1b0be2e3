// Keys and values of one sequence, in float16 or, as Q8_0 has them, in 8 bits with a float16 scale for a run of 32.
//
// They lie span by span of positions: all steps and heads of one, and then those of the next, so that a cache takes the
// memory of what is in it even where pages are large. In a span a head's keys come before its values.
//
// float16: keys in tiles of (head_dim, 16 positions), values position by position, `value_stride` apart.
// 8 bits: both in tiles of 16 positions, all scales before all numbers. A tile of keys is a panel of a matrix in Q8_0
// (kernels.h) whose rows are positions, and multiplied as such. In a tile of values stand the scales (runs, 16
// positions) and then the numbers (4, head_dim, 4 positions): a weighted sum of four positions is one instruction.
#pragma once

#include <cstdint>
#include <cstring>

#include "model.h"

namespace mobilellm {

// A run of 32 numbers that share a scale: pieces of `Bytes` bytes, `Apart` bytes from one to the next.
template <int Bytes, int Apart>
struct Run {
  uint8_t *scale, *numbers;

  void put(const void* its_scale, const void* its_numbers) const {
    std::memcpy(scale, its_scale, 2);
    const uint8_t* from = static_cast<const uint8_t*>(its_numbers);
    for (int i = 0; i < kBlock / Bytes; ++i) std::memcpy(numbers + i * Apart, from + i * Bytes, Bytes);
  }
  void get(uint8_t* to) const {  // as in a file
    std::memcpy(to, scale, 2);
    for (int i = 0; i < kBlock / Bytes; ++i) std::memcpy(to + 2 + i * Bytes, numbers + i * Apart, Bytes);
  }
};
using KeyRun = Run<4, 64>;
using ValueRun = Run<1, 4>;

struct Sequence {
  Sequence(const Model& model, int capacity);

  // Of the span that begins with position index * kSpan.
  uint8_t* keys(int step, int head, int index) const {
    const size_t place = (size_t(index) * steps + step) * kv_heads + head;
    return memory.data() + place * (keys_bytes + values_bytes);
  }
  uint8_t* values(int step, int head, int index) const { return keys(step, head, index) + keys_bytes; }

  // float16. Places of a position's first number; a key's next one stands 16 places on.
  uint16_t* key(int step, int head, int position) const {
    const int at = position % kSpan;
    uint8_t* span_keys = keys(step, head, position / kSpan);
    return reinterpret_cast<uint16_t*>(span_keys) + size_t(at / 16) * head_dim * 16 + at % 16;
  }
  uint16_t* value(int step, int head, int position) const {
    uint8_t* span_values = values(step, head, position / kSpan);
    return reinterpret_cast<uint16_t*>(span_values) + size_t(position % kSpan) * value_stride;
  }

  // 8 bits. A run of a position's numbers.
  KeyRun key_run(int step, int head, int position, int run) const {
    const int at = position % kSpan;
    uint8_t* tile = keys(step, head, position / kSpan) + size_t(at / 16) * tile_bytes;
    return {tile + scales_at(run, kRunBytes) + at % 16 * 2, tile + numbers_at(run, kRunBytes) + at % 16 * 4};
  }
  ValueRun value_run(int step, int head, int position, int run) const {
    const int at = position % kSpan;
    uint8_t* tile = values(step, head, position / kSpan) + size_t(at / 16) * tile_bytes;
    const int number = at % 16 / 4 * head_dim + run * kBlock;
    return {tile + (run * 16 + at % 16) * 2, tile + value_numbers_at(head_dim) + number * 4 + at % 4};
  }

  // Keys and values of the first positions, out and in, in the order step, position, head: numbers in float16, or
  // runs as a file in Q8_0 has them, the scale and 32 bytes.
  void read(int length, uint8_t* keys, uint8_t* values) const;
  void write(int length, const uint8_t* keys, const uint8_t* values);

  Type type;
  int capacity, span, steps, kv_heads, head_dim, value_stride;
  size_t tile_bytes, keys_bytes, values_bytes;  // of 16 positions in 8 bits; of a head's keys and values in a span
  Arena memory;

 private:
  static constexpr int kRunBytes = kPanelRows * kBlock;  // of 16 positions
  static constexpr int kFileRun = 2 + kBlock;            // a scale and 32 bytes

  template <typename Each>
  void in_order(int length, const Each& each) const {
    for (int step = 0; step < steps; ++step) {
      for (int position = 0; position < length; ++position) {
        for (int head = 0; head < kv_heads; ++head) each(step, head, position);
      }
    }
  }
};

}  // namespace mobilellm
