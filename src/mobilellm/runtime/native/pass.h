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
    const Bytes in_bytes = room.rounded.bytes(count_);
    const auto one = [&](int row) {
      const float* from = source + row * stride;
      if (norm) {
        float* to = room.values.data() + row * wide;
        m_.kernels.norm(from, norm, shape().rms_norm_eps, columns, to);
        from = to;
      }
      if (bytes) m_.kernels.quantise(from, columns, row, in_bytes);
    };
    if (few()) {
      for (int row = 0; row < count_; ++row) one(row);
    } else {
      for (Shares shares(m_.team, thread, count_, 4); shares.next();) {
        for (int row = shares.first; row < shares.end; ++row) one(row);
      }
      m_.team.meet(thread);
    }
    if (norm) return {room.values.data(), wide, in_bytes};
    return {source, stride, in_bytes};
  }

  // Share out `panels` panels and call each(panel, first token, number of tokens); then meet.
  template <typename Each>
  void share(int thread, int panels, const Each& each) {
    const int pieces = m_.team.size() * 6;  // of many tokens' work; a piece's panels stay in the second cache
    const int chunk = few() || panels < pieces ? 1 : panels / pieces;
    for (Shares shares(m_.team, thread, panels, chunk); shares.next();) {
      for (int token = 0; token < count_; token += kTokenBlock) {
        const int tokens = count_ - token < kTokenBlock ? count_ - token : kTokenBlock;
        for (int panel = shares.first; panel < shares.end; ++panel) each(panel, token, tokens);
      }
    }
    m_.team.meet(thread);
  }

  // What a product fetches ahead: of a single token, or few, nothing but what follows, which it does by itself; of
  // many, whose panels are read once and used for long, the next panel.
  const uint8_t* ahead(const Matrix& matrix, int panel, int first) const {
    return few() || first || panel + 1 == matrix.panels ? nullptr : matrix.panel(panel + 1);
  }

  // out (count, stride) = or += matrix times inputs.
  template <bool Add>
  void multiply(int thread, const Matrix& matrix, const Inputs& x, float* out, size_t stride) {
    const Product product = m_.product(matrix.type);
    float* results = s_.own[thread].first.data();
    share(thread, matrix.panels, [&](int panel, int first, int tokens) {
      product(matrix.panel(panel), matrix.columns, x, first, tokens, results, ahead(matrix, panel, first));
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
