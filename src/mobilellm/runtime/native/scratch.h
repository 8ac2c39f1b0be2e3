// The memory of a pass beside the model's and the sequences'.
#pragma once

#include <vector>

#include "sequence.h"

namespace mobilellm {

constexpr int kMostRows = 256;  // of one pass; more are fed one pass after the other
constexpr int kFewRows = 4;     // so few are prepared by every thread for itself rather than handed over
constexpr int kQueryRows = 16;  // tokens of a sequence whose attention is one piece of work in prefill
constexpr int kTokenBlock = 64;  // tokens whose inputs stay in the second cache while panels pass
constexpr int kOwnRows = 16;     // from as many rows a thread on, each makes all products of its own rows

// Rows of a matrix, whole panels of them.
inline size_t padded(int rows) { return size_t(rows + kPanelRows - 1) / kPanelRows * kPanelRows; }

// Room for what lives between two matrices. Made once and used by all passes of a model.
struct Scratch {
  explicit Scratch(const Model& model);
  void fit(const Model& model, int rows, int longest);  // longest: positions a row sees at most

  // Room for the `Bytes` of some rows.
  struct Rounded {
    std::vector<int8_t> numbers;
    std::vector<float> scales;
    std::vector<int32_t> negated;
    void fit(int rows, int columns);
    Bytes bytes(int rows);
  };
  // What a product reads.
  struct Prepared {
    std::vector<float> values;
    Rounded rounded;
    void fit(int rows, int columns);
  };
  struct Own {  // a thread's
    Prepared inputs, hidden;
    std::vector<float> first, second;  // a panel's results
    std::vector<float> pair;           // two panels' results, a row's side by side
    std::vector<float> scores, room, part, part_totals, whole, whole_totals;
    std::vector<int> visible;
  };

  std::vector<float> x;  // (rows, hidden_size made whole panels)
  std::vector<float> q, mixed, cosines, sines;
  Rounded rounded_q;  // in place of q where keys are in 8 bits
  std::vector<float> partial, partial_totals;  // attention of few rows, span by span
  Prepared inputs, hidden;  // of rows that threads share
  std::vector<Own> own;
  int spans = 0;
};

}  // namespace mobilellm
