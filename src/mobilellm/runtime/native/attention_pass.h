// Attention of a pass's rows over their sequences' caches.
#pragma once

#include <cmath>
#include <cstring>
#include <utility>

#include "forward.h"
#include "pass.h"

namespace mobilellm {

class AttentionPass : public Pass {
 public:
  AttentionPass(Model& model, Scratch& scratch, const std::vector<Row>& rows)
      : Pass(model, scratch, int(rows.size())), rows_(rows) {
    group_ = shape().num_heads / shape().num_kv_heads;
    value_stride_ = int(padded(shape().head_dim));
    const int most = few() ? 1 : kQueryRows;
    for (int row = 0; row < count_;) {  // tokens of one sequence, a tile at a time
      int end = row + 1;
      while (end < count_ && end - row < most && rows_[end].sequence == rows_[row].sequence) ++end;
      tiles_.push_back({row, end});
      for (; row < end; ++row) tile_of_.push_back(int(tiles_.size()) - 1);
    }
  }

 protected:
  // A piece of work is a row, a key/value head and a span of positions where rows are few, and a tile of rows and a
  // head with all spans where there are many: the same sums in the same order.
  void attend(int thread, int step) {
    const int heads = shape().num_kv_heads;
    if (few()) {
      const int pieces = count_ * heads * s_.spans;
      for (Shares shares(m_.team, thread, pieces, 1); shares.next();) {
        // In the order of memory: the heads of a span, and then the next span.
        const int head = shares.first % heads, span = shares.first / heads % s_.spans;
        const int row = shares.first / heads / s_.spans;
        if (span * kSpan > rows_[row].position) continue;
        attend_span(thread, step, row, row + 1, head, span, partial(row, head, span));
      }
    } else {
      const int tiles = int(tiles_.size());
      for (Shares shares(m_.team, thread, tiles * heads, 1); shares.next();) {
        // The last rows see most and come first, so that no thread ends with a long piece.
        const auto [first, end] = tiles_[size_t(tiles - 1 - shares.first % tiles)];
        attend_tile(thread, step, first, end, shares.first / tiles);
      }
    }
    m_.team.meet(thread);
  }

  // Few rows: put the spans together, by every thread for itself, into its `whole` (count, heads).
  void mix(int thread) {
    Scratch::Own& own = s_.own[thread];
    const int heads = shape().num_kv_heads, dim = shape().head_dim;
    float* out = own.whole.data();
    for (int row = 0; row < count_; ++row) {
      for (int head = 0; head < heads; ++head) {
        const Partial whole{own.part.data(), own.part_totals.data(), own.part_totals.data() + group_};
        clear(whole, group_);
        for (int span = 0; span * kSpan <= rows_[row].position; ++span) {
          m_.kernels.merge(whole, partial(row, head, span), group_, value_stride_);
        }
        for (int query = 0; query < group_; ++query, out += dim) finish(whole, query, out);
      }
    }
  }

  // Which of the pass's queries is that of a row and a head. Those of a tile and a key/value head stand together: (rows,
  // group).
  int query_number(int row, int head) const {
    const auto [first, end] = tiles_[size_t(tile_of_[size_t(row)])];
    return first_query(first, end, head / group_) + (row - first) * group_ + head % group_;
  }
  float* query(int number) const { return s_.q.data() + size_t(number) * shape().head_dim; }
  Bytes rounded_queries() const { return s_.rounded_q.bytes(count_ * shape().num_heads); }  // where keys are in 8 bits

  const std::vector<Row>& rows_;
  int group_, value_stride_;

 private:
  // Of a tile of rows and a key/value head.
  int first_query(int first, int end, int head) const {
    return first * shape().num_heads + head * (end - first) * group_;
  }

  // Of few rows, the attention of a group of queries to one span.
  Partial partial(int row, int head, int span) const {
    const size_t at = ((size_t(row) * shape().num_kv_heads + head) * s_.spans + span) * group_;
    return {&s_.partial[at * value_stride_], &s_.partial_totals[2 * at], &s_.partial_totals[2 * at + group_]};
  }

  void attend_tile(int thread, int step, int first, int end, int head) {
    Scratch::Own& own = s_.own[thread];
    const int count = (end - first) * group_, dim = shape().head_dim;
    const Partial whole{own.whole.data(), own.whole_totals.data(), own.whole_totals.data() + count};
    const Partial part{own.part.data(), own.part_totals.data(), own.part_totals.data() + count};
    attend_span(thread, step, first, end, head, 0, whole);
    for (int span = 1; span * kSpan <= rows_[end - 1].position; ++span) {
      attend_span(thread, step, first, end, head, span, part);
      m_.kernels.merge(whole, part, count, value_stride_);
    }
    for (int query = 0; query < count; ++query) {
      const int row = first + query / group_, its_head = head * group_ + query % group_;
      finish(whole, query, s_.mixed.data() + (size_t(row) * shape().num_heads + its_head) * dim);
    }
  }

  void attend_span(int thread, int step, int first, int end, int head, int span, const Partial& partial) {
    Scratch::Own& own = s_.own[thread];
    const int dim = shape().head_dim, count = (end - first) * group_, start = span * kSpan;
    for (int query = 0; query < count; ++query) {
      own.visible[query] = rows_[first + query / group_].position + 1 - start;
    }
    const int seen = rows_[end - 1].position + 1 - start;
    const Sequence& sequence = *rows_[first].sequence;
    const bool bytes = m_.cache == Type::Q8_0;
    Attention attention{sequence.keys(step, head, span), sequence.values(step, head, span), dim, value_stride_,
                        seen < kSpan ? seen : kSpan, nullptr, {}, 0, own.visible.data(), count, own.scores.data(),
                        own.room.data(), nullptr};
    if (bytes) {
      attention.rounded = rounded_queries(), attention.first = first_query(first, end, head);
      const bool last_head = head + 1 == shape().num_kv_heads, last_span = start + seen <= start + kSpan;
      if (few() && !(last_head && last_span)) {
        attention.next = sequence.keys(step, last_head ? 0 : head + 1, last_head ? span + 1 : span);
      }
    } else {
      attention.queries = query(first_query(first, end, head));
    }
    (bytes ? m_.kernels.attend_q8_0 : m_.kernels.attend)(attention, partial);
  }

  void clear(const Partial& whole, int count) const {
    std::memset(whole.out, 0, size_t(count) * value_stride_ * 4);
    for (int query = 0; query < count; ++query) whole.largest[query] = -INFINITY, whole.total[query] = 0;
  }

  void finish(const Partial& whole, int query, float* out) const {
    const float *from = whole.out + size_t(query) * value_stride_, inverse = 1 / whole.total[query];
    for (int i = 0; i < shape().head_dim; ++i) out[i] = from[i] * inverse;
  }

  std::vector<std::pair<int, int>> tiles_;  // first row, end
  std::vector<int> tile_of_;                // of a row
};

}  // namespace mobilellm
