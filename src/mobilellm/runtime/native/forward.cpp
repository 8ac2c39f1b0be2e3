#include "forward.h"

#include <cmath>
#include <cstring>

#include "attention_pass.h"

namespace mobilellm {
namespace {

class Forward : public AttentionPass {
 public:
  Forward(Model& model, Scratch& scratch, const std::vector<Row>& rows, float* states)
      : AttentionPass(model, scratch, rows), states_(states) {}

  void run(int thread) {
    const int hidden = shape().hidden_size, heads = shape().num_heads * shape().head_dim;
    begin(thread);
    for (int number = 0; number < shape().num_steps; ++number) {
      const Step step(m_, number);
      const Block& block = step.block;
      Inputs x = prepare(thread, s_.x.data(), hidden, hidden, block.attention_norm,
                         in_blocks(block.q.type) || in_blocks(block.k.type) || in_blocks(block.v.type));
      project(thread, step, x);
      attend(thread, number);
      if (few()) mix(thread);
      x = prepare(thread, few() ? s_.own[thread].whole.data() : s_.mixed.data(), heads, heads, nullptr,
                  in_blocks(block.output.type));
      multiply<true>(thread, block.output, x, s_.x.data(), hidden, part(thread, block.gate),
                     [&](int panel, int first) { return fetched(step, &Block::output, panel, first); });
      x = prepare(thread, s_.x.data(), hidden, hidden, block.feed_forward_norm,
                  in_blocks(block.gate.type) || in_blocks(block.up.type));
      x = gate(thread, step, x);
      multiply<true>(thread, block.down, x, s_.x.data(), hidden, step.next ? part(thread, *step.next) : nullptr,
                     [&](int panel, int first) { return fetched(step, &Block::down, panel, first); });
      if (m_.team.stopped(thread)) return;
    }
    const float* norm = m_.norms.data() + 2 * size_t(hidden) * shape().num_layers;
    for (Shares shares(m_.team, thread, count_, 1); shares.next();) {
      const size_t at = size_t(shares.first) * hidden;
      m_.kernels.norm(s_.x.data() + at, norm, shape().rms_norm_eps, hidden, states_ + at);
    }
  }

 private:
  // Embedding rows and the angles of the positions.
  void begin(int thread) {
    const int pairs = shape().head_dim / 2;
    for (Shares shares(m_.team, thread, count_, 1); shares.next();) {
      const int row = shares.first;
      m_.embed(rows_[row].token, s_.x.data() + size_t(row) * shape().hidden_size);
      for (int i = 0; i < pairs; ++i) {
        const double angle = rows_[row].position / m_.frequencies[i];
        s_.cosines[row * pairs + i] = float(std::cos(angle));
        s_.sines[row * pairs + i] = float(std::sin(angle));
      }
    }
    m_.team.meet(thread);
  }

  // A step of the schedule. A block that runs several times on end is in a near cache after the first time, and
  // memory has nothing to do: meanwhile the block after it comes there, a part of it each time.
  struct Step {
    Step(const Model& model, int number_) : number(number_), block(model.blocks[model.schedule[number_]]) {
      const auto& schedule = model.schedule;
      const int steps = int(schedule.size());
      int first = number, end = number + 1;
      while (first > 0 && schedule[first - 1] == schedule[number]) --first;
      while (end < steps && schedule[end] == schedule[number]) ++end;
      turn = number - first, turns = end - first;
      if (number + 1 < steps) next = &model.blocks[schedule[number + 1]];
      if (turns > 1 && end < steps) coming = &model.blocks[schedule[end]];
    }
    const int number;
    const Block& block;
    const Block *next = nullptr, *coming = nullptr;
    int turn, turns;
  };

  // What a product with panel `panel` of one of a step's matrices brings to the cache meanwhile.
  const uint8_t* fetched(const Step& step, Matrix Block::*matrix, int panel, int first) const {
    if (!few() || !step.coming) return ahead(step.block.*matrix, panel, first);
    return panel % step.turns == step.turn ? (step.coming->*matrix).panel(panel) : nullptr;
  }

  using Pass::part;

  static constexpr Matrix Block::*kProjections[] = {&Block::q, &Block::k, &Block::v};

  // Which of queries, keys and values a panel of all three belongs to; `panel` becomes its place there.
  static int projection(const Block& block, int& panel) {
    int which = 0;
    while (panel >= (block.*kProjections[which]).panels) panel -= (block.*kProjections[which++]).panels;
    return which;
  }

  static int projections(const Block& block) { return block.q.panels + block.k.panels + block.v.panels; }

  // Where a thread's own part of a block's first product begins.
  const uint8_t* part(int thread, const Block& block) const {
    int panel = Shares::start(projections(block), thread, m_.team.size());
    const int which = projection(block, panel);
    return (block.*kProjections[which]).panel(panel);
  }

  // Queries, keys and values; queries and keys rotated, keys and values into the cache.
  void project(int thread, const Step& step, const Inputs& x) {
    float* results = s_.own[thread].first.data();
    share(thread, projections(step.block), part(thread, step.block.output), [&](int panel, int first, int tokens) {
      const int which = projection(step.block, panel);
      const Matrix& matrix = step.block.*kProjections[which];
      m_.product(matrix.type)(matrix.panel(panel), matrix.columns, x, first, tokens, results,
                              fetched(step, kProjections[which], panel, first));
      const int begin = panel * kPanelRows;
      const int end = matrix.rows - begin < kPanelRows ? matrix.rows : begin + kPanelRows;
      for (int t = 0; t < tokens; ++t) {
        float* result = results + t * kPanelRows;
        if (which < 2) rotate(result, first + t, begin, end);
        if (which == 0) {
          keep_queries(result, first + t, begin, end);
        } else {
          store(result, rows_[first + t], step.number, begin, end, which == 1);
        }
      }
    });
  }

  // Call each(head, first number of it, first row, rows) for rows begin ... end - 1, head by head.
  template <typename Each>
  void by_heads(int begin, int end, const Each& each) const {
    const int dim = shape().head_dim;
    for (int head = begin / dim, number = begin % dim, at = 0; at < end - begin; ++head, number = 0) {
      const int rows = end - begin - at < dim - number ? end - begin - at : dim - number;
      each(head, number, at, rows);
      at += rows;
    }
  }

  // Turn the pairs of rows begin ... end - 1 of a row's queries or keys.
  void rotate(float* result, int row, int begin, int end) const {
    const int pairs = shape().head_dim / 2;
    by_heads(begin, end, [&](int, int number, int at, int rows) {
      const float *cosines = &s_.cosines[row * pairs + number / 2], *sines = &s_.sines[row * pairs + number / 2];
      for (int i = 0; i < rows / 2; ++i) {
        float *even = &result[at + 2 * i], *odd = even + 1;
        const float turned = *even * cosines[i] - *odd * sines[i];
        *odd = *even * sines[i] + *odd * cosines[i];
        *even = turned;
      }
    });
  }

  // Queries of a row lie as (key/value heads, head_dim, group), so that those of a key/value head stand together.
  void keep_queries(const float* result, int row, int begin, int end) const {
    const int dim = shape().head_dim;
    float* queries = s_.q.data() + size_t(row) * shape().num_heads * dim;
    by_heads(begin, end, [&](int head, int number, int at, int rows) {
      float* to = queries + (size_t(head / group_) * dim + number) * group_ + head % group_;
      for (int i = 0; i < rows; ++i) to[i * group_] = result[at + i];
    });
  }

  void store(const float* result, const Row& row, int step, int begin, int end, bool keys) const {
    uint16_t halves[kPanelRows];
    m_.kernels.halve(result, halves);
    by_heads(begin, end, [&](int head, int number, int at, int rows) {
      if (keys) {
        uint16_t* to = row.sequence->key(step, head, row.position) + number * 16;
        for (int i = 0; i < rows; ++i) to[i * 16] = halves[at + i];
      } else {
        std::memcpy(row.sequence->value(step, head, row.position) + number, halves + at, size_t(rows) * 2);
      }
    });
  }

  // hidden = silu(gate) * up, two panels at a time: a run of what is rounded to 8 bits at once, if it has to be.
  Inputs gate(int thread, const Step& step, const Inputs& x) {
    const Block& block = step.block;
    const size_t stride = padded(shape().intermediate_size);
    const Inputs hidden{s_.hidden.data(), stride, s_.rounded_hidden.bytes(count_)};
    share(thread, (block.gate.panels + 1) / 2, part(thread, block.down), [&](int pair, int first, int tokens) {
      for (int panel = 2 * pair; panel < 2 * pair + 2 && panel < block.gate.panels; ++panel) {
        gate(thread, step, x, panel, first, tokens);
      }
      for (int row = first; in_blocks(block.down.type) && row < first + tokens; ++row) {
        const size_t run = size_t(pair);
        const auto& [numbers, scales, negated, all] = hidden.bytes;
        m_.kernels.quantise(s_.hidden.data() + row * stride + run * kBlock, kBlock, row,
                            {numbers + run * all * kBlock, scales + run * all, negated + run * all, all});
      }
    });
    return hidden;
  }

  void gate(int thread, const Step& step, const Inputs& x, int panel, int first, int tokens) {
    const Block& block = step.block;
    float *gates = s_.own[thread].first.data(), *ups = s_.own[thread].second.data();
    m_.product(block.gate.type)(block.gate.panel(panel), block.gate.columns, x, first, tokens, gates,
                                fetched(step, &Block::gate, panel, first));
    m_.product(block.up.type)(block.up.panel(panel), block.up.columns, x, first, tokens, ups,
                              fetched(step, &Block::up, panel, first));
    const size_t stride = padded(shape().intermediate_size);
    for (int t = 0; t < tokens; ++t) {
      m_.kernels.gate(gates + t * kPanelRows, ups + t * kPanelRows, kPanelRows,
                      s_.hidden.data() + size_t(first + t) * stride + panel * kPanelRows);
    }
  }

  float* states_;
};

class Logits : public Pass {
 public:
  Logits(Model& model, Scratch& scratch, int count, const float* states, float* out)
      : Pass(model, scratch, count), states_(states), out_(out) {}

  void run(int thread) {
    const int hidden = shape().hidden_size;
    const Inputs x = prepare(thread, states_, hidden, hidden, nullptr, in_blocks(m_.head.type));
    multiply<false>(thread, m_.head, x, out_, shape().vocab_size, nullptr,
                    [this](int panel, int first) { return ahead(m_.head, panel, first); });
  }

 private:
  const float* states_;
  float* out_;
};

template <typename Work>
bool run(Model& model, Work& work) {
  model.team.run([](void* context, int thread) { static_cast<Work*>(context)->run(thread); }, &work);
  return !model.team.stopped(0);
}

}  // namespace

bool forward(Model& model, Scratch& scratch, const std::vector<Row>& rows, float* states) {
  int longest = 0;
  for (const Row& row : rows) longest = row.position + 1 > longest ? row.position + 1 : longest;
  scratch.fit(model, int(rows.size()), longest);
  Forward work(model, scratch, rows, states);
  return run(model, work);
}

bool logits(Model& model, Scratch& scratch, int count, const float* states, float* out) {
  scratch.fit(model, count, 1);
  Logits work(model, scratch, count, states, out);
  return run(model, work);
}

}  // namespace mobilellm
