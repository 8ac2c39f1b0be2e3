/* The passes of training, and of scoring, between matrix products, on a CPU: each reads its inputs once and writes its outputs once.
 *
 * Plain C that compilers turn into vector code; model/cpu_kernels.py compiles it on first use, and holds the
 * contract of every function. bf16 in memory, float32 in registers. N tokens, E hidden_size, F intermediate_size,
 * V vocab_size, B sequences, T tokens of each, K key/value heads, G query heads to each, D head_dim.
 *
 * Queries and what is shaped like them are stored in blocks of at most `block` positions: block j holds, for every
 * sequence and key/value head, its G query heads one after the other, positions j * block … of each. All products of
 * a block are then one batched product of B * K matrices, over just the keys that causality lets it see.
 */
#include "cpu_bf16.h"
#include "cpu_exponential.h"

#include <float.h>
#include <stdlib.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif

/* What functions that need memory, or have a limit, return if they could not do their work; else 0. */
enum { FAILED = 1, LONGEST = 1 << 16 };

static inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

/* Norms and residuals */

/* y = w * x * scale; `normed` is x * scale, all that backward needs of x. */
void rms_norm(const float *x, const float *w, bf16 *y, bf16 *normed, float *scale, i64 N, i64 E, float eps,
              int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 i = 0; i < N; i++) {
        const float *xi = x + i * E;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (i64 e = 0; e < E; e++) sum += xi[e] * xi[e];
        float s = 1.0f / sqrtf(sum / E + eps);
        scale[i] = s;
        bf16 *yi = y + i * E, *ni = normed + i * E;
#pragma omp simd
        for (i64 e = 0; e < E; e++) {
            float n = xi[e] * s;
            ni[e] = narrow(n);
            yi[e] = narrow(n * w[e]);
        }
    }
}

/* dx = residual + gradient through the norm. */
int rms_norm_backward(const bf16 *dy, const bf16 *normed, const float *w, const float *scale, const float *residual,
                      float *dx, float *dw, i64 N, i64 E, int threads) {
    float *sums = calloc((size_t)(threads * E), sizeof(float));
    if (!sums) return FAILED;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int thread = 0; thread < threads; thread++) {
        float *mine = sums + thread * E;
        for (i64 i = N * thread / threads; i < N * (thread + 1) / threads; i++) {
            const float *ri = residual + i * E;
            const bf16 *di = dy + i * E, *ni = normed + i * E;
            float *oi = dx + i * E, s = scale[i], dot = 0;
#pragma omp simd reduction(+ : dot)
            for (i64 e = 0; e < E; e++) {
                float part = wide(di[e]) * wide(ni[e]);
                dot += part * w[e];
                mine[e] += part;
            }
            float mean = dot / E;
#pragma omp simd
            for (i64 e = 0; e < E; e++) oi[e] = ri[e] + s * (wide(di[e]) * w[e] - wide(ni[e]) * mean);
        }
    }
    for (i64 e = 0; e < E; e++) {
        float sum = 0;
        for (int thread = 0; thread < threads; thread++) sum += sums[thread * E + e];
        dw[e] = sum;
    }
    free(sums);
    return 0;
}

/* y from `normed`, for the gradients of the weights it met. */
void rms_norm_again(const bf16 *normed, const float *w, bf16 *y, i64 N, i64 E, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 i = 0; i < N; i++)
#pragma omp simd
        for (i64 e = 0; e < E; e++) y[i * E + e] = narrow(wide(normed[i * E + e]) * w[e]);
}

void add(const float *x, const bf16 *y, float *out, i64 count, int threads) {
#pragma omp parallel for simd num_threads(threads) schedule(static)
    for (i64 i = 0; i < count; i++) out[i] = x[i] + wide(y[i]);
}

/* Quantisation-aware training: numbers as model/rounding.py rounds them, in place; every `group` share a scale. */

static inline void round_group(bf16 *x, i64 group, int symmetric) {
    float low = 0, high = 0;
#pragma omp simd reduction(min : low) reduction(max : high)
    for (i64 e = 0; e < group; e++) {
        float value = wide(x[e]);
        low = value < low ? value : low;
        high = value > high ? value : high;
    }
    if (symmetric) {
        float scale = fmaxf(high, fabsf(low)) / 127.0f, inverse = scale != 0 ? 1.0f / scale : 0;
#pragma omp simd
        for (i64 e = 0; e < group; e++) x[e] = narrow(rintf(wide(x[e]) * inverse) * scale);
        return;
    }
    float scale = fmaxf((high - low) / 255.0f, FLT_MIN), inverse = 1.0f / scale;
    float zero = fminf(fmaxf(-128.0f - rintf(low / scale), -128.0f), 127.0f);
#pragma omp simd
    for (i64 e = 0; e < group; e++) {
        float whole = rintf(wide(x[e]) * inverse) + zero;
        whole = whole < -128.0f ? -128.0f : whole > 127.0f ? 127.0f : whole;
        x[e] = narrow((whole - zero) * scale);
    }
}

void round_activations(bf16 *x, i64 count, i64 group, int symmetric, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 i = 0; i < count / group; i++) {
        if (group == 32)
            round_group(x + i * 32, 32, symmetric); /* a length that the compiler knows */
        else
            round_group(x + i * group, group, symmetric);
    }
}

/* SwiGLU: rows of gate (F) then up (F) */

void swiglu(const bf16 *gate_up, bf16 *out, i64 N, i64 F, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 i = 0; i < N; i++) {
        const bf16 *gate = gate_up + i * 2 * F, *up = gate + F;
#pragma omp simd
        for (i64 f = 0; f < F; f++) {
            float g = wide(gate[f]);
            out[i * F + f] = narrow(g * sigmoid(g) * wide(up[f]));
        }
    }
}

/* The output is made again beside the gradient. */
void swiglu_backward(const bf16 *gate_up, const bf16 *dout, bf16 *dgate_up, bf16 *out, i64 N, i64 F, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 i = 0; i < N; i++) {
        const bf16 *gate = gate_up + i * 2 * F, *up = gate + F, *di = dout + i * F;
        bf16 *dgate = dgate_up + i * 2 * F, *dup = dgate + F, *oi = out + i * F;
#pragma omp simd
        for (i64 f = 0; f < F; f++) {
            float g = wide(gate[f]), u = wide(up[f]), d = wide(di[f]), s = sigmoid(g), silu = g * s;
            dgate[f] = narrow(d * u * (s + silu * (1.0f - s)));
            dup[f] = narrow(d * silu);
            oi[f] = narrow(silu * u);
        }
    }
}

/* Heads */

typedef struct {
    i64 B, T, K, G, D, block;
} Heads;

/* Where query head g of key/value head k stands at position t of sequence b, in rows of D. */
static inline i64 query_row(Heads s, i64 b, i64 t, i64 k, i64 g) {
    i64 first = t / s.block * s.block, length = s.T - first < s.block ? s.T - first : s.block;
    return s.B * s.K * s.G * first + ((b * s.K + k) * s.G + g) * length + t - first;
}

static void turn(const bf16 *in, bf16 *out, const float *cos, const float *sin, float sign, i64 D) {
    i64 half = D / 2;
#pragma omp simd
    for (i64 d = 0; d < half; d++) {
        float a = wide(in[d]), b = wide(in[half + d]), s = sign * sin[d];
        out[d] = narrow(a * cos[d] - b * s);
        out[half + d] = narrow(b * cos[d] + a * s);
    }
}

/* Rows of q heads, k heads, v heads to rotated queries in blocks, rotated keys and values (B, K, T, D); backward
 * (sign -1) the way back. cos and sin are (rows of positions, T, D / 2), one row for all sequences or one for each. */
void rotary(bf16 *joint, bf16 *q, bf16 *k, bf16 *v, const float *cos, const float *sin, i64 rows, i64 B, i64 T, i64 K,
            i64 G, i64 D, i64 block, int backward, int threads) {
    Heads s = {B, T, K, G, D, block};
    i64 H = K * G;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 i = 0; i < B * T; i++) {
        i64 b = i / T, t = i % T, angle = ((rows == 1 ? 0 : b) * T + t) * (D / 2);
        bf16 *row = joint + i * (H + 2 * K) * D;
        for (i64 h = 0; h < H; h++) {
            bf16 *there = q + query_row(s, b, t, h / G, h % G) * D, *here = row + h * D;
            turn(backward ? there : here, backward ? here : there, cos + angle, sin + angle, backward ? -1 : 1, D);
        }
        for (i64 h = 0; h < K; h++) {
            i64 place = ((b * K + h) * T + t) * D;
            bf16 *key = row + (H + h) * D, *value = row + (H + K + h) * D;
            turn(backward ? k + place : key, backward ? key : k + place, cos + angle, sin + angle, backward ? -1 : 1, D);
            memcpy(backward ? value : v + place, backward ? v + place : value, (size_t)D * sizeof(bf16));
        }
    }
}

/* Blocks of outputs to rows (N, H * D); backward the gradients of rows to those of blocks. */
void move_heads(bf16 *blocks, bf16 *rows, i64 B, i64 T, i64 K, i64 G, i64 D, i64 block, int backward, int threads) {
    Heads s = {B, T, K, G, D, block};
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 i = 0; i < B * T; i++)
        for (i64 h = 0; h < K * G; h++) {
            bf16 *row = rows + (i * K * G + h) * D;
            bf16 *there = blocks + query_row(s, i / T, i % T, h / G, h % G) * D;
            memcpy(backward ? there : row, backward ? row : there, (size_t)D * sizeof(bf16));
        }
}

/* Attention probabilities of one block of queries, positions `start` … `start + length`, over keys 0 … S. A query at
 * t sees keys visible[t] … t. Rows are sequences, their key/value heads, their query heads, their positions. */

int softmax(bf16 *scores, float *total, const int32_t *visible, float scale, i64 B, i64 T, i64 heads, i64 start,
            i64 length, i64 S, int threads) {
    if (S > LONGEST) return FAILED; /* the stack holds a row */
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 r = 0; r < B * heads * length; r++) {
        i64 t = start + r % length, low = visible ? visible[r / (heads * length) * T + t] : 0;
        bf16 *row = scores + r * S;
        float top = -INFINITY, sum = 0;
#pragma omp simd reduction(max : top)
        for (i64 c = low; c <= t; c++) top = wide(row[c]) > top ? wide(row[c]) : top;
        top *= scale;
        float powers[t + 1];
#pragma omp simd reduction(+ : sum)
        for (i64 c = low; c <= t; c++) sum += powers[c] = exponential(scale * wide(row[c]) - top);
        total[r] = top + logf(sum);
        float share = 1.0f / sum;
        memset(row, 0, (size_t)low * sizeof(bf16));
#pragma omp simd
        for (i64 c = low; c <= t; c++) row[c] = narrow(powers[c] * share);
        memset(row + t + 1, 0, (size_t)(S - t - 1) * sizeof(bf16));
    }
    return 0;
}

/* Scores become probabilities again; their gradients `d` become gradients of the unscaled scores. */
int softmax_backward(bf16 *scores, bf16 *d, const float *total, const int32_t *visible, float scale, i64 B, i64 T,
                     i64 heads, i64 start, i64 length, i64 S, int threads) {
    if (S > LONGEST) return FAILED; /* the stack holds a row */
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 r = 0; r < B * heads * length; r++) {
        i64 t = start + r % length, low = visible ? visible[r / (heads * length) * T + t] : 0;
        bf16 *row = scores + r * S, *back = d + r * S;
        float all = total[r], mean = 0, p[t + 1];
#pragma omp simd reduction(+ : mean)
        for (i64 c = low; c <= t; c++) {
            p[c] = exponential(scale * wide(row[c]) - all);
            mean += p[c] * wide(back[c]);
        }
        memset(row, 0, (size_t)low * sizeof(bf16));
        memset(back, 0, (size_t)low * sizeof(bf16));
#pragma omp simd
        for (i64 c = low; c <= t; c++) {
            row[c] = narrow(p[c]);
            back[c] = narrow(p[c] * (wide(back[c]) - mean) * scale);
        }
        memset(row + t + 1, 0, (size_t)(S - t - 1) * sizeof(bf16));
        memset(back + t + 1, 0, (size_t)(S - t - 1) * sizeof(bf16));
    }
    return 0;
}

/* Embedding: rows of dx (N, E) are added to the rows of dw (V, E) that tokens name. `order` lists the N positions by
 * token, those of one token in their order: the rows of a token are summed in float32 before they are rounded. */

int embedding_backward(const float *dx, const i64 *tokens, const i64 *order, void *dw, int is_float, i64 N, i64 E,
                       int threads) {
    float *sums = malloc((size_t)E * sizeof(float));
    if (!sums) return FAILED;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int thread = 0; thread < threads; thread++) {
        i64 from = E * thread / threads, to = E * (thread + 1) / threads;
        for (i64 i = 0; i < N;) {
            i64 token = tokens[order[i]];
            float *wide_row = (float *)dw + token * E;
            bf16 *row = (bf16 *)dw + token * E;
            for (i64 e = from; e < to; e++) sums[e] = is_float ? wide_row[e] : wide(row[e]);
            for (; i < N && tokens[order[i]] == token; i++)
#pragma omp simd
                for (i64 e = from; e < to; e++) sums[e] += dx[order[i] * E + e];
            if (is_float)
                for (i64 e = from; e < to; e++) wide_row[e] = sums[e];
            else
                for (i64 e = from; e < to; e++) row[e] = narrow(sums[e]);
        }
    }
    free(sums);
    return 0;
}

/* Loss: every row of logits becomes its gradient */

void cross_entropy(bf16 *logits, const i64 *targets, const float *weights, float z_loss, float *losses, i64 N, i64 V,
                   int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 i = 0; i < N; i++) {
        bf16 *row = logits + i * V;
        float top = -INFINITY, sum = 0, weight = weights[i];
#pragma omp simd reduction(max : top)
        for (i64 c = 0; c < V; c++) top = wide(row[c]) > top ? wide(row[c]) : top;
#pragma omp simd reduction(+ : sum)
        for (i64 c = 0; c < V; c++) sum += exponential(wide(row[c]) - top);
        float all = top + logf(sum), chosen = wide(row[targets[i]]);
        losses[i] = weight * (all - chosen + z_loss * all * all);
        float factor = weight * (1.0f + 2.0f * z_loss * all);
#pragma omp simd
        for (i64 c = 0; c < V; c++) row[c] = narrow(factor * exponential(wide(row[c]) - all));
        row[targets[i]] = narrow(factor * exponential(chosen - all) - weight);
    }
}

/* Scoring: float32 in memory, and nothing kept for a way back */

/* x += residual, where there is one; y = norm of x. Residual and y are bf16 if `narrowed`, else float32. */
void scoring_norm(float *x, const void *residual, const float *w, void *y, int narrowed, i64 N, i64 E, float eps,
                  int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 i = 0; i < N; i++) {
        float *xi = x + i * E, sum = 0;
        if (residual && narrowed) {
            const bf16 *ri = (const bf16 *)residual + i * E;
#pragma omp simd
            for (i64 e = 0; e < E; e++) xi[e] += wide(ri[e]);
        } else if (residual) {
            const float *ri = (const float *)residual + i * E;
#pragma omp simd
            for (i64 e = 0; e < E; e++) xi[e] += ri[e];
        }
#pragma omp simd reduction(+ : sum)
        for (i64 e = 0; e < E; e++) sum += xi[e] * xi[e];
        float s = 1.0f / sqrtf(sum / E + eps);
        if (narrowed) {
            bf16 *yi = (bf16 *)y + i * E;
#pragma omp simd
            for (i64 e = 0; e < E; e++) yi[e] = narrow(xi[e] * s * w[e]);
        } else {
            float *yi = (float *)y + i * E;
#pragma omp simd
            for (i64 e = 0; e < E; e++) yi[e] = xi[e] * s * w[e];
        }
    }
}

void float_swiglu(const float *gate_up, float *out, i64 N, i64 F, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 i = 0; i < N; i++) {
        const float *gate = gate_up + i * 2 * F, *up = gate + F;
#pragma omp simd
        for (i64 f = 0; f < F; f++) out[i * F + f] = gate[f] * sigmoid(gate[f]) * up[f];
    }
}

/* Of every row the logarithm of its sum of exponentials, and where its largest entry is, of equal ones the first. Logits
 * are bf16 if `narrowed`, else float32. */
int highest(const void *logits, float *total, i64 *places, int narrowed, i64 N, i64 V, int threads) {
    float *room = narrowed ? malloc((size_t)(threads * V) * sizeof(float)) : NULL;
    if (narrowed && !room) return FAILED;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int thread = 0; thread < threads; thread++)
        for (i64 i = N * thread / threads; i < N * (thread + 1) / threads; i++) {
            const float *row = (const float *)logits + i * V;
            float top = -INFINITY, sum = 0;
            int first = (int)V;
            if (narrowed) {
                const bf16 *narrow_row = (const bf16 *)logits + i * V;
                float *copy = room + thread * V;
#pragma omp simd
                for (i64 c = 0; c < V; c++) copy[c] = wide(narrow_row[c]);
                row = copy;
            }
#pragma omp simd reduction(max : top)
            for (i64 c = 0; c < V; c++) top = row[c] > top ? row[c] : top;
#pragma omp simd reduction(+ : sum)
            for (i64 c = 0; c < V; c++) sum += exponential(row[c] - top);
#pragma omp simd reduction(min : first)
            for (int c = 0; c < (int)V; c++) first = row[c] == top && c < first ? c : first;
            total[i] = top + logf(sum);
            places[i] = first;
        }
    free(room);
    return 0;
}

/* Memory: a step frees what the next one asks for again; handed back to the system in between, it would have to be
 * cleared and mapped anew each time, which takes a tenth of the step. */
void keep_freed_memory(void) {
#ifdef __GLIBC__
    mallopt(M_MMAP_THRESHOLD, 32 << 20);
    mallopt(M_TRIM_THRESHOLD, 1 << 30);
    mallopt(M_TOP_PAD, 32 << 20);
#endif
}
