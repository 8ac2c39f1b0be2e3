/* bfloat16 in memory, float32 in registers. */
#ifndef CPU_BF16_H
#define CPU_BF16_H

#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;
typedef int64_t i64;

static inline float wide(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

static inline bf16 narrow(float x) { /* to nearest even; the NaNs that arithmetic makes stay NaN */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#endif
