// The engine's C interface. Calls on one model must not overlap, `cancel` excepted. Python has read and checked
// the file; what is said here about sizes is relied on.
#pragma once

#include <cstddef>
#include <cstdint>

#pragma GCC visibility push(default)
extern "C" {

struct mobilellm_model;
struct mobilellm_sequence;

struct mobilellm_shape {
  int32_t vocab_size, hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, head_dim, num_steps;
  float rms_norm_eps;
  double rope_theta;
};

struct mobilellm_tensor {
  const void* data;  // as in the file; read until its part is filled, an embedding that is not the head always
  int32_t type;      // ggml's number
  int32_t rows, columns;
};

enum mobilellm_result { MOBILELLM_DONE = 0, MOBILELLM_CANCELLED = 1, MOBILELLM_NO_MEMORY = 2, MOBILELLM_REFUSED = 3 };

// schedule (num_steps): the block of every step. tensors: the embedding; of every block q, k, v, output, gate,
// up, down; the head. norms (hidden_size each): of every block before attention and before the feed-forward
// part; the last one. cache: the type of all its sequences' keys and values, F16, or Q8_0 where 32 divides head_dim.
// isa: "" for the best this processor has. NULL, and one line in `error`, if it cannot be.
mobilellm_model* mobilellm_create(const mobilellm_shape* shape, const int32_t* schedule,
                                  const mobilellm_tensor* tensors, const float* norms, int32_t cache,
                                  int32_t threads, const char* isa, char* error, size_t error_size);
// Bring one of `pieces` equal pieces of block `part`, or of the head where part = num_layers, into the arena.
// All of them once, before all else. A piece is whole panels of 16 rows: from row panels * piece / pieces * 16.
void mobilellm_fill(mobilellm_model* model, int32_t part, int32_t piece, int32_t pieces);
void mobilellm_destroy(mobilellm_model* model);
const char* mobilellm_isa(const mobilellm_model* model);
int64_t mobilellm_arena_bytes(const mobilellm_model* model);

// Keys and values of one sequence of at most `capacity` tokens; NULL where there is no memory.
mobilellm_sequence* mobilellm_sequence_create(const mobilellm_model* model, int32_t capacity);
void mobilellm_sequence_destroy(mobilellm_sequence* sequence);
// Keys and values of the first `length` positions, (num_steps, length, num_kv_heads, head_dim) each, numbers in float16
// or in blocks of Q8_0 as in a file: out of the sequence, and into it.
void mobilellm_sequence_read(const mobilellm_sequence* sequence, int32_t length, void* keys, void* values);
void mobilellm_sequence_write(mobilellm_sequence* sequence, int32_t length, const void* keys, const void* values);

// states (count, hidden_size) of `count` tokens. Row i stands at positions[i] of sequences[i]; the rows of a
// sequence stand together and in order, and the positions before its first row have been fed already.
int32_t mobilellm_forward(mobilellm_model* model, int32_t count, const int32_t* tokens,
                          mobilellm_sequence* const* sequences, const int32_t* positions, float* states);
// logits (count, vocab_size) of states (count, hidden_size).
int32_t mobilellm_logits(mobilellm_model* model, int32_t count, const float* states, float* logits);
// Let the calls that follow run on `threads` threads, 256 at most; the numbers they give do not depend on it. REFUSED
// where they cannot be started, and all stays as it was.
int32_t mobilellm_use_threads(mobilellm_model* model, int32_t threads);
// Make the call that is running on another thread return MOBILELLM_CANCELLED; nothing where none is.
void mobilellm_cancel(mobilellm_model* model);

// The bits of `value` in float16 by the kernels named, as keys and values are stored; -1 where they cannot run.
int32_t mobilellm_half(const char* isa, float value);
// Sum of `size` bytes read by the model's threads: the memory's speed, for comparison.
uint64_t mobilellm_read(mobilellm_model* model, const void* data, size_t size);
}
#pragma GCC visibility pop
