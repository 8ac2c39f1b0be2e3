// Steps that all passes are made of: preparing a product's inputs, and products shared out between threads.
#pragma once

#include "scratch.h"

namespace mobilellm {

// What every thread runs. All functions here are called by all threads alike, with their own number.
class Pass {
 public:
  Pass(Model& model, Scratch& scratch, int count) : m_(model), s_(scratch), count_(count) {}

 protected:
  const mobilellm_shape& shape() const { return m_.shape; }
  bool few() const { return count_ <= kFewRows; }

  // Inputs of a product, of `source` (count, columns; `stride` floats apart), by way of `norm` where there is
  // one. Many rows are shared out and there is a meeting; few are made by every thread for itself.
  Inputs prepare(int thread, const float* source, size_t stride, int columns, const float* norm, bool bytes) {
    Scratch::Prepared& room = few() ? s_.own[thread].prepared : s_.prepared;
    const size_t wide = padded(columns);
    const auto one = [&](int row) {
      const float* from = source + row * stride;
      if (norm) {
        float* to = room.values.data() + row * wide;
        m_.kernels.norm(from, norm, shape().rms_norm_eps, columns, to);
        from = to;
      }
      if (bytes) {
        const size_t blocks = columns / kBlock;
        m_.kernels.quantise(from, columns, room.bytes.data() + size_t(row) * columns,
                            room.scales.data() + row * blocks, room.sums.data() + row * blocks);
      }
    };
    if (few()) {
      for (int row = 0; row < count_; ++row) one(row);
    } else {
      for (int row = m_.team.take(4); row < count_; row = m_.team.take(4)) {
        for (int each = row; each < row + 4 && each < count_; ++each) one(each);
      }
      m_.team.meet();
    }
    Inputs inputs{source, room.bytes.data(), room.scales.data(), room.sums.data(), stride, size_t(columns), size_t(columns) / kBlock};
    if (norm) inputs.values = room.values.data(), inputs.columns = wide;
    return inputs;
  }

  // Share out `panels` panels and call each(panel, first token, number of tokens); then meet.
  template <typename Each>
  void share(int panels, const Each& each) {
    const int pieces = m_.team.size() * 6;  // evens out what else the processors do, and stays in the cache
    const int chunk = panels > pieces ? panels / pieces : 1;
    for (int first = m_.team.take(chunk); first < panels; first = m_.team.take(chunk)) {
      const int end = first + chunk < panels ? first + chunk : panels;
      for (int token = 0; token < count_; token += kTokenBlock) {
        const int tokens = count_ - token < kTokenBlock ? count_ - token : kTokenBlock;
        for (int panel = first; panel < end; ++panel) each(panel, token, tokens);
      }
    }
    m_.team.meet();
  }

  // out (count, stride) = or += matrix times inputs.
  template <bool Add>
  void multiply(int thread, const Matrix& matrix, const Inputs& x, float* out, size_t stride) {
    const Product product = m_.product(matrix.type);
    float* results = s_.own[thread].first.data();
    share(matrix.panels, [&](int panel, int first, int tokens) {
      product(matrix.panel(panel), matrix.columns, x, first, tokens, results);
      const int row = panel * kPanelRows;
      const int rows = matrix.rows - row < kPanelRows ? matrix.rows - row : kPanelRows;
      for (int t = 0; t < tokens; ++t) {
        float* to = out + size_t(first + t) * stride + row;
        for (int i = 0; i < rows; ++i) to[i] = results[t * kPanelRows + i] + (Add ? to[i] : 0.0f);
      }
    });
  }

  Model& m_;
  Scratch& s_;
  const int count_;
};

}  // namespace mobilellm
