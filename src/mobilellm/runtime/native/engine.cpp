#include "engine.h"

#include <atomic>
#include <cstdio>
#include <new>

#include "forward.h"

using namespace mobilellm;

struct mobilellm_model {
  mobilellm_model(const mobilellm_shape& shape, const int32_t* schedule, const mobilellm_tensor* tensors,
                  const float* norms, int threads, const Kernels& kernels, Type cache)
      : model(shape, schedule, tensors, norms, threads, kernels, cache), scratch(model) {}
  Model model;
  Scratch scratch;
};

struct mobilellm_sequence : Sequence {
  using Sequence::Sequence;
};

namespace {

template <typename Run>
int32_t guarded(const Run& run) {
  try {
    return run();
  } catch (const std::bad_alloc&) {
    return MOBILELLM_NO_MEMORY;
  }
}

}  // namespace

mobilellm_model* mobilellm_create(const mobilellm_shape* shape, const int32_t* schedule,
                                  const mobilellm_tensor* tensors, const float* norms, int32_t cache,
                                  int32_t threads, const char* isa, char* error, size_t error_size) {
  const Kernels* kernels = kernels_for(isa);
  if (!kernels) {
    std::snprintf(error, error_size, "this processor, or this build, has no %s; the best it has is %s", isa,
                  kernels_for("")->name);
    return nullptr;
  }
  try {
    return new mobilellm_model(*shape, schedule, tensors, norms, threads, *kernels, Type(cache));
  } catch (const std::bad_alloc&) {
    std::snprintf(error, error_size, "there is not enough memory for the model");
  } catch (const std::exception& fault) {
    std::snprintf(error, error_size, "%d threads could not be started: %s", threads, fault.what());
  }
  return nullptr;
}

void mobilellm_fill(mobilellm_model* model, int32_t part, int32_t piece, int32_t pieces) {
  model->model.fill(part, piece, pieces);
}

void mobilellm_destroy(mobilellm_model* model) { delete model; }

const char* mobilellm_isa(const mobilellm_model* model) { return model->model.kernels.name; }

int64_t mobilellm_arena_bytes(const mobilellm_model* model) { return int64_t(model->model.arena.size()); }

mobilellm_sequence* mobilellm_sequence_create(const mobilellm_model* model, int32_t capacity) {
  try {
    return new mobilellm_sequence(model->model, capacity);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

void mobilellm_sequence_destroy(mobilellm_sequence* sequence) { delete sequence; }

void mobilellm_sequence_read(const mobilellm_sequence* sequence, int32_t length, void* keys, void* values) {
  sequence->read(length, static_cast<uint8_t*>(keys), static_cast<uint8_t*>(values));
}

void mobilellm_sequence_write(mobilellm_sequence* sequence, int32_t length, const void* keys, const void* values) {
  sequence->write(length, static_cast<const uint8_t*>(keys), static_cast<const uint8_t*>(values));
}

int32_t mobilellm_forward(mobilellm_model* model, int32_t count, const int32_t* tokens,
                          mobilellm_sequence* const* sequences, const int32_t* positions, float* states) {
  for (int i = 0; i < count; ++i) {
    if (tokens[i] < 0 || tokens[i] >= model->model.shape.vocab_size || positions[i] < 0 ||
        positions[i] >= sequences[i]->capacity) {
      return MOBILELLM_REFUSED;
    }
  }
  return guarded([&] {
    std::vector<Row> rows;
    for (int first = 0; first < count; first += kMostRows) {
      const int end = first + kMostRows < count ? first + kMostRows : count;
      rows.clear();
      for (int i = first; i < end; ++i) rows.push_back({tokens[i], sequences[i], positions[i]});
      float* out = states + size_t(first) * model->model.shape.hidden_size;
      if (!forward(model->model, model->scratch, rows, out)) return MOBILELLM_CANCELLED;
    }
    return MOBILELLM_DONE;
  });
}

int32_t mobilellm_logits(mobilellm_model* model, int32_t count, const float* states, float* out) {
  return guarded([&] {
    const mobilellm_shape& shape = model->model.shape;
    for (int first = 0; first < count; first += kMostRows) {
      const int rows = first + kMostRows < count ? kMostRows : count - first;
      if (!logits(model->model, model->scratch, rows, states + size_t(first) * shape.hidden_size,
                  out + size_t(first) * shape.vocab_size)) {
        return MOBILELLM_CANCELLED;
      }
    }
    return MOBILELLM_DONE;
  });
}

int32_t mobilellm_use_threads(mobilellm_model* model, int32_t threads) {
  try {
    model->model.team.use(threads);
    return MOBILELLM_DONE;
  } catch (const std::exception&) {
    return MOBILELLM_REFUSED;
  }
}

void mobilellm_cancel(mobilellm_model* model) { model->model.team.cancel(); }

int32_t mobilellm_half(const char* isa, float value) {
  const Kernels* kernels = kernels_for(isa);
  if (!kernels) return -1;
  const float values[kPanelRows] = {value};
  uint16_t halves[kPanelRows];
  kernels->halve(values, 1, halves);
  return halves[0];
}

uint64_t mobilellm_read(mobilellm_model* model, const void* data, size_t size) {
  struct Job {
    Team& team;
    const uint64_t* from;
    size_t count;
    std::atomic<uint64_t> sum{0};
  } job{model->model.team, static_cast<const uint64_t*>(data), size / 8};
  job.team.run(
      [](void* context, int thread) {
        Job& job = *static_cast<Job*>(context);
        constexpr size_t kPiece = 1 << 15, kAhead = 256;  // a little faster than without
        uint64_t sums[32] = {};
        for (Shares shares(job.team, thread, int(job.count / kPiece), 1); shares.next();) {
          const size_t at = size_t(shares.first) * kPiece;
          for (size_t i = at; i < at + kPiece; i += 32) {
            for (size_t line = 0; line < 32; line += 8) __builtin_prefetch(job.from + i + kAhead + line, 0, 2);
            for (int lane = 0; lane < 32; ++lane) sums[lane] += job.from[i + lane];
          }
        }
        for (uint64_t each : sums) job.sum += each;
      },
      &job);
  return job.sum;
}
