// NEON as every 64-bit ARM processor has it.
#include <arm_neon.h>

#include "kernels.h"

namespace mobilellm {
namespace {

// Products in 16 bits; pairs of them, 2 * 128 * 127, stay within; rows are summed in 32.
template <int Group>
inline int32x4_t dot(int32x4_t sums, int8x16_t w, int8x16_t x) {
  const int8x16_t four = vreinterpretq_s8_s32(vdupq_laneq_s32(vreinterpretq_s32_s8(x), Group));
  const int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(four)), high = vmull_high_s8(w, four);
  return vpadalq_s16(sums, vpaddq_s16(low, high));
}

#include "kernels_neon_body.h"

}  // namespace

const Kernels* neon_kernels() {
  static const Kernels kernels = kernels_with("neon", blocks_product<Eight>, blocks_product<Four>,
                                              attend_bytes<blocks_product<Eight>, mix_bytes>);
  return &kernels;
}

}  // namespace mobilellm
