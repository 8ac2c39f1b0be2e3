// Every kernel of every instruction set this processor has, against the portable ones on random and on extreme
// inputs; those of AVX-VNNI by emulation where it has only AVX2. Prints a line for each set and ends with 1 at the first
// that differs.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "kernels.h"
#include "vpdpbusd.h"

using namespace mobilellm;

namespace {

constexpr size_t kLine = 64;  // panels begin at whole ones

std::mt19937 chance(1);

int whole(int from, int to) { return std::uniform_int_distribution<int>(from, to)(chance); }

float normal() { return std::normal_distribution<float>()(chance); }

std::vector<float> normals(size_t count) {
  std::vector<float> numbers(count);
  for (float& each : numbers) each = normal();
  return numbers;
}

struct Free {
  void operator()(uint8_t* memory) const { std::free(memory); }
};
using Panel = std::unique_ptr<uint8_t[], Free>;

Panel panel_of(size_t bytes) {
  const size_t size = (bytes + kLine - 1) / kLine * kLine;
  Panel panel(static_cast<uint8_t*>(std::aligned_alloc(kLine, size)));
  std::memset(panel.get(), 0, size);
  return panel;
}

const Kernels& portable = *scalar_kernels();
const Kernels* tested;
int compared = 0;

uint16_t half_by(const Kernels& kernels, float value) {
  const float values[kPanelRows] = {value};
  uint16_t halves[kPanelRows];
  kernels.halve(values, 1, halves);
  return halves[0];
}

void expect(bool right, const char* what, size_t at, double found, double expected) {
  ++compared;
  if (right) return;
  std::printf("%s: %s at %zu: %.9g, expected %.9g\n", tested->name, what, at, found, expected);
  std::exit(1);
}

// Sums taken in another order: apart by a share of the largest number at most.
void expect_close(const std::vector<float>& found, const std::vector<float>& expected, const char* what,
                  float share = 2e-5f) {
  float largest = 0;
  for (float each : expected) largest = std::fmax(largest, std::fabs(each));
  for (size_t i = 0; i < found.size(); ++i) {
    expect(std::fabs(found[i] - expected[i]) <= share * largest, what, i, found[i], expected[i]);
  }
}

template <typename Number>
void expect_equal(const std::vector<Number>& found, const std::vector<Number>& expected, const char* what) {
  for (size_t i = 0; i < found.size(); ++i) expect(found[i] == expected[i], what, i, found[i], expected[i]);
}

// The inputs of a product: `tokens` rows of `columns` numbers.
struct Tokens {
  Tokens(int tokens, int columns) : values(normals(size_t(tokens) * columns)) {
    const size_t runs = size_t(columns) / kBlock, apart = size_t(tokens + columns % 3);
    numbers.resize(apart * runs * kBlock);
    scales.resize(apart * runs), negated.resize(apart * runs);
    inputs = {values.data(), size_t(columns), {numbers.data(), scales.data(), negated.data(), apart}};
    for (int token = 0; token < tokens && columns % kBlock == 0; ++token) {
      portable.quantise(values.data() + size_t(token) * columns, columns, token, 1, inputs.bytes);
    }
  }
  void all_bytes(int8_t byte) {
    for (int8_t& each : numbers) each = byte;
    for (int32_t& each : negated) each = -byte * kBlock;
  }
  std::vector<float> values;
  std::vector<int8_t> numbers;
  std::vector<float> scales;
  std::vector<int32_t> negated;
  Inputs inputs;
};

void compare_product(Product found, Product expected, const uint8_t* panel, int columns, const Tokens& x, int first,
                     int count, const char* what) {
  std::vector<float> ours(size_t(count) * kPanelRows), theirs(ours.size());
  found(panel, columns, x.inputs, first, count, ours.data());
  expected(panel, columns, x.inputs, first, count, theirs.data());
  expect_close(ours, theirs, what);
}

void plain_products() {
  for (int columns : {1, 7, 32, 172, 577}) {
    const Panel wide = panel_of(size_t(columns) * kPanelRows * 4), narrow = panel_of(size_t(columns) * kPanelRows * 2);
    for (int i = 0; i < columns * kPanelRows; ++i) {
      const float value = normal();
      std::memcpy(wide.get() + size_t(i) * 4, &value, 4);
      const uint16_t half = half_by(portable, value);
      std::memcpy(narrow.get() + size_t(i) * 2, &half, 2);
    }
    for (int count = 1; count <= 37; ++count) {
      const int first = count % 3;
      const Tokens x(first + count, columns);
      compare_product(tested->f32, portable.f32, wide.get(), columns, x, first, count, "f32");
      compare_product(tested->f16, portable.f16, narrow.get(), columns, x, first, count, "f16");
      // As bfloat16 the same bits are numbers of very many sizes, down to 2^-126.
      compare_product(tested->bf16, portable.bf16, narrow.get(), columns, x, first, count, "bf16");
    }
  }
}

// What may stand in a panel of blocks: any bytes, and the largest of one kind, whose sums come nearest to overflow.
void block_products(Product Kernels::*product, int bytes, const char* what) {
  for (int columns : {32, 96, 576}) {
    const int blocks = columns / kBlock;
    const Panel panel = panel_of(numbers_at(blocks - 1, bytes) + bytes);
    for (int i = 0; i < blocks * kPanelRows; ++i) {
      const uint16_t half = half_by(portable, 0.1f * normal());
      std::memcpy(panel.get() + scales_at(i / kPanelRows, bytes) + i % kPanelRows * 2, &half, 2);
    }
    for (int fill : {-1, 0x00, 0x0F, 0x7F, 0x80, 0xF0, 0xFF}) {
      for (int block = 0; block < blocks; ++block) {
        uint8_t* numbers = panel.get() + numbers_at(block, bytes);
        for (int i = 0; i < bytes; ++i) numbers[i] = uint8_t(fill < 0 ? whole(0, 255) : fill);
      }
      for (int count = 1; count <= (fill < 0 ? 37 : 5); ++count) {
        const int first = count % 3;
        Tokens x(first + count, columns);
        if (fill >= 0) x.all_bytes(count % 2 ? 127 : -127);
        compare_product(tested->*product, portable.*product, panel.get(), columns, x, first, count, what);
      }
    }
  }
}

void norms_and_gates() {
  for (int count : {1, 3, 16, 72, 576, 577}) {
    const std::vector<float> x = normals(count), weight = normals(count);
    std::vector<float> ours(count), theirs(count);
    tested->norm(x.data(), weight.data(), 1e-5f, count, ours.data());
    portable.norm(x.data(), weight.data(), 1e-5f, count, theirs.data());
    expect_close(ours, theirs, "norm");
  }
  std::vector<float> gate = normals(4096), up = normals(4096), ours(4096), theirs(4096);
  const float extremes[] = {0, -0.0f, 20, -20, 88, -88, 1e4f, -1e4f, 3e38f, -3e38f, 1e-40f};
  for (size_t i = 0; i < std::size(extremes); ++i) gate[i * 7] = extremes[i], up[i * 7] = 1;
  for (float& each : gate) each *= 4;
  tested->gate(gate.data(), up.data(), 4096 / kPanelRows, ours.data(), kPanelRows);
  portable.gate(gate.data(), up.data(), 4096 / kPanelRows, theirs.data(), kPanelRows);
  for (size_t i = 0; i < ours.size(); ++i) {  // each by itself: they are of all sizes
    const bool same = ours[i] == theirs[i] || std::fabs(ours[i] - theirs[i]) <= 2e-6f * std::fabs(theirs[i]) + 1e-37f;
    expect(same, "gate", i, ours[i], theirs[i]);
  }
}

void rotate() {
  constexpr int kTokens = 5, kStride = kPanelRows + 3;
  std::vector<float> x = normals(kTokens * kPanelRows), right = x;
  const std::vector<float> cosines = normals(kTokens * kStride), sines = normals(kTokens * kStride);
  for (int i = 0; i < kTokens * kPanelRows; ++i) {
    const int at = i / kPanelRows * kStride + i % kPanelRows;
    right[i] = x[i] * cosines[at] + x[i ^ 1] * sines[at];
  }
  tested->rotate(x.data(), kTokens, cosines.data(), sines.data(), kStride);
  expect_close(x, right, "rotate");
}

void add() {
  constexpr int kTokens = 5, kStride = kPanelRows + 3;
  const std::vector<float> x = normals(kTokens * kPanelRows);
  std::vector<float> out = normals(kTokens * kStride), right = out;
  for (int i = 0; i < kTokens * kPanelRows; ++i) right[i / kPanelRows * kStride + i % kPanelRows] += x[i];
  tested->add(x.data(), kTokens, out.data(), kStride);
  expect_equal(out, right, "add");
}

void quantise() {
  constexpr int kCount = 64 * kBlock;
  std::vector<float> x = normals(kCount);
  for (int i = 0; i < kBlock; ++i) {
    x[i] = 0;                                 // a block without a scale
    x[kBlock + i] = float(i) + 0.5f;          // halves
    x[2 * kBlock + i] = -float(i) * 1e-38f;   // numbers below the normal ones
    x[3 * kBlock + i] *= 1e38f;
    x[4 * kBlock + i] = i == 5 ? -127.0f : float(i % 4) + 0.5f;  // a scale of 1: halves go to the even number
  }
  std::vector<int8_t> bytes(kCount), right_bytes(kCount);
  std::vector<float> scales(64), right_scales(64);
  std::vector<int32_t> sums(64), right_sums(64);
  tested->quantise(x.data(), kCount, 0, 1, {bytes.data(), scales.data(), sums.data(), 1});
  portable.quantise(x.data(), kCount, 0, 1, {right_bytes.data(), right_scales.data(), right_sums.data(), 1});
  expect_equal(bytes, right_bytes, "quantise: bytes");
  expect_equal(scales, right_scales, "quantise: scales");
  expect_equal(sums, right_sums, "quantise: sums");
  expect(right_bytes[4 * kBlock] == 0 && right_bytes[4 * kBlock + 1] == 2, "halves to even", 0, right_bytes[4 * kBlock], 0);
}

// What is infinite or no number at one place of a block makes every product with that block no number.
void lost_numbers(Product Kernels::*product, int bytes, const char* what) {
  constexpr int kColumns = 2 * kBlock;
  const Panel panel = panel_of(numbers_at(1, bytes) + bytes);
  for (size_t i = 0; i < numbers_at(1, bytes) + bytes; ++i) panel[i] = uint8_t(whole(0, 0x7B));  // scales are finite
  for (float lost : {NAN, -NAN, INFINITY, -INFINITY}) {
    for (int place = 0; place < kColumns; ++place) {
      Tokens x(3, kColumns);
      x.values[size_t(kColumns) + place] = lost;
      tested->quantise(x.values.data(), kColumns, 0, 3, x.inputs.bytes);
      std::vector<float> out(3 * kPanelRows);
      (tested->*product)(panel.get(), kColumns, x.inputs, 0, 3, out.data());
      for (int i = 0; i < 3 * kPanelRows; ++i) {
        const bool is_lost = i / kPanelRows == 1;
        expect(is_lost ? std::isnan(out[i]) : std::isfinite(out[i]), what, place, out[i], is_lost ? lost : 0);
      }
    }
  }
}

const uint8_t* bytes_of(const std::vector<uint16_t>& numbers) {
  return reinterpret_cast<const uint8_t*>(numbers.data());
}

void attention() {
  for (int head_dim : {10, 64, 72, 128}) {
    const int value_stride = (head_dim + 15) / 16 * 16;
    std::vector<uint16_t> keys(size_t(kSpan) * head_dim), values(size_t(kSpan) * value_stride);
    for (uint16_t& each : keys) each = half_by(portable, normal());
    for (uint16_t& each : values) each = half_by(portable, normal());
    for (int positions : {1, 15, 16, 17, 100, kSpan}) {
      for (int count : {1, 3, 4, 16, 48}) {
        const std::vector<float> queries = normals(size_t(head_dim) * count);
        std::vector<int> visible(count);
        for (int& each : visible) each = whole(-3, positions + 20);
        struct Result {
          std::vector<float> out, largest, total;
          Partial partial() { return {out.data(), largest.data(), total.data()}; }
        };
        const size_t size = size_t(count) * value_stride;
        const auto attended = [&](const Kernels& kernels) {
          std::vector<float> scores(size_t(count) * kSpan, 7.0f);
          Result result{std::vector<float>(size, 7.0f), std::vector<float>(count), std::vector<float>(count)};
          kernels.attend({bytes_of(keys), bytes_of(values), head_dim, value_stride, positions, queries.data(), {}, 0,
                          visible.data(), count, scores.data(), nullptr, nullptr},
                         result.partial());
          return result;
        };
        Result ours = attended(*tested), theirs = attended(portable);
        expect_close(ours.out, theirs.out, "attend: out");
        expect_close(ours.total, theirs.total, "attend: total");
        for (int i = 0; i < count; ++i) {
          const bool same = ours.largest[i] == theirs.largest[i] ||
                            std::fabs(ours.largest[i] - theirs.largest[i]) < 1e-4f * (1 + std::fabs(theirs.largest[i]));
          expect(same, "attend: largest", i, ours.largest[i], theirs.largest[i]);
        }
        Result into{normals(size), normals(count), std::vector<float>(count, 1.5f)};
        into.total[0] = 0, into.largest[0] = -INFINITY;  // nothing was there
        for (int i = 0; i < value_stride; ++i) into.out[i] = 0;
        Result right = into;
        tested->merge(into.partial(), theirs.partial(), count, value_stride);
        portable.merge(right.partial(), theirs.partial(), count, value_stride);
        expect_close(into.out, right.out, "merge: out");
        expect_close(into.total, right.total, "merge: total");
        expect_equal(into.largest, right.largest, "merge: largest");
      }
    }
  }
}

// Keys and values in 8 bits: random ones, and all at either end. The portable kernels compute with floats what others
// may compute with weights in 16 bits, which is a 500th of the rounding of the values.
void attention_in_bytes() {
  for (int head_dim : {32, 64, 96}) {
    const int runs = head_dim / kBlock, tiles = kSpan / 16;
    const size_t tile = cache_tile_bytes(head_dim);
    const Panel keys = panel_of(tiles * tile), values = panel_of(tiles * tile);
    for (int fill : {-1, 0x7F, 0x80}) {
      for (size_t i = 0; i < tiles * tile; ++i) {
        keys[i] = uint8_t(fill < 0 ? whole(0, 255) : fill), values[i] = uint8_t(fill < 0 ? whole(0, 255) : fill);
      }
      for (int i = 0; i < tiles * runs * 16; ++i) {  // scales: of keys around 0.01, of values up to 1
        const uint16_t of_keys = half_by(portable, 0.01f * std::fabs(normal()));
        const uint16_t of_values = half_by(portable, std::exp(-3 * std::fabs(normal())));
        const int at_tile = i / (runs * 16), run = i / 16 % runs, position = i % 16;
        std::memcpy(&keys[at_tile * tile + scales_at(run, kPanelRows * 32) + position * 2], &of_keys, 2);
        std::memcpy(&values[at_tile * tile + size_t(run * 16 + position) * 2], &of_values, 2);
      }
      for (int positions : {1, 15, 16, 17, 100, kSpan}) {
        for (int count : {1, 3, 4, 7, 16, 48}) {
          const Tokens queries(count + 2, head_dim);
          std::vector<int> visible(count);
          for (int& each : visible) each = whole(-3, positions + 20);
          struct Result {
            std::vector<float> out, largest, total;
          };
          const auto attended = [&](const Kernels& kernels) {
            std::vector<float> scores(size_t(count) * kSpan, 7.0f), room(size_t(count) * kSpan, 7.0f);
            Result result{std::vector<float>(size_t(count) * head_dim, 7.0f), std::vector<float>(count),
                          std::vector<float>(count)};
            kernels.attend_q8_0({keys.get(), values.get(), head_dim, head_dim, positions, nullptr,
                                 queries.inputs.bytes, 2, visible.data(), count, scores.data(), room.data(), keys.get()},
                                {result.out.data(), result.largest.data(), result.total.data()});
            return result;
          };
          const Result ours = attended(*tested), theirs = attended(portable);
          expect_close(ours.out, theirs.out, "attend in bytes: out", 3e-4f);
          expect_close(ours.total, theirs.total, "attend in bytes: total");
          for (int i = 0; i < count; ++i) {
            const bool same = ours.largest[i] == theirs.largest[i] || std::fabs(ours.largest[i] - theirs.largest[i]) <
                                                                          1e-4f * (1 + std::fabs(theirs.largest[i]));
            expect(same, "attend in bytes: largest", i, ours.largest[i], theirs.largest[i]);
            const bool blind = visible[i] <= 0;
            expect(!blind || ours.out[size_t(i) * head_dim] == 0, "who sees nothing", i, ours.out[i * head_dim], 0);
          }
        }
      }
    }
  }
}

// float16 of every size and of both sides of every rounding.
void halves() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    for (int32_t beside : {-1, 0, 1, 0xFFF, 0x1000, 0x1001}) {
      const uint32_t wide = (bits << 13 & 0x0FFFFFFF) + 0x30000000 + uint32_t(beside);
      for (uint32_t sign : {0u, 0x80000000u}) {
        const uint32_t whole = wide | sign;
        float value;
        std::memcpy(&value, &whole, 4);
        expect(half_by(*tested, value) == half_by(portable, value), "half", whole, half_by(*tested, value), half_by(portable, value));
      }
    }
  }
  for (float value : {0.0f, -0.0f, 1e-30f, 2.98e-8f, 65519.0f, 65520.0f, 1e30f, INFINITY, -INFINITY}) {
    expect(half_by(*tested, value) == half_by(portable, value), "half", 0, half_by(*tested, value), half_by(portable, value));
  }
  expect((half_by(*tested, NAN) & 0x7FFF) > 0x7C00, "half of no number", 0, half_by(*tested, NAN), 0x7E00);
}

void compare(const Kernels* kernels, const char* how) {
  if (!(tested = kernels)) return;
  compared = 0;
  plain_products();
  block_products(&Kernels::q8_0, kPanelRows * 32, "q8_0");
  block_products(&Kernels::q4_0, kPanelRows * 16, "q4_0");
  norms_and_gates();
  rotate();
  add();
  quantise();
  lost_numbers(&Kernels::q8_0, kPanelRows * 32, "q8_0 of what is no number");
  lost_numbers(&Kernels::q4_0, kPanelRows * 16, "q4_0 of what is no number");
  attention();
  attention_in_bytes();
  halves();
  std::printf("%s%s: %d numbers are right\n", kernels->name, how, compared);
}

}  // namespace

int main() {
  for (const char* isa : {"avx512", "avx512vl", "avxvnni", "avx2", "dotprod", "neon"}) compare(kernels_for(isa), "");
  std::printf("best: %s\n", kernels_for("")->name);
  compare(emulated_avxvnni(), ", emulated");
}
