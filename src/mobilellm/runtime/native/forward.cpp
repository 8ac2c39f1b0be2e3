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
    const size_t hidden = shape().hidden_size;
    begin(thread);
    for (int step = 0; step < shape().num_steps; ++step) {
      const Block &block = m_.blocks[m_.schedule[step]], *next = fetched_by(step);
      by_parts(thread, [&](const Part& part) { before_attention(thread, part, step, block, next); });
      attend(thread, step);
      if (few()) mix(thread);
      by_parts(thread, [&](const Part& part) { after_attention(thread, part, block, next); });
      if (m_.team.stopped(thread)) return;
    }
    const float* norm = m_.norms.data() + 2 * hidden * shape().num_layers;
    for (Shares shares(m_.team, thread, count_, 1); shares.next();) {
      m_.kernels.norm(x(shares.first), norm, shape().rms_norm_eps, int(hidden), states_ + shares.first * hidden);
    }
  }

 private:
  // A block that runs again is in the processor's caches, and memory has nothing to do: its last run fetches the block
  // that comes after. Of few rows only, for many rows' products take longer than memory.
  const Block* fetched_by(int step) const {
    const std::vector<int32_t>& schedule = m_.schedule;
    const bool again = step > 0 && schedule[step - 1] == schedule[step];
    if (!few() || !again || step + 1 == shape().num_steps || schedule[step + 1] == schedule[step]) return nullptr;
    return &m_.blocks[schedule[step + 1]];
  }

  float* x(int row) const { return s_.x.data() + size_t(row) * wide_; }

  static const Matrix* of(const Block* block, Matrix Block::*matrix) { return block ? &(block->*matrix) : nullptr; }

  void before_attention(int thread, const Part& part, int step, const Block& block, const Block* next) {
    const int hidden = shape().hidden_size;
    const Inputs x = prepare(thread, part, s_.x.data(), wide_, hidden, block.attention_norm,
                             in_blocks(block.q.type) || in_blocks(block.k.type) || in_blocks(block.v.type));
    if (m_.cache == Type::Q8_0) {
      project_runs(thread, part, step, block, next, x);
    } else {
      project(thread, part, step, block, next, x);
    }
  }

  void after_attention(int thread, const Part& part, const Block& block, const Block* next) {
    const int hidden = shape().hidden_size, heads = shape().num_heads * shape().head_dim;
    Inputs x = prepare(thread, part, few() ? s_.own[thread].whole.data() : s_.mixed.data(), heads, heads, nullptr,
                       in_blocks(block.output.type));
    add(thread, part, block.output, x, of(next, &Block::output));
    x = prepare(thread, part, s_.x.data(), wide_, hidden, block.feed_forward_norm,
                in_blocks(block.gate.type) || in_blocks(block.up.type));
    x = gate(thread, part, block, next, x);
    add(thread, part, block.down, x, of(next, &Block::down));
  }

  // x += a part's product.
  void add(int thread, const Part& part, const Matrix& matrix, const Inputs& inputs, const Matrix* next) {
    multiply(thread, part, matrix, inputs, next, [&](int panel, const float* results, int row, int rows) {
      m_.kernels.add(results, rows, x(row) + panel * kPanelRows, wide_);
    });
  }

  // Embedding rows and the angles of the positions.
  void begin(int thread) {
    const int pairs = shape().head_dim / 2;
    for (Shares shares(m_.team, thread, count_, 1); shares.next();) {
      const int row = shares.first;
      m_.embed(rows_[row].token, x(row));
      const size_t at = size_t(row) * (2 * pairs + kPanelRows);
      float *cosines = &s_.cosines[at], *sines = &s_.sines[at];
      for (int i = 0; i < pairs; ++i) {
        const double angle = rows_[row].position / m_.frequencies[i];
        cosines[2 * i] = cosines[2 * i + 1] = float(std::cos(angle));
        sines[2 * i + 1] = float(std::sin(angle));
        sines[2 * i] = -sines[2 * i + 1];
      }
      for (int i = 2 * pairs; i < 2 * pairs + kPanelRows; ++i) {  // for panels that begin within one head
        cosines[i] = cosines[i - 2 * pairs], sines[i] = sines[i - 2 * pairs];
      }
    }
    m_.team.meet(thread);
  }

  static constexpr Matrix Block::*kProjections[] = {&Block::q, &Block::k, &Block::v};

  // Which of queries, keys and values a panel of all three belongs to; `panel` becomes its place there.
  static int projection(const Block& block, int& panel) {
    int which = 0;
    while (panel >= (block.*kProjections[which]).panels) panel -= (block.*kProjections[which++]).panels;
    return which;
  }

  // Queries, keys and values; queries and keys rotated, keys and values into the cache.
  void project(int thread, const Part& part, int step, const Block& block, const Block* next, const Inputs& x) {
    float* results = s_.own[thread].first.data();
    uint16_t halves[kTokenBlock * kPanelRows];
    const int projections = block.q.panels + block.k.panels + block.v.panels;
    share(thread, part, projections, [&](int panel, int first, int tokens) {
      const int which = projection(block, panel);
      const Matrix& matrix = block.*kProjections[which];
      product(matrix, panel, x, first, tokens, results, of(next, kProjections[which]));
      const int begin = panel * kPanelRows;
      const int end = matrix.rows - begin < kPanelRows ? matrix.rows : begin + kPanelRows;
      if (which < 2) rotate(results, part.first + first, tokens, begin);
      if (which > 0) m_.kernels.halve(results, tokens, halves);
      by_heads(begin, end, [&](int head, int number, int at, int rows) {
        for (int t = 0, row = part.first + first; t < tokens; ++t, ++row, at += kPanelRows) {
          if (which == 0) {
            copy(results + at, rows, query(query_number(row, head)) + number);
          } else {
            store(halves + at, rows, rows_[row], step, head, number, which == 1);
          }
        }
      });
    });
  }

  // The same into a cache in 8 bits, two panels at a time: a run that shares a scale. Queries are rounded as well.
  void project_runs(int thread, const Part& part, int step, const Block& block, const Block* next,
                    const Inputs& x) {
    float *results = s_.own[thread].first.data(), *runs = s_.own[thread].pair.data();
    const int projections = block.q.panels + block.k.panels + block.v.panels;
    share(thread, part, projections / 2, [&](int pair, int first, int tokens) {
      int panel = 2 * pair;
      const int which = projection(block, panel);
      const Matrix& matrix = block.*kProjections[which];
      for (int half = 0; half < 2; ++half) {
        product(matrix, panel + half, x, first, tokens, results, of(next, kProjections[which]));
        if (which < 2) rotate(results, part.first + first, tokens, (panel + half) * kPanelRows);
        for (int t = 0; t < tokens; ++t) {
          std::memcpy(runs + t * kBlock + half * kPanelRows, results + t * kPanelRows, kPanelRows * sizeof(float));
        }
      }
      const int begin = panel * kPanelRows, head = begin / shape().head_dim, run = begin % shape().head_dim / kBlock;
      for (int t = 0; t < tokens; ++t) {
        const float* numbers = runs + t * kBlock;
        const int row = part.first + first + t;
        if (which == 0) {
          const auto [all, scales, negated, count] = rounded_queries();
          const int number = query_number(row, head);
          m_.kernels.quantise(numbers, kBlock, number, 1,
                              {all + run * count * kBlock, scales + run * count, negated + run * count, count});
        } else {
          store_run(numbers, rows_[row], step, head, run, which == 1);
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

  // Turn the pairs of a panel of some rows' queries or keys, whose first is row `begin` of the matrix.
  void rotate(float* results, int row, int rows, int begin) const {
    const size_t dim = shape().head_dim, stride = dim + kPanelRows, at = row * stride + begin % dim;
    m_.kernels.rotate(results, rows, &s_.cosines[at], &s_.sines[at], stride);
  }

  // Numbers number ... number + rows - 1 of a key or value.
  void store(const uint16_t* halves, int rows, const Row& row, int step, int head, int number, bool keys) const {
    if (keys) {
      uint16_t* to = row.sequence->key(step, head, row.position) + number * 16;
      for (int i = 0; i < rows; ++i) to[i * 16] = halves[i];
    } else {
      copy(halves, rows, row.sequence->value(step, head, row.position) + number);
    }
  }

  static constexpr uint16_t kInfinite = 0x7C00;  // in float16

  // A run that holds what is no number, or more than a scale in float16 can say, is kept as kv_cache.py says.
  void store_run(const float* numbers, const Row& row, int step, int head, int run, bool keys) const {
    int8_t bytes[kBlock];
    float scales[kPanelRows] = {};
    int32_t negated;
    uint16_t halves[kPanelRows];
    m_.kernels.quantise(numbers, kBlock, 0, 1, {bytes, scales, &negated, 1});
    m_.kernels.halve(scales, 1, halves);
    if ((halves[0] & 0x7FFF) >= kInfinite) halves[0] = kInfinite, std::memset(bytes, 0, sizeof bytes);
    if (keys) {
      row.sequence->key_run(step, head, row.position, run).put(halves, bytes);
    } else {
      row.sequence->value_run(step, head, row.position, run).put(halves, bytes);
    }
  }

  // hidden = silu(gate) * up, two panels at a time: a run of what is rounded to 8 bits at once, if it has to be, and
  // then kept in no other way.
  Inputs gate(int thread, const Part& part, const Block& block, const Block* next, const Inputs& x) {
    Scratch::Prepared& room = part.shared ? s_.hidden : s_.own[thread].hidden;
    const size_t wide = padded(shape().intermediate_size);
    const Inputs hidden{room.values.data(), wide, room.rounded.bytes(part.count)};
    const bool rounded = in_blocks(block.down.type);
    const size_t stride = rounded ? kBlock : wide;
    share(thread, part, (block.gate.panels + 1) / 2, [&](int pair, int first, int tokens) {
      float* to = rounded ? s_.own[thread].pair.data() : room.values.data() + first * wide + size_t(pair) * kBlock;
      for (int panel = 2 * pair; panel < 2 * pair + 2 && panel < block.gate.panels; ++panel) {
        gate(thread, block, next, x, panel, first, tokens, to + panel % 2 * kPanelRows, stride);
      }
      const auto& [numbers, scales, negated, all] = hidden.bytes;
      const Bytes run{numbers + pair * all * kBlock, scales + pair * all, negated + pair * all, all};
      if (rounded) m_.kernels.quantise(to, kBlock, first, tokens, run);
    });
    return hidden;
  }

  // out (tokens, 16; `stride` apart) = a panel of it.
  void gate(int thread, const Block& block, const Block* next, const Inputs& x, int panel, int first, int tokens,
            float* out, size_t stride) {
    float *gates = s_.own[thread].first.data(), *ups = s_.own[thread].second.data();
    product(block.gate, panel, x, first, tokens, gates, of(next, &Block::gate));
    product(block.up, panel, x, first, tokens, ups, of(next, &Block::up));
    m_.kernels.gate(gates, ups, tokens, out, stride);
  }

  const size_t wide_ = padded(shape().hidden_size);  // from one row of x to the next
  float* states_;
};

class Logits : public Pass {
 public:
  Logits(Model& model, Scratch& scratch, int count, const float* states, float* out)
      : Pass(model, scratch, count), states_(states), out_(out) {}

  void run(int thread) {
    const int hidden = shape().hidden_size;
    by_parts(thread, [&](const Part& part) {
      const Inputs x = prepare(thread, part, states_, hidden, hidden, nullptr, in_blocks(m_.head.type));
      multiply(thread, part, m_.head, x, nullptr, [&](int panel, const float* results, int row, int rows) {
        const int begin = panel * kPanelRows, left = m_.head.rows - begin;
        for (int i = 0; i < rows; ++i) {
          float* to = out_ + size_t(row + i) * m_.head.rows + begin;
          copy(results + i * kPanelRows, left < kPanelRows ? left : kPanelRows, to);
        }
      });
    });
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
