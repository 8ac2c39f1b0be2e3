#include "sequence.h"

#include <new>

namespace mobilellm {

Sequence::Sequence(const Model& model, int capacity_)
    : type(model.cache),
      capacity(capacity_),
      span(capacity < kSpan ? (capacity + 15) / 16 * 16 : kSpan),
      steps(model.shape.num_steps),
      kv_heads(model.shape.num_kv_heads),
      head_dim(model.shape.head_dim),
      value_stride((head_dim + 15) / 16 * 16),
      tile_bytes(cache_tile_bytes(head_dim)) {
  keys_bytes = type == Type::Q8_0 ? span / 16 * tile_bytes : size_t(span) * head_dim * 2;
  values_bytes = type == Type::Q8_0 ? keys_bytes : size_t(span) * value_stride * 2;
  const unsigned __int128 bytes = (unsigned __int128)((capacity - 1) / span + 1) * (keys_bytes + values_bytes) *
                                  unsigned(steps) * unsigned(kv_heads);
  if (bytes >> 46) throw std::bad_alloc();
  memory = Arena(size_t(bytes));
}

void Sequence::read(int length, uint8_t* to_keys, uint8_t* to_values) const {
  in_order(length, [&](int step, int head, int position) {
    if (type == Type::Q8_0) {
      for (int run = 0; run < head_dim / kBlock; ++run, to_keys += kFileRun, to_values += kFileRun) {
        key_run(step, head, position, run).get(to_keys);
        value_run(step, head, position, run).get(to_values);
      }
    } else {
      const uint16_t *from_key = key(step, head, position), *from_value = value(step, head, position);
      for (int i = 0; i < head_dim; ++i, to_keys += 2) std::memcpy(to_keys, from_key + i * 16, 2);
      std::memcpy(to_values, from_value, size_t(head_dim) * 2);
      to_values += size_t(head_dim) * 2;
    }
  });
}

void Sequence::write(int length, const uint8_t* from_keys, const uint8_t* from_values) {
  in_order(length, [&](int step, int head, int position) {
    if (type == Type::Q8_0) {
      for (int run = 0; run < head_dim / kBlock; ++run, from_keys += kFileRun, from_values += kFileRun) {
        key_run(step, head, position, run).put(from_keys, from_keys + 2);
        value_run(step, head, position, run).put(from_values, from_values + 2);
      }
    } else {
      uint16_t *to_key = key(step, head, position), *to_value = value(step, head, position);
      for (int i = 0; i < head_dim; ++i, from_keys += 2) std::memcpy(to_key + i * 16, from_keys, 2);
      std::memcpy(to_value, from_values, size_t(head_dim) * 2);
      from_values += size_t(head_dim) * 2;
    }
  });
}

}  // namespace mobilellm
