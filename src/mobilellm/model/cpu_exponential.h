/* e^x without a call, so that compilers make vectors of it. */
#ifndef CPU_EXPONENTIAL_H
#define CPU_EXPONENTIAL_H

#include <math.h>
#include <stdint.h>
#include <string.h>

static inline float exponential(float x) { /* within 2 units in the last place; e^x below -87 is e^-87; keeps NaN */
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f; /* to the nearest whole number */
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}

#endif
