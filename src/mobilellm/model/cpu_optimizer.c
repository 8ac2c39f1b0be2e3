/* What follows backward, on a CPU: the norm of all gradients, and AdamW with clipping in one pass over memory. */
#include "cpu_bf16.h"

#include <math.h>
#include <stdlib.h>

enum { PIECE = 1 << 14 }; /* elements that one sum in float32 covers; the sums of pieces are float64 */

static inline float element(const void *x, int is_float, i64 i) {
    return is_float ? ((const float *)x)[i] : wide(((const bf16 *)x)[i]);
}

/* The same whatever the number of threads: pieces are added in their order. */
int sum_of_squares(const void *x, int is_float, double *total, i64 count, int threads) {
    i64 pieces = (count + PIECE - 1) / PIECE;
    double *sums = malloc((size_t)pieces * sizeof(double)), all = 0;
    if (!sums) return 1;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 piece = 0; piece < pieces; piece++) {
        i64 end = count < (piece + 1) * PIECE ? count : (piece + 1) * PIECE;
        float sum = 0;
        if (is_float) {
#pragma omp simd reduction(+ : sum)
            for (i64 i = piece * PIECE; i < end; i++) sum += element(x, 1, i) * element(x, 1, i);
        } else {
#pragma omp simd reduction(+ : sum)
            for (i64 i = piece * PIECE; i < end; i++) sum += element(x, 0, i) * element(x, 0, i);
        }
        sums[piece] = sum;
    }
    for (i64 piece = 0; piece < pieces; piece++) all += sums[piece];
    *total = all;
    free(sums);
    return 0;
}

static inline void adamw_element(float *w, float *mean, float *square, float g, float keep, float beta1, float beta2,
                                 float rate, float root, float epsilon) {
    *mean += (1.0f - beta1) * (g - *mean);
    *square = beta2 * *square + (1.0f - beta2) * g * g;
    *w = *w * keep - rate * *mean / (sqrtf(*square) * root + epsilon);
}

/* Gradients times `clip`; `keep` is what decay leaves of a weight, `rate` the learning rate over 1 - beta1^step, `root`
 * one over the square root of 1 - beta2^step. */
void adamw(float *w, float *mean, float *square, const void *gradient, int is_float, float clip, float keep,
           float beta1, float beta2, float rate, float root, float epsilon, i64 count, int threads) {
    if (is_float) {
#pragma omp parallel for simd num_threads(threads) schedule(static)
        for (i64 i = 0; i < count; i++)
            adamw_element(w + i, mean + i, square + i, clip * element(gradient, 1, i), keep, beta1, beta2, rate, root,
                          epsilon);
    } else {
#pragma omp parallel for simd num_threads(threads) schedule(static)
        for (i64 i = 0; i < count; i++)
            adamw_element(w + i, mean + i, square + i, clip * element(gradient, 0, i), keep, beta1, beta2, rate, root,
                          epsilon);
    }
}
