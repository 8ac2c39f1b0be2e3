#include "model.h"

#include <sys/mman.h>

#include <cmath>
#include <cstring>
#include <new>
#include <utility>

namespace mobilellm {
namespace {

constexpr size_t kHugePage = size_t(1) << 21;
constexpr int kMatrices = 7;  // of a block

size_t panel_bytes(Type type, int columns) {
  switch (type) {
    case Type::F32: return size_t(columns) * kPanelRows * 4;
    case Type::Q8_0: return numbers_at(columns / kBlock - 1, kPanelRows * 32) + kPanelRows * 32;
    case Type::Q4_0: return numbers_at(columns / kBlock - 1, kPanelRows * 16) + kPanelRows * 16;
    default: return (size_t(columns) * kPanelRows * 2 + 63) / 64 * 64;
  }
}

size_t row_bytes(Type type, int columns) {
  switch (type) {
    case Type::F32: return size_t(columns) * 4;
    case Type::Q8_0: return size_t(columns / kBlock) * 34;
    case Type::Q4_0: return size_t(columns / kBlock) * 18;
    default: return size_t(columns) * 2;
  }
}

Matrix shaped(const mobilellm_tensor& tensor) {
  const Type type = Type(tensor.type);
  const size_t bytes = panel_bytes(type, tensor.columns);
  return {type, tensor.rows, tensor.columns, (tensor.rows + kPanelRows - 1) / kPanelRows, nullptr, bytes, bytes};
}

// Blocks of `Quants` bytes after a scale: four bytes of 16 rows side by side, eight or four times a block.
template <int Quants>
void pack_blocks(const uint8_t* from, int rows, int columns, uint8_t* to) {
  constexpr int bytes = kPanelRows * Quants;
  for (int row = 0; row < rows; ++row) {
    for (int block = 0; block < columns / kBlock; ++block, from += 2 + Quants) {
      std::memcpy(to + scales_at(block, bytes) + row * 2, from, 2);
      uint8_t* place = to + numbers_at(block, bytes) + row * 4;
      for (int group = 0; group < Quants / 4; ++group) std::memcpy(place + group * 64, from + 2 + group * 4, 4);
    }
  }
}

template <typename Number>
void pack_plain(const uint8_t* from, int rows, int columns, uint8_t* to) {
  for (int row = 0; row < rows; ++row) {
    for (int column = 0; column < columns; ++column, from += sizeof(Number)) {
      std::memcpy(to + (size_t(column) * kPanelRows + row) * sizeof(Number), from, sizeof(Number));
    }
  }
}

void pack(const mobilellm_tensor& tensor, const Matrix& matrix, int panel) {
  const int first = panel * kPanelRows;
  const int rows = matrix.rows - first < kPanelRows ? matrix.rows - first : kPanelRows;
  const uint8_t* from = static_cast<const uint8_t*>(tensor.data) + first * row_bytes(matrix.type, matrix.columns);
  uint8_t* to = matrix.data + size_t(panel) * matrix.stride;
  switch (matrix.type) {
    case Type::F32: return pack_plain<float>(from, rows, matrix.columns, to);
    case Type::Q8_0: return pack_blocks<32>(from, rows, matrix.columns, to);
    case Type::Q4_0: return pack_blocks<16>(from, rows, matrix.columns, to);
    default: return pack_plain<uint16_t>(from, rows, matrix.columns, to);
  }
}

// Give a matrix its place `at` bytes into the arena, of which there may be none yet.
void place(Matrix& matrix, uint8_t* arena, size_t at) { matrix.data = arena ? arena + at : nullptr; }

// One number of any plain type.
float wide_at(const uint8_t* place, Type type) {
  uint32_t bits;
  uint16_t number = 0;
  if (type == Type::F32) {
    std::memcpy(&bits, place, 4);
  } else {
    std::memcpy(&number, place, 2);
    bits = uint32_t(number) << 16;
  }
  if (type != Type::F16) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  const int exponent = number >> 10 & 31, fraction = number & 1023;
  float value = exponent == 31  ? (fraction ? NAN : INFINITY)
                : exponent == 0 ? std::ldexp(float(fraction), -24)
                                : std::ldexp(float(fraction + 1024), exponent - 25);
  return number & 0x8000 ? -value : value;
}

}  // namespace

Model::Model(const mobilellm_shape& shape_, const int32_t* schedule_, const mobilellm_tensor* tensors_,
             const float* norms_, int threads, const Kernels& kernels_, Type cache_)
    : shape(shape_),
      kernels(kernels_),
      cache(cache_),
      schedule(schedule_, schedule_ + shape.num_steps),
      norms(norms_, norms_ + size_t(shape.hidden_size) * (2 * shape.num_layers + 1)),
      tensors(tensors_, tensors_ + 2 + size_t(kMatrices) * shape.num_layers),
      team(threads) {
  for (int i = 0; i < shape.head_dim; i += 2) {
    frequencies.push_back(std::pow(shape.rope_theta, double(i) / shape.head_dim));
  }
  for (int index = 0; index < shape.num_layers; ++index) {
    const mobilellm_tensor* its = &tensors[1 + size_t(kMatrices) * index];
    const float* its_norms = &norms[2 * size_t(index) * shape.hidden_size];
    blocks.push_back({shaped(its[0]), shaped(its[1]), shaped(its[2]), shaped(its[3]), shaped(its[4]),
                      shaped(its[5]), shaped(its[6]), its_norms, its_norms + shape.hidden_size});
  }
  head = shaped(tensors.back());
  arena = Arena(lay_out(nullptr));
  lay_out(arena.data());
}

size_t Model::lay_out(uint8_t* data) {
  size_t at = 0;
  const auto put = [&](Matrix& matrix) {
    place(matrix, data, at);
    at += matrix.panels * matrix.stride;
  };
  for (Block& block : blocks) {
    for (Matrix* matrix : {&block.q, &block.k, &block.v, &block.output}) put(*matrix);
    block.gate.stride = block.up.stride = block.gate.panel_bytes + block.up.panel_bytes;
    place(block.up, data, at + block.gate.panel_bytes);
    put(block.gate);
    put(block.down);
  }
  put(head);
  return at;
}

void Model::fill(int part, int piece, int pieces) {
  std::vector<std::pair<const mobilellm_tensor*, const Matrix*>> pairs;
  if (part == shape.num_layers) {
    pairs = {{&tensors.back(), &head}};
  } else {
    const Block& block = blocks[part];
    const mobilellm_tensor* its = &tensors[1 + size_t(kMatrices) * part];
    for (const Matrix* matrix :
         {&block.q, &block.k, &block.v, &block.output, &block.gate, &block.up, &block.down}) {
      pairs.push_back({its++, matrix});
    }
  }
  struct Job {
    Team& team;
    decltype(pairs)& work;
    int64_t piece, pieces;
  } job{team, pairs, piece, pieces};
  team.run(
      [](void* context, int thread) {
        Job& job = *static_cast<Job*>(context);
        for (const auto& [tensor, matrix] : job.work) {
          const int first = int(matrix->panels * job.piece / job.pieces);
          const int end = int(matrix->panels * (job.piece + 1) / job.pieces);
          for (Shares shares(job.team, thread, end - first, 16); shares.next();) {
            for (int panel = shares.first; panel < shares.end; ++panel) pack(*tensor, *matrix, first + panel);
          }
          job.team.meet(thread);
        }
      },
      &job);
}

void Model::embed(int32_t token, float* out) const {
  const mobilellm_tensor& tensor = tensors.front();
  const Type type = Type(tensor.type);
  const bool tied = tensor.data == tensors.back().data;  // then it is in the arena, and the file's pages are not needed
  const uint8_t* line = static_cast<const uint8_t*>(tensor.data) + size_t(token) * row_bytes(type, tensor.columns);
  const uint8_t* panel = head.panel(token / kPanelRows);
  const int row = token % kPanelRows;
  if (in_blocks(type)) {
    const int bytes = type == Type::Q8_0 ? 32 : 16, all = kPanelRows * bytes;
    const size_t apart = tied ? 4 * kPanelRows : 4;
    for (int block = 0; block < tensor.columns / kBlock; ++block, out += kBlock) {
      const uint8_t* half = tied ? panel + scales_at(block, all) + row * 2 : line + block * (2 + bytes);
      const uint8_t* numbers = tied ? panel + numbers_at(block, all) + row * 4 : half + 2;
      const auto byte = [&](int i) { return numbers[i / 4 * apart + i % 4]; };
      const float scale = wide_at(half, Type::F16);
      for (int i = 0; i < kBlock; ++i) {
        const int q = type == Type::Q8_0 ? int(int8_t(byte(i))) : (i < 16 ? byte(i) & 15 : byte(i - 16) >> 4) - 8;
        out[i] = scale * float(q);
      }
    }
  } else {
    const size_t size = type == Type::F32 ? 4 : 2, apart = tied ? size * kPanelRows : size;
    const uint8_t* from = tied ? panel + row * size : line;
    for (int i = 0; i < tensor.columns; ++i, from += apart) out[i] = wide_at(from, type);
  }
}

Product Model::product(Type type) const {
  switch (type) {
    case Type::F32: return kernels.f32;
    case Type::F16: return kernels.f16;
    case Type::BF16: return kernels.bf16;
    case Type::Q8_0: return kernels.q8_0;
    default: return kernels.q4_0;
  }
}

Arena::Arena(size_t bytes) : size_(bytes) {
  mapped_size_ = bytes + kHugePage;
  mapped_ = mmap(nullptr, mapped_size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped_ == MAP_FAILED) {
    mapped_ = nullptr;
    throw std::bad_alloc();
  }
  const uintptr_t aligned = (reinterpret_cast<uintptr_t>(mapped_) + kHugePage - 1) & ~(kHugePage - 1);
  data_ = reinterpret_cast<uint8_t*>(aligned);
#if defined(MADV_HUGEPAGE)
  madvise(data_, bytes & ~(kHugePage - 1), MADV_HUGEPAGE);  // a wish: refusal is no fault
#endif
}

Arena::~Arena() {
  if (mapped_) munmap(mapped_, mapped_size_);
}

Arena& Arena::operator=(Arena&& other) noexcept {
  std::swap(mapped_, other.mapped_);
  std::swap(mapped_size_, other.mapped_size_);
  std::swap(size_, other.size_);
  std::swap(data_, other.data_);
  return *this;
}

}  // namespace mobilellm
