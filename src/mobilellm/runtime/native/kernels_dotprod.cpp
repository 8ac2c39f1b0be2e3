// NEON with the dot-product extension of ARMv8.2. Compiled with its flag, and only run where the processor has it.
#include <arm_neon.h>

#include "kernels.h"

namespace mobilellm {
namespace {

template <int Group>
inline int32x4_t dot(int32x4_t sums, int8x16_t w, int8x16_t x) {
  return vdotq_laneq_s32(sums, w, x, Group);
}

#include "kernels_neon_body.h"

}  // namespace

const Kernels* dotprod_kernels() {
  static const Kernels kernels = kernels_with("dotprod", blocks_product<Eight>, blocks_product<Four>,
                                              attend_bytes<blocks_product<Eight>, mix_bytes>);
  return &kernels;
}

}  // namespace mobilellm
