/* The loss of distillation: every row of logits becomes its gradient, as in cross_entropy of cpu_kernels.c.
 *
 * train/distillation_loss.py holds the formulas; model/cpu_kernels.py compiles this. N tokens, V vocab_size, K tokens
 * that the teacher names, `rest` all others.
 */
#include "cpu_bf16.h"
#include "cpu_exponential.h"

#include <stdlib.h>

enum { FAILED = 1 };
static const bf16 NOTHING = 0xff80; /* minus infinity */

static float largest(const bf16 *row, i64 V) {
    float top = -INFINITY;
#pragma omp simd reduction(max : top)
    for (i64 c = 0; c < V; c++) top = wide(row[c]) > top ? wide(row[c]) : top;
    return top;
}

static float sum_of_powers(const bf16 *row, float top, float scale, i64 V) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (i64 c = 0; c < V; c++) sum += exponential(scale * (wide(row[c]) - top));
    return sum;
}

/* Of the teacher: `ids` (N, K), `shares` (N, K + 1) with that of the rest last, `certainty` (N), its sum of p log p.
 * `sharpness` is one over the temperature; `divergence_weight` holds the square of the temperature. */
int distillation(bf16 *logits, const i64 *targets, const float *weights, const i64 *ids, const float *shares,
                 const float *certainty, float entropy_weight, float divergence_weight, float sharpness, float z_loss,
                 float *losses, i64 N, i64 V, i64 K, int threads) {
    float *room = malloc((size_t)(threads * K) * sizeof(float));
    if (!room) return FAILED;
    int softened = sharpness != 1.0f;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int thread = 0; thread < threads; thread++)
        for (i64 i = N * thread / threads; i < N * (thread + 1) / threads; i++) {
            bf16 *row = logits + i * V;
            float weight = weights[i], *named = room + thread * K;
            if (weight == 0) { /* says nothing of the teacher */
                memset(row, 0, (size_t)V * sizeof(bf16));
                losses[i] = 0;
                continue;
            }
            const i64 *mine = ids + i * K;
            const float *p = shares + i * (K + 1);
            float top = largest(row, V), chosen = wide(row[targets[i]]);
            for (i64 k = 0; k < K; k++) named[k] = wide(row[mine[k]]);
            for (i64 k = 0; k < K; k++) row[mine[k]] = NOTHING; /* a difference of sums would leave no digits of rest */
            float rest = sum_of_powers(row, top, 1.0f, V), soft_rest = rest, sum = rest;
            for (i64 k = 0; k < K; k++) sum += exponential(named[k] - top);
            float soft_sum = sum;
            if (softened) {
                soft_sum = soft_rest = sum_of_powers(row, top, sharpness, V);
                for (i64 k = 0; k < K; k++) soft_sum += exponential(sharpness * (named[k] - top));
            }
            float all = top + logf(sum), soft_all = logf(soft_sum);
            float divergence = certainty[i] - (p[K] > 0 ? p[K] * (logf(soft_rest) - soft_all) : 0);
            for (i64 k = 0; k < K; k++) divergence -= p[k] * (sharpness * (named[k] - top) - soft_all);
            losses[i] = weight * (entropy_weight * (all - chosen) + z_loss * all * all + divergence_weight * divergence);

            float hard = weight * (entropy_weight + 2.0f * z_loss * all) / sum;
            float soft = weight * divergence_weight * sharpness, even = soft * (1.0f / soft_sum - p[K] / soft_rest);
            float both = hard + even;
            if (softened) {
#pragma omp simd
                for (i64 c = 0; c < V; c++) {
                    float x = wide(row[c]) - top;
                    row[c] = narrow(hard * exponential(x) + even * exponential(sharpness * x));
                }
            } else {
#pragma omp simd
                for (i64 c = 0; c < V; c++) row[c] = narrow(both * exponential(wide(row[c]) - top));
            }
            float x = chosen - top;
            row[targets[i]] = narrow(hard * exponential(x) + even * exponential(sharpness * x) - weight * entropy_weight);
            for (i64 k = 0; k < K; k++) {
                x = named[k] - top;
                float slope = hard * exponential(x) + soft * (exponential(sharpness * x) / soft_sum - p[k]);
                row[mine[k]] = narrow(mine[k] == targets[i] ? slope - weight * entropy_weight : slope);
            }
        }
    free(room);
    return 0;
}
