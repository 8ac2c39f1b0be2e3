// AVX-VNNI's one instruction that the engine uses, computed for processors that lack it: they stop at it with SIGILL, and
// what handles the signal computes it in the registers that the program goes on with. For Linux on x86-64.
#pragma once

#include "kernels.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <signal.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace vpdpbusd {

struct Ymm {
  uint8_t low[16], high[16];
};

// The saved registers as the processor writes them (XSAVE): the lower halves of the 16 registers stand at 160, the upper
// ones where the processor says; unless a bit at 512 is set these are zero.
class Registers {
 public:
  explicit Registers(ucontext_t* context) : area_(reinterpret_cast<uint8_t*>(context->uc_mcontext.fpregs)) {
    unsigned size, flags, rest;
    __get_cpuid_count(0xD, 2, &size, &highs_, &flags, &rest);
    if (area_[512] & 4) return;
    std::memset(area_ + highs_, 0, 256);
    area_[512] |= 4;
  }
  Ymm get(int number) const {
    Ymm ymm;
    std::memcpy(ymm.low, area_ + 160 + 16 * number, 16);
    std::memcpy(ymm.high, area_ + highs_ + 16 * number, 16);
    return ymm;
  }
  void set(int number, const Ymm& ymm) {
    std::memcpy(area_ + 160 + 16 * number, ymm.low, 16);
    std::memcpy(area_ + highs_ + 16 * number, ymm.high, 16);
  }

 private:
  uint8_t* area_;
  unsigned highs_;
};

// What an instruction's last operand is and where the instruction ends, from its ModRM byte on.
struct Operand {
  Operand(const uint8_t* modrm, bool index_8, bool base_8, const greg_t* general) {
    const int mode = *modrm >> 6, low = *modrm & 7;
    end = modrm + 1;
    if (mode == 3) {
      number = low + 8 * base_8;
      return;
    }
    constexpr int order[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                               REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    int base = low;
    int64_t address = 0;
    if (low == 4) {
      const int sib = *end++, index = (sib >> 3 & 7) + 8 * index_8;
      base = sib & 7;
      if (index != 4) address = general[order[index]] * (1 << (sib >> 6));
    }
    const bool no_base = mode == 0 && base == 5;
    if (!no_base) address += general[order[base + 8 * base_8]];
    if (mode == 1) address += int8_t(*end++);
    if (mode == 2 || no_base) {
      int32_t apart;
      std::memcpy(&apart, end, 4);
      address += apart, end += 4;
    }
    if (no_base && low == 5) address += reinterpret_cast<int64_t>(end);
    memory = reinterpret_cast<const void*>(address);
  }
  const uint8_t* end;
  int number = 0;
  const void* memory = nullptr;  // null: the register of this number
};

inline void add_products(uint8_t* sums, const uint8_t* some, const uint8_t* others) {
  for (int at = 0; at < 16; at += 4) {
    int32_t sum;
    std::memcpy(&sum, sums + at, 4);
    for (int i = at; i < at + 4; ++i) sum += some[i] * int8_t(others[i]);
    std::memcpy(sums + at, &sum, 4);
  }
}

inline void compute(int, siginfo_t*, void* where) {
  ucontext_t* context = static_cast<ucontext_t*>(where);
  greg_t* general = context->uc_mcontext.gregs;
  const uint8_t* code = reinterpret_cast<const uint8_t*>(general[REG_RIP]);
  // VEX with 0F38, 66, W0 and 256 bits, the opcode 50; three bits and the second operand's number stand inverted.
  if (code[0] != 0xC4 || (code[1] & 0x1F) != 2 || (code[2] & 0x87) != 5 || code[3] != 0x50) std::abort();
  const Operand last(code + 4, !(code[1] & 0x40), !(code[1] & 0x20), general);
  Registers registers(context);
  const int first = (code[4] >> 3 & 7) + 8 * !(code[1] & 0x80);
  Ymm sums = registers.get(first), others = registers.get(last.number);
  const Ymm some = registers.get(~code[2] >> 3 & 15);
  if (last.memory) std::memcpy(&others, last.memory, 32);
  add_products(sums.low, some.low, others.low);
  add_products(sums.high, some.high, others.high);
  registers.set(first, sums);
  general[REG_RIP] = reinterpret_cast<greg_t>(last.end);
}

}  // namespace vpdpbusd

// The kernels of AVX-VNNI on a processor that has all but it; null on others.
inline const mobilellm::Kernels* emulated_avxvnni() {
  if (mobilellm::kernels_for("avxvnni") || !mobilellm::kernels_for("avx2")) return nullptr;
  struct sigaction action = {};
  action.sa_sigaction = vpdpbusd::compute;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGILL, &action, nullptr);
  return mobilellm::avxvnni_kernels();
}
#else
inline const mobilellm::Kernels* emulated_avxvnni() { return nullptr; }
#endif
