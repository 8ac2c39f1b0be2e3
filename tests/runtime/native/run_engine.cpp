// The engine's whole life through its C interface, on random models: made, filled, fed in every way, cancelled,
// saved and restored, refused, destroyed. What must be the same bit for bit is compared. Ends with 1 at a fault;
// sanitizers and emulators find what a comparison cannot. Argument: one set of instructions, which then
// runs three models only, for emulators; by default all that the processor has run nineteen.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "engine.h"

namespace {

constexpr int kF32 = 0, kF16 = 1, kQ4 = 2, kQ8 = 8, kBF16 = 30;  // ggml's numbers
constexpr int kContext = 300;                                    // more than one pass, and several spans

std::mt19937 chance(1);

void expect(bool right, const std::string& what) {
  if (right) return;
  std::printf("not so: %s\n", what.c_str());
  std::exit(1);
}

size_t bytes_of(int type, size_t numbers) {
  switch (type) {
    case kF32: return numbers * 4;
    case kQ8: return numbers / 32 * 34;
    case kQ4: return numbers / 32 * 18;
    default: return numbers * 2;
  }
}

// Weights of about 0.1, or bytes of any kind as a damaged file would have them.
std::vector<uint8_t> weights(int type, size_t numbers, bool damaged) {
  std::vector<uint8_t> bytes(bytes_of(type, numbers));
  for (uint8_t& each : bytes) each = uint8_t(chance());
  if (damaged) return bytes;
  const auto put = [&](size_t at, uint16_t value) { std::memcpy(&bytes[at], &value, 2); };
  if (type == kF32) {
    for (size_t i = 0; i < numbers; ++i) {
      const float value = std::normal_distribution<float>(0, 0.1f)(chance);
      std::memcpy(&bytes[i * 4], &value, 4);
    }
  } else if (type == kQ8 || type == kQ4) {
    const size_t block = type == kQ8 ? 34 : 18;  // scales of 2^-10 and 2^-6
    for (size_t at = 0; at < bytes.size(); at += block) put(at, type == kQ8 ? 0x1400 : 0x2400);
  } else {  // signs, the exponents of 2^-4, fractions
    for (size_t i = 0; i < numbers; ++i) {
      const uint16_t bits = uint16_t(chance());
      put(i * 2, type == kF16 ? (bits & 0x83FF) | 0x2C00 : (bits & 0x807F) | 0x3D80);
    }
  }
  return bytes;
}

struct File {  // what Python would have mapped
  File(const mobilellm_shape& shape_, std::vector<int32_t> schedule_, int type, int head_type, bool damaged)
      : shape(shape_), schedule(std::move(schedule_)) {
    const int heads = shape.num_heads * shape.head_dim, kv = shape.num_kv_heads * shape.head_dim;
    const int hidden = shape.hidden_size, wide = shape.intermediate_size;
    const auto add = [&](int its_type, int rows, int columns) {
      if ((its_type == kQ8 || its_type == kQ4) && columns % 32) its_type = kF16;
      data.push_back(weights(its_type, size_t(rows) * columns, damaged));
      tensors.push_back({data.back().data(), its_type, rows, columns});
    };
    add(head_type, shape.vocab_size, hidden);
    for (int block = 0; block < shape.num_layers; ++block) {
      add(type, heads, hidden), add(type, kv, hidden), add(type, kv, hidden), add(type, hidden, heads);
      add(type, wide, hidden), add(type, wide, hidden), add(type, hidden, wide);
    }
    add(head_type, shape.vocab_size, hidden);
    norms.assign(size_t(hidden) * (2 * shape.num_layers + 1), 1.0f);
  }
  mobilellm_shape shape;
  std::vector<int32_t> schedule;
  std::vector<std::vector<uint8_t>> data;
  std::vector<mobilellm_tensor> tensors;
  std::vector<float> norms;
};

struct DestroyModel {
  void operator()(mobilellm_model* model) const { mobilellm_destroy(model); }
};
using Model = std::unique_ptr<mobilellm_model, DestroyModel>;
struct DestroySequence {
  void operator()(mobilellm_sequence* sequence) const { mobilellm_sequence_destroy(sequence); }
};
using Sequence = std::unique_ptr<mobilellm_sequence, DestroySequence>;

Model loaded(const File& file, int cache, int threads, const char* isa) {
  char error[256] = "";
  Model model(mobilellm_create(&file.shape, file.schedule.data(), file.tensors.data(), file.norms.data(), cache,
                               threads, isa, error, sizeof error));
  if (!model) return model;
  for (int part = 0; part <= file.shape.num_layers; ++part) {
    const int pieces = part == file.shape.num_layers ? 3 : 1;
    for (int piece = 0; piece < pieces; ++piece) mobilellm_fill(model.get(), part, piece, pieces);
  }
  return model;
}

Sequence new_sequence(const Model& model) { return Sequence(mobilellm_sequence_create(model.get(), kContext)); }

struct Feed {
  mobilellm_sequence* sequence;
  int position;
  std::vector<int32_t> tokens;
};

int32_t feed(const Model& model, const std::vector<Feed>& feeds, int hidden, std::vector<float>& states) {
  std::vector<int32_t> tokens, positions;
  std::vector<mobilellm_sequence*> sequences;
  for (const Feed& each : feeds) {
    for (size_t i = 0; i < each.tokens.size(); ++i) {
      tokens.push_back(each.tokens[i]), positions.push_back(each.position + int(i)), sequences.push_back(each.sequence);
    }
  }
  states.assign(tokens.size() * hidden, 0);
  return mobilellm_forward(model.get(), int32_t(tokens.size()), tokens.data(), sequences.data(), positions.data(),
                           states.data());
}

std::vector<float> fed(const Model& model, const std::vector<Feed>& feeds, int hidden) {
  std::vector<float> states;
  expect(feed(model, feeds, hidden, states) == MOBILELLM_DONE, "tokens are taken");
  return states;
}

bool same(const float* a, const float* b, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    if (std::memcmp(a + i, b + i, sizeof *a) && !(std::isnan(a[i]) && std::isnan(b[i]))) return false;
  }
  return true;
}

std::vector<int32_t> part(const std::vector<int32_t>& tokens, int from, int to) {
  return {tokens.begin() + from, tokens.begin() + to};
}

// Any way to feed the tokens gives these states.
void feed_in_every_way(const Model& model, const File& file, int cache, const std::vector<int32_t>& tokens,
                       const std::vector<float>& right) {
  const int hidden = file.shape.hidden_size;
  const Sequence one = new_sequence(model), two = new_sequence(model), three = new_sequence(model);
  int at = 0;
  for (int end : {1, 2, 5, 9, 26, 140, kContext}) {
    const std::vector<float> states = fed(model, {{one.get(), at, part(tokens, at, end)}}, hidden);
    expect(same(states.data(), &right[size_t(at) * hidden], states.size()), "chunks give the same");
    at = end;
  }
  for (const auto [first, second, third] : {std::tuple{1, 1, 1}, {2, 1, 1}, {30, 1, 7}, {1, 150, 120}}) {
    const std::vector<float> states = fed(model, {{one.get(), 0, part(tokens, 0, first)},
                                                  {two.get(), 0, part(tokens, 0, second)},
                                                  {three.get(), 0, part(tokens, 0, third)}}, hidden);
    size_t row = 0;
    for (int count : {first, second, third}) {
      expect(same(&states[row * hidden], right.data(), size_t(count) * hidden), "a batch gives what each gives alone");
      row += count;
    }
  }
  const size_t numbers = size_t(file.shape.num_steps) * 77 * file.shape.num_kv_heads * file.shape.head_dim;
  std::vector<uint8_t> keys(bytes_of(cache, numbers)), values(bytes_of(cache, numbers));
  fed(model, {{one.get(), 0, part(tokens, 0, 77)}}, hidden);
  mobilellm_sequence_read(one.get(), 77, keys.data(), values.data());
  const Sequence other = new_sequence(model);
  mobilellm_sequence_write(other.get(), 77, keys.data(), values.data());
  const std::vector<float> states = fed(model, {{other.get(), 77, part(tokens, 77, kContext)}}, hidden);
  expect(same(states.data(), &right[size_t(77) * hidden], states.size()), "a restored state goes on as the first");
}

// However many threads a call runs on, and whichever took part before.
void change_threads(const Model& model, int hidden, const std::vector<int32_t>& tokens,
                    const std::vector<float>& right) {
  const Sequence sequence = new_sequence(model);
  int at = 0;
  for (int threads : {1, 4, 2, 3, 1, 5, 2, 2, 4, 1, 3}) {
    expect(mobilellm_use_threads(model.get(), threads) == MOBILELLM_DONE, "so many threads are there");
    for (int count : {1, 1, 20}) {
      const std::vector<float> states = fed(model, {{sequence.get(), at, part(tokens, at, at + count)}}, hidden);
      expect(same(states.data(), &right[size_t(at) * hidden], states.size()), "they change nothing");
      at += count;
    }
  }
}

void take_logits(const Model& model, const File& file, const std::vector<float>& states) {
  const size_t hidden = size_t(file.shape.hidden_size), vocabulary = size_t(file.shape.vocab_size);
  std::vector<float> all(kContext * vocabulary), few(7 * vocabulary);
  expect(mobilellm_logits(model.get(), kContext, states.data(), all.data()) == MOBILELLM_DONE, "logits");
  for (int count : {1, 7}) {
    expect(mobilellm_logits(model.get(), count, &states[hidden], few.data()) == MOBILELLM_DONE, "logits of a few");
    expect(same(few.data(), &all[vocabulary], count * vocabulary), "logits of a few are those of all");
  }
}

void refuse(const Model& model, const File& file) {
  const Sequence sequence = new_sequence(model);
  std::vector<float> states;
  for (const auto& [token, position] : {std::pair{-1, 0}, {file.shape.vocab_size, 0}, {5, -1}, {5, kContext}}) {
    const std::vector<Feed> feeds = {{sequence.get(), position, {token}}};
    expect(feed(model, feeds, file.shape.hidden_size, states) == MOBILELLM_REFUSED, "what cannot be fed is refused");
  }
  char error[256] = "";
  const auto make = [&](const char* isa) {
    return mobilellm_create(&file.shape, file.schedule.data(), file.tensors.data(), file.norms.data(), kF16, 1, isa,
                            error, sizeof error);
  };
  expect(!make("mmx") && std::strstr(error, "no mmx"), "instructions that are not there are refused in words");
  expect(mobilellm_half("mmx", 1) == -1, "and for a number too");
}

// Within a pass, whose first step then has written keys and whose last one has not.
void cancel(const Model& model, const File& file, int cache, const std::vector<int32_t>& tokens) {
  constexpr int kOnePass = 200;
  const size_t numbers = size_t(kOnePass) * file.shape.num_kv_heads * file.shape.head_dim;
  const size_t step = bytes_of(cache, numbers), steps = size_t(file.shape.num_steps);
  const auto written = [step](const uint8_t* keys) { return std::any_of(keys, keys + step, [](int b) { return b; }); };
  bool within = false;
  for (int round = 0; round < 1000 && !within; ++round) {  // the other thread may come too late
    const Sequence sequence = new_sequence(model);
    std::atomic<bool> done{false};
    std::thread other([&] {
      while (!done) mobilellm_cancel(model.get()), std::this_thread::yield();
    });
    std::vector<float> states;
    const std::vector<Feed> feeds = {{sequence.get(), 0, part(tokens, 0, kOnePass)}};
    const int32_t result = feed(model, feeds, file.shape.hidden_size, states);
    done = true;
    other.join();
    expect(result == MOBILELLM_DONE || result == MOBILELLM_CANCELLED, "a call is cancelled, or ends");
    std::vector<uint8_t> keys(step * steps), values(step * steps);
    mobilellm_sequence_read(sequence.get(), kOnePass, keys.data(), values.data());
    within = result == MOBILELLM_CANCELLED && written(keys.data()) && !written(keys.data() + step * (steps - 1));
  }
  expect(within, "a call is left between two of its steps");
}

void run(const File& file, const char* isa, bool damaged, int cache = kF16) {
  std::vector<int32_t> tokens(kContext);
  for (int32_t& each : tokens) each = int32_t(chance() % uint32_t(file.shape.vocab_size));
  const int hidden = file.shape.hidden_size;
  std::vector<float> right;
  for (int threads : {1, 3}) {
    const Model model = loaded(file, cache, threads, isa);
    expect(bool(model), "the model is made");
    expect(mobilellm_isa(model.get()) == std::string(isa), "its instructions are those that were named");
    const Sequence sequence = new_sequence(model);
    const std::vector<float> states = fed(model, {{sequence.get(), 0, tokens}}, hidden);
    if (threads == 1) right = states;
    expect(same(states.data(), right.data(), right.size()), "any number of threads gives the same");
    feed_in_every_way(model, file, cache, tokens, right);
    take_logits(model, file, right);
    refuse(model, file);
    cancel(model, file, cache, tokens);
    change_threads(model, hidden, tokens, right);
    const Sequence after = new_sequence(model);
    expect(same(fed(model, {{after.get(), 0, tokens}}, hidden).data(), right.data(), right.size()), "as before");
    const std::vector<uint64_t> ones(1 << 17, 1);
    expect(mobilellm_read(model.get(), ones.data(), ones.size() * 8) == ones.size(), "all memory is read");
  }
  for (float each : right) expect(damaged || std::isfinite(each), "states are numbers");
}

}  // namespace

int main(int count, char** arguments) {
  mobilellm_shape even = {320, 64, 160, 2, 4, 2, 16, 4, 1e-5f, 10000};
  // Rows that blocks do not divide, panels that rows do not fill, a group of three, heads of ten.
  const mobilellm_shape odd = {83, 72, 44, 2, 9, 3, 10, 2, 1e-5f, 10000};
  // Heads of one run and of three, for a cache in 8 bits.
  const mobilellm_shape one_run = {83, 72, 44, 2, 9, 3, 32, 2, 1e-5f, 10000};
  const mobilellm_shape three_runs = {83, 72, 44, 2, 2, 1, 96, 2, 1e-5f, 10000};
  if (count > 1) {
    even.num_steps = 2;
    run(File(even, {0, 1}, kQ4, kQ8, false), arguments[1], false);
    run(File(odd, {0, 1}, kF16, kBF16, false), arguments[1], false);
    run(File(one_run, {0, 1}, kQ8, kQ8, false), arguments[1], false, kQ8);
    std::printf("%s: no fault found\n", arguments[1]);
    return 0;
  }
  const std::pair<int, int> types[] = {{kF32, kF32}, {kF16, kBF16}, {kBF16, kQ4}, {kQ8, kF16}, {kQ4, kQ8}};
  for (const char* isa : {"scalar", "avx2", "avxvnni", "avx512vl", "avx512", "neon", "dotprod"}) {
    if (mobilellm_half(isa, 1) < 0) continue;
    for (const auto& [type, head] : types) {
      run(File(even, {0, 0, 1, 1}, type, head, false), isa, false);
      run(File(odd, {0, 1}, type, head, false), isa, false);
      run(File(odd, {0, 1}, type, head, true), isa, true);
    }
    for (const bool damaged : {false, true}) {
      run(File(one_run, {0, 1}, kQ4, kQ8, damaged), isa, damaged, kQ8);
      run(File(three_runs, {0, 1}, kBF16, kF16, damaged), isa, damaged, kQ8);
    }
    std::printf("%s: no fault found\n", isa);
  }
}
