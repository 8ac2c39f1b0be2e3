// A model in memory: all matrices in one arena, in the order in which a token reads them.
#pragma once

#include <cstdint>
#include <vector>

#include "engine.h"
#include "kernels.h"
#include "threads.h"

namespace mobilellm {

// One allocation that begins as zeros, on huge pages if the system has them: reading a model crosses tens of
// thousands of small ones for every token. What has never been written takes no memory.
class Arena {
 public:
  Arena() = default;
  explicit Arena(size_t bytes);  // throws std::bad_alloc
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  Arena& operator=(Arena&& other) noexcept;

  uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  void* mapped_ = nullptr;
  size_t mapped_size_ = 0, size_ = 0;
  uint8_t* data_ = nullptr;
};

struct Matrix {
  Type type;
  int rows, columns, panels;
  uint8_t* data;
  size_t panel_bytes;  // of one panel, a multiple of 64
  size_t stride;       // from one panel to the next: gate's and up's panels take turns

  const uint8_t* panel(int index) const { return data + size_t(index) * stride; }
};

struct Block {
  Matrix q, k, v, output, gate, up, down;
  const float *attention_norm, *feed_forward_norm;
};

struct Model {
  Model(const mobilellm_shape& shape, const int32_t* schedule, const mobilellm_tensor* tensors, const float* norms,
        int threads, const Kernels& kernels, Type cache);
  // Bring a piece of a block, or of the head where part = num_layers, from the file's order into panels.
  void fill(int part, int piece, int pieces);
  // One row of the embedding.
  void embed(int32_t token, float* out) const;
  Product product(Type type) const;

  mobilellm_shape shape;
  const Kernels& kernels;
  const Type cache;  // of keys and values: F16 or Q8_0
  std::vector<int32_t> schedule;
  std::vector<float> norms;
  std::vector<double> frequencies;  // (head_dim / 2): a position is divided by them
  std::vector<mobilellm_tensor> tensors;
  std::vector<Block> blocks;
  Matrix head;
  Arena arena;
  Team team;

 private:
  size_t lay_out(uint8_t* data);  // the size of all
};

}  // namespace mobilellm
