#include "scratch.h"

#include <algorithm>

namespace mobilellm {
namespace {

// Tokens' places left free between runs of a token's numbers: at a distance of 2^n bytes all would fall on the same
// few places of the first cache.
constexpr int kApart = 2;

}  // namespace

Scratch::Scratch(const Model& model) { fit(model, kFewRows, 1); }

void Scratch::fit(const Model& model, int rows, int longest) {
  const mobilellm_shape& shape = model.shape;
  const int heads = shape.num_heads * shape.head_dim, group = shape.num_heads / shape.num_kv_heads;
  const int widest = std::max(shape.hidden_size, heads);
  const size_t value_stride = padded(shape.head_dim);
  const auto grow = [](auto& vector, size_t size) {
    if (vector.size() < size) vector.resize(size);
  };
  const size_t many = size_t(rows);
  grow(x, many * padded(shape.hidden_size));
  if (model.cache == Type::Q8_0) {
    rounded_q.fit(rows * shape.num_heads, shape.head_dim);
  } else {
    grow(q, many * heads);
  }
  grow(mixed, many * heads);
  grow(cosines, many * (shape.head_dim + kPanelRows));
  grow(sines, many * (shape.head_dim + kPanelRows));
  spans = (longest - 1) / kSpan + 1;
  const int shared = std::min(rows, model.team.size() * kOwnRows);
  inputs.fit(shared, widest);
  const bool plain = std::any_of(model.blocks.begin(), model.blocks.end(),
                                 [](const Block& block) { return !in_blocks(block.down.type); });
  const auto fit_hidden = [&](Prepared& room, int tokens) {  // values that are rounded run by run stand nowhere
    if (plain) return room.fit(tokens, shape.intermediate_size);
    room.rounded.fit(tokens, shape.intermediate_size);
  };
  fit_hidden(hidden, shared);
  if (rows <= kFewRows) {
    const size_t pieces = many * shape.num_heads * spans;
    grow(partial, pieces * value_stride);
    grow(partial_totals, pieces * 2);
  }
  const size_t queries = size_t(rows <= kFewRows ? 1 : kQueryRows) * group;
  if (own.size() < size_t(model.team.size())) own.resize(size_t(model.team.size()));
  for (int thread = 0; thread < model.team.size(); ++thread) {
    Own& each = own[size_t(thread)];
    each.inputs.fit(std::min(rows, kTokenBlock), widest);
    if (rows >= model.team.size() * kOwnRows) fit_hidden(each.hidden, kTokenBlock);
    grow(each.pair, size_t(kTokenBlock) * kBlock);
    grow(each.first, size_t(kTokenBlock) * kPanelRows);
    grow(each.second, size_t(kTokenBlock) * kPanelRows);
    grow(each.scores, queries * kSpan);
    if (model.cache == Type::Q8_0) grow(each.room, queries * kSpan);
    grow(each.part, queries * value_stride);
    grow(each.part_totals, queries * 2);
    grow(each.whole, std::max(queries * value_stride, size_t(kFewRows) * heads));
    grow(each.whole_totals, queries * 2);
    grow(each.visible, queries);
  }
}

void Scratch::Rounded::fit(int rows, int columns) {
  const size_t size = size_t(rows + kApart) * padded(columns);
  if (negated.size() > size / kBlock) return;  // the last to grow: memory may have ended half way
  numbers.resize(size);
  scales.resize(size / kBlock + 1);
  negated.resize(size / kBlock + 1);
}

Bytes Scratch::Rounded::bytes(int rows) {
  return {numbers.data(), scales.data(), negated.data(), size_t(rows <= kFewRows ? rows : rows + kApart)};
}

void Scratch::Prepared::fit(int rows, int columns) {
  const size_t size = size_t(rows) * padded(columns);
  if (values.size() < size) values.resize(size);
  rounded.fit(rows, columns);
}

}  // namespace mobilellm
