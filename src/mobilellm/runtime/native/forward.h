// One pass over the model for a batch of tokens of one or several sequences.
#pragma once

#include <vector>

#include "scratch.h"

namespace mobilellm {

struct Row {
  int32_t token;
  Sequence* sequence;
  int position;
};

// Whether it ran to the end; false where it was cancelled. states (rows, hidden_size).
bool forward(Model& model, Scratch& scratch, const std::vector<Row>& rows, float* states);
bool logits(Model& model, Scratch& scratch, int count, const float* states, float* out);

}  // namespace mobilellm
