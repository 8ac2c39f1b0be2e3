// Steps that all passes are made of: preparing a product's inputs, and products shared out between threads.
#pragma once

#include "scratch.h"

namespace mobilellm {

// Rows that go from one product to the next together.
struct Part {
  int first, count;
  bool shared;  // by all threads, who share out a product's panels and meet after it; else one has it for itself
};

// What every thread runs. All functions here are called by all threads alike, with their own number, and those that
// are given a part that is not shared by its thread alone.
class Pass {
 public:
  Pass(Model& model, Scratch& scratch, int count) : m_(model), s_(scratch), count_(count) {}

 protected:
  const mobilellm_shape& shape() const { return m_.shape; }
  bool few() const { return count_ <= kFewRows; }

  // Call each(part) for all rows; then meet. Many rows are shared out, so that what a thread makes of them stays in its
  // own caches from product to product, and nobody waits in between; of fewer, each product's panels are.
  template <typename Each>
  void by_parts(int thread, const Each& each) {
    const int threads = m_.team.size();
    if (count_ < threads * kOwnRows) return each(Part{0, count_, true});
    const int parts = threads * ((count_ - 1) / (threads * kTokenBlock) + 1);
    for (Shares shares(m_.team, thread, parts, 1); shares.next();) {
      const int first = count_ * shares.first / parts, end = count_ * shares.end / parts;
      each(Part{first, end - first, false});
    }
    m_.team.meet(thread);
  }

  // Inputs of a product, of a part's rows of `source` (columns; `stride` floats apart), by way of `norm` where there
  // is one. Few rows are made by every thread for itself; more, if they are shared, are shared out and there is a
  // meeting.
  Inputs prepare(int thread, const Part& part, const float* source, size_t stride, int columns, const float* norm,
                 bool bytes) {
    const bool alone = few() || !part.shared;
    Scratch::Prepared& room = alone ? s_.own[thread].inputs : s_.inputs;
    const size_t wide = padded(columns);
    const Bytes in_bytes = room.rounded.bytes(part.count);
    source += part.first * stride;
    const auto one = [&](int row) {
      const float* from = source + row * stride;
      if (norm) {
        float* to = room.values.data() + row * wide;
        m_.kernels.norm(from, norm, shape().rms_norm_eps, columns, to);
        from = to;
      }
      if (bytes) m_.kernels.quantise(from, columns, row, 1, in_bytes);
    };
    if (alone) {
      for (int row = 0; row < part.count; ++row) one(row);
    } else {
      for (Shares shares(m_.team, thread, part.count, 4); shares.next();) {
        for (int row = shares.first; row < shares.end; ++row) one(row);
      }
      m_.team.meet(thread);
    }
    if (norm) return {room.values.data(), wide, in_bytes};
    return {source, stride, in_bytes};
  }

  // Call each(panel, first row within the part, number of rows) for all panels and rows of a part.
  template <typename Each>
  void share(int thread, const Part& part, int panels, const Each& each) {
    if (!part.shared) {
      for (int panel = 0; panel < panels; ++panel) each(panel, 0, part.count);
      return;
    }
    const int pieces = m_.team.size() * 6;  // of many rows' work; a piece's panels stay in the second cache
    const int chunk = few() || panels < pieces ? 1 : panels / pieces;
    for (Shares shares(m_.team, thread, panels, chunk, few()); shares.next();) {
      for (int row = 0; row < part.count; row += kTokenBlock) {
        const int rows = part.count - row < kTokenBlock ? part.count - row : kTokenBlock;
        for (int panel = shares.first; panel < shares.end; ++panel) each(panel, row, rows);
      }
    }
    m_.team.meet(thread);
  }

  // One panel's product. Meanwhile a panel of `next`, a matrix that is read after this one, is fetched; without one, of more
  // rows than a few, what lies after the panel: memory does not keep up with that by itself. (Few rows' products are
  // over before it has answered.)
  void product(const Matrix& matrix, int panel, Inputs x, int first, int tokens, float* results, const Matrix* next) {
    if (!few()) x.ahead = matrix.panel(panel) + matrix.panel_bytes;
    if (next && next->type == matrix.type && next->columns == matrix.columns) x.ahead = next->panel(panel);
    m_.product(matrix.type)(matrix.panel(panel), matrix.columns, x, first, tokens, results);
  }

  // Some numbers of a panel: all of them, nearly always.
  template <typename Number>
  static void copy(const Number* from, int count, Number* to) {
    if (count == kPanelRows) {
      std::memcpy(to, from, kPanelRows * sizeof(Number));
    } else {
      std::memcpy(to, from, size_t(count) * sizeof(Number));
    }
  }

  // Call each(panel, results (tokens, 16), first row of all, rows) for a matrix's panels times a part's inputs.
  template <typename Each>
  void multiply(int thread, const Part& part, const Matrix& matrix, const Inputs& x, const Matrix* next,
                const Each& each) {
    float* results = s_.own[thread].first.data();
    share(thread, part, matrix.panels, [&](int panel, int first, int tokens) {
      product(matrix, panel, x, first, tokens, results, next);
      each(panel, results, part.first + first, tokens);
    });
  }

  Model& m_;
  Scratch& s_;
  const int count_;
};

}  // namespace mobilellm
