// What differs between instruction sets: one table of functions each, filled in kernels_*.cpp.
//
// A matrix lies in panels of 16 rows. For every run of 4 columns a panel of blocks holds 16 rows x 4 numbers
// side by side, so that one load feeds 8 or 16 rows, the rows' scales apply as one vector, and no sum has to
// be taken across a register. The scales of two blocks, a line of 64 bytes, stand before their numbers: a panel
// is read from its first byte to its last, for the processor foresees one stream and not two. Plain numbers lie
// column by column, 16 rows side by side. All instruction sets read the same layout; the order of sums of floats is
// the same within each.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mobilellm {

constexpr int kPanelRows = 16;
constexpr int kBlock = 32;  // columns that share a scale
constexpr int kSpan = 128;  // positions whose attention is one piece of work; sums are taken span by span

enum class Type : int32_t { F32 = 0, F16 = 1, Q4_0 = 2, Q8_0 = 8, BF16 = 30 };  // ggml's numbers

static inline constexpr bool in_blocks(Type type) { return type == Type::Q8_0 || type == Type::Q4_0; }

// Where a block's scales (float16, of 16 rows) and its numbers stand in a panel whose blocks have `bytes` bytes.
// (Static, as all that is compiled for several processors: versions of one name would be merged into one of them.)
static inline constexpr size_t scales_at(int block, int bytes) {
  return size_t(block / 2) * (64 + 2 * bytes) + block % 2 * 32;
}
static inline constexpr size_t numbers_at(int block, int bytes) {
  return size_t(block / 2 + 1) * 64 + size_t(block) * bytes;
}

// Where the numbers stand in a tile of 16 positions' values in 8 bits, after their runs' scales, and the bytes of such a
// tile: as many as keys take, which lie as a panel.
static inline constexpr size_t value_numbers_at(int head_dim) { return size_t((head_dim / kBlock + 1) / 2) * 64; }
static inline constexpr size_t cache_tile_bytes(int head_dim) { return value_numbers_at(head_dim) + size_t(head_dim) * 16; }

// Columns in 8 bits, in runs of 32 with a scale each; all tokens' of a run stand together, in the order in which a
// tile of tokens is multiplied.
struct Bytes {
  int8_t* numbers;   // (runs, tokens, 32)
  float* scales;     // (runs, tokens)
  int32_t* negated;  // (runs, tokens): minus the sum of a run, for weights that are stored with an offset
  size_t tokens;
};

// The inputs of a product: as they are, and in 8 bits where matrices in blocks need them.
struct Inputs {
  const float* values;  // (tokens, columns)
  size_t columns;       // from one token to the next
  Bytes bytes;
  // A panel like the product's own that is read later, to be fetched meanwhile, or null. Products of few tokens by
  // nibbles have no time for it: what the next block gained, this one lost.
  const uint8_t* ahead = nullptr;
};

// out (count, 16) = the panel's rows times the inputs of tokens first ... first + count - 1.
using Product = void (*)(const uint8_t* panel, int columns, const Inputs& x, int first, int count, float* out);

// One span of positions of one key/value head of one executed step, and the queries that look at it.
struct Attention {
  const uint8_t *keys, *values;  // as sequence.h says for the type of the cache
  int head_dim, value_stride;    // value_stride: head_dim, or the next multiple of 16
  int positions;                 // of the span that are looked at, kSpan at most
  const float* queries;          // (count, head_dim), for keys in float16
  Bytes rounded;                 // for keys in 8 bits: queries first ... first + count - 1 of these
  int first;
  const int* visible;  // (count): positions of the span that a query sees; may be more, or less than none
  int count;
  float *scores, *room;  // for (count, kSpan) each; float16 needs no second one
  const uint8_t* next;   // keys in 8 bits that are read after this, to be fetched meanwhile; may be null
};

// A softmax under way: out (count, value_stride) is the sum of values by e^(score - largest), total that of the
// weights.
struct Partial {
  float* out;
  float* largest;
  float* total;
};

using Attend = void (*)(const Attention& attention, const Partial& partial);

struct Kernels {
  const char* name;
  Product f32, f16, bf16, q8_0, q4_0;
  // out = x / sqrt(mean of squares + epsilon) * weight
  void (*norm)(const float* x, const float* weight, float epsilon, int count, float* out);
  // x (tokens, columns) in 8 bits, as the readable definition says, to bytes' tokens from `first` on; columns are a
  // multiple of 32.
  void (*quantise)(const float* x, int columns, int first, int tokens, const Bytes& bytes);
  // out (tokens, kPanelRows; `stride` floats apart) = silu(gate) * up, both (tokens, kPanelRows)
  void (*gate)(const float* gate, const float* up, int tokens, float* out, size_t stride);
  // out (tokens, kPanelRows; `stride` floats apart) += x (tokens, kPanelRows)
  void (*add)(const float* x, int tokens, float* out, size_t stride);
  // Turn x (tokens, kPanelRows) in pairs: x = x * cosines + the other of its pair * sines, minus sines for the first.
  // Both are `stride` floats apart.
  void (*rotate)(float* x, int tokens, const float* cosines, const float* sines, size_t stride);
  Attend attend, attend_q8_0;  // of these positions alone, in float16 and in 8 bits
  void (*merge)(const Partial& into, const Partial& part, int count, int value_stride);
  // out (tokens, kPanelRows) = x in float16, to the nearest, halves to even
  void (*halve)(const float* x, int tokens, uint16_t* out);
};

const Kernels* scalar_kernels();
const Kernels* avx2_kernels();
const Kernels* avxvnni_kernels();  // null where the compiler does not know them
const Kernels* avx512vl_kernels();
const Kernels* avx512_kernels();
const Kernels* neon_kernels();
const Kernels* dotprod_kernels();

// The kernels of a name, or the best ones for ""; NULL where the processor cannot run them.
const Kernels* kernels_for(const char* isa);

}  // namespace mobilellm
