/* Attention for scoring, on a CPU: rotary embedding, scores, softmax and the sum of values without a tensor of
 * scores, in float32 or from bf16 with float32 sums. Letters as in cpu_kernels.c.
 *
 * Both kinds of number run through one product, because its unit is 32 bits wide: one float, or two bf16 that are
 * multiplied and added together. Keys lie in groups of WIDE side by side, values in groups of WIDE columns, so that
 * a unit of a query (or of a weight of the softmax) is spread over a register and meets LANES of them at once.
 * The softmax runs along tiles of keys and is corrected as larger scores come (Milakov & Gimelshein 2018, Dao et
 * al. 2022).
 */
#include "cpu_bf16.h"
#include "cpu_exponential.h"

#include <stdlib.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
enum { LANES = 16, VECTORS = 4 };
#else
enum { LANES = 8, VECTORS = 2 };
#endif
enum {
    FAILED = 1,
    ROWS = 6,               /* with VECTORS, as many sums as there are registers for */
    WIDE = LANES * VECTORS, /* keys, or columns of values, of a product */
    TILE = 128,             /* keys a softmax goes on by: their numbers stay in the first cache */
    POSITIONS = 32,         /* queries of every head that share a pass over the tiles */
};

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef uint32_t bits __attribute__((vector_size(LANES * 4)));
typedef struct {
    i64 B, T, K, G, D;
    int pairs; /* bf16, two to a unit */
} Shape;

#define INLINE static inline __attribute__((always_inline))

/* sum + the unit at `one`, spread, times the units at `many`. */
INLINE vec fused(vec sum, const void *one, const void *many, int pairs) {
#ifdef __AVX512BF16__
    if (pairs) {
        int32_t unit;
        memcpy(&unit, one, 4);
        return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(unit),
                                     (__m512bh)_mm512_loadu_si512(many));
    }
#endif
    vec values, more;
    float x, y;
    if (pairs) {
        bits both, first, second;
        bf16 two[2];
        memcpy(&both, many, sizeof both);
        memcpy(two, one, 4);
        first = both << 16, second = both & 0xffff0000u;
        memcpy(&values, &first, sizeof values);
        memcpy(&more, &second, sizeof more);
        x = wide(two[0]), y = wide(two[1]);
        return sum + x * values + y * more;
    }
    memcpy(&values, many, sizeof values);
    memcpy(&x, one, 4);
    return sum + x * values;
}

/* out (ROWS, vectors * LANES) = out * keep + the rows of `one`, `length` units each, times `many` (length, vectors *
 * LANES). */
INLINE void product(const char *const *one, const char *many, i64 length, int vectors, int pairs, const float *keep,
                    float *out, i64 stride) {
    vec sums[ROWS][VECTORS];
#pragma GCC unroll 6
    for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            memcpy(&sums[row][v], out + row * stride + v * LANES, sizeof(vec));
            sums[row][v] = keep[row] != 0 ? sums[row][v] * keep[row] : (vec){0};
        }
    for (i64 unit = 0; unit < length; unit++, many += vectors * LANES * 4)
#pragma GCC unroll 6
        for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++)
                sums[row][v] = fused(sums[row][v], one[row] + unit * 4, many + v * LANES * 4, pairs);
#pragma GCC unroll 6
    for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) memcpy(out + row * stride + v * LANES, &sums[row][v], sizeof(vec));
}

/* The same for any number of columns that LANES divides. `many` is as `pack` lays values out: `all` units deep. */
INLINE void product_of_values(const char *const *one, const char *values, i64 first, i64 length, i64 all, i64 D,
                              int pairs, const float *keep, float *out) {
    i64 column = 0;
    for (; column + WIDE <= D; column += WIDE)
        product(one, values + (column * all + first * WIDE) * 4, length, VECTORS, pairs, keep, out + column, D);
    for (; column < D; column += LANES)
        product(one, values + (column * all + first * LANES) * 4, length, 1, pairs, keep, out + column, D);
}

static inline float number(const char *row, i64 i, int pairs) {
    return pairs ? wide(((const bf16 *)row)[i]) : ((const float *)row)[i];
}

static inline void put(char *row, i64 i, int pairs, float value) {
    if (pairs) ((bf16 *)row)[i] = narrow(value);
    else ((float *)row)[i] = value;
}

/* Where number d of key t lies among the packed keys of its head, and number d of value t among its values. */
static inline i64 key_place(i64 t, i64 d, i64 D, int pairs) {
    i64 each = 1 + pairs;
    return ((t / WIDE * (D / each) + d / each) * WIDE + t % WIDE) * each + d % each;
}

static inline i64 value_place(i64 t, i64 d, i64 all, i64 D, int pairs) {
    i64 each = 1 + pairs, whole = D / WIDE * WIDE, width = d < whole ? WIDE : LANES, column = d / width * width;
    return (column * (all / each) + t / each * width + d - column) * each + t % each;
}

/* One token's row of q heads, k heads, v heads: queries are turned in place, keys and values packed. */
static void rotate(Shape s, char *row, const float *cos, const float *sin, i64 t, i64 all, char *keys, char *values) {
    i64 size = s.pairs ? 2 : 4, half = s.D / 2, H = s.K * s.G, of_a_head = all * s.D * size;
    for (i64 h = 0; h < H + s.K; h++) {
        char *head = row + h * s.D * size, *packed = keys + (h - H) * of_a_head;
        for (i64 d = 0; d < half; d++) {
            float a = number(head, d, s.pairs), b = number(head, half + d, s.pairs);
            float first = a * cos[d] - b * sin[d], second = b * cos[d] + a * sin[d];
            put(h < H ? head : packed, h < H ? d : key_place(t, d, s.D, s.pairs), s.pairs, first);
            put(h < H ? head : packed, h < H ? half + d : key_place(t, half + d, s.D, s.pairs), s.pairs, second);
        }
    }
    for (i64 h = 0; h < s.K; h++)
        for (i64 d = 0; d < s.D; d++)
            put(values + h * of_a_head, value_place(t, d, all, s.D, s.pairs), s.pairs,
                number(row + (H + s.K + h) * s.D * size, d, s.pairs));
}

/* What one thread works with. */
typedef struct {
    float *out;              /* (rows, D), rows a multiple of ROWS */
    float *largest, *total;  /* (rows) of the scores so far */
} Work;

/* Scores (ROWS, TILE) of one tile become weights, `keep` what earlier sums are worth beside them. */
INLINE void soften(float *scores, i64 length, float scale, float *largest, float *total, float *keep) {
    float top = *largest, sum = 0;
#pragma omp simd reduction(max : top)
    for (i64 c = 0; c < length; c++) top = scores[c] * scale > top ? scores[c] * scale : top;
#pragma omp simd reduction(+ : sum)
    for (i64 c = 0; c < length; c++) sum += scores[c] = exponential(scores[c] * scale - top);
    *keep = exponential(*largest - top);
    *total = *total * *keep + sum;
    *largest = top;
}

/* Queries `first` … `end` of the G heads of one key/value head, whose row of numbers begins at `queries`. */
INLINE void attend(Shape s, int pairs, const char *queries, i64 stride, const char *keys, const char *values,
                   const int32_t *ends, i64 first, i64 end, i64 all, Work work) {
    static const float none[ROWS] = {0};
    i64 size = pairs ? 2 : 4, each = 1 + pairs, D = s.D, rows = (end - first) * s.G;
    i64 padded = (rows + ROWS - 1) / ROWS * ROWS;
    float scale = 1.0f / sqrtf((float)D);
    for (i64 r = 0; r < padded; r++) work.largest[r] = -1e29f, work.total[r] = 0;
    memset(work.out, 0, (size_t)(padded * D) * sizeof(float));
    for (i64 tile = 0; tile < end; tile += TILE) {
        i64 length = all - tile < TILE ? all - tile : TILE;
        int32_t soonest = INT32_MAX, latest = 0;
        for (i64 c = tile; ends && c < tile + length && c < s.T; c++) {
            soonest = ends[c] < soonest ? ends[c] : soonest;
            latest = ends[c] > latest ? ends[c] : latest;
        }
        for (i64 r = 0; r < padded; r += ROWS) {
            i64 t0 = first + r / s.G, t1 = first + (r + ROWS < rows ? r + ROWS - 1 : rows - 1) / s.G;
            if (tile > t1 || (ends && latest <= t0)) continue; /* nobody looks there */
            const char *one[ROWS];
            float scores[ROWS][TILE], keep[ROWS];
            bf16 weights[ROWS][TILE];
            for (int i = 0; i < ROWS; i++) {
                i64 row = r + i < rows ? r + i : rows - 1;
                one[i] = queries + (row / s.G) * stride + (row % s.G) * D * size;
            }
            i64 seen = t1 + 1 - tile < length ? (t1 - tile) / WIDE * WIDE + WIDE : length;
            for (i64 c = 0; c < seen; c += WIDE)
                product(one, keys + (tile + c) * D * size, D / each, VECTORS, pairs, none, scores[0] + c, TILE);
            for (int i = 0; i < ROWS; i++) {
                i64 row = r + i < rows ? r + i : rows - 1, t = first + row / s.G;
                if (tile + seen > t + 1 || (ends && soonest <= t))
                    for (i64 c = 0; c < seen; c++)
                        if (tile + c > t || (ends && t >= ends[tile + c])) scores[i][c] = -INFINITY;
                soften(scores[i], seen, scale, work.largest + r + i, work.total + r + i, keep + i);
                if (pairs)
#pragma omp simd
                    for (i64 c = 0; c < seen; c++) weights[i][c] = narrow(scores[i][c]);
                one[i] = pairs ? (const char *)weights[i] : (const char *)scores[i];
            }
            product_of_values(one, values, tile / each, seen / each, all / each, D, pairs, keep, work.out + r * D);
        }
    }
}

INLINE void write_rows(Shape s, int pairs, char *out, i64 first, i64 end, Work work) {
    i64 size = pairs ? 2 : 4, H = s.K * s.G;
    for (i64 r = 0; r < (end - first) * s.G; r++) {
        char *row = out + ((r / s.G) * H + r % s.G) * s.D * size;
        float share = 1.0f / work.total[r];
        for (i64 d = 0; d < s.D; d++) put(row, d, pairs, work.out[r * s.D + d] * share);
    }
}

/* out (N, H * D) of joint rows (N, (H + 2K) * D) of q heads, k heads, v heads, whose queries are turned in place. cos
 * and sin are (N, D / 2). Position t of a sequence sees those c <= t with t < ends (B, T) of c, or all c <= t. D is a
 * multiple of 16. */
int attention(void *joint, const float *cos, const float *sin, const int32_t *ends, void *out, int pairs, i64 B, i64 T,
              i64 K, i64 G, i64 D, int threads) {
    Shape s = {B, T, K, G, D, pairs};
    i64 size = pairs ? 2 : 4, all = (T + WIDE - 1) / WIDE * WIDE, row = (K * G + 2 * K) * D * size;
    i64 rows = (POSITIONS * G + ROWS - 1) / ROWS * ROWS, own = rows * (D + 2), blocks = (T + POSITIONS - 1) / POSITIONS;
    char *keys = calloc((size_t)(2 * B * K * all * D), (size_t)size), *values = keys + B * K * all * D * size;
    float *room = malloc((size_t)(threads * own) * sizeof(float));
    if (!keys || !room) {
        free(keys);
        free(room);
        return FAILED;
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (i64 i = 0; i < B * T; i++) {
        i64 of_a_sequence = i / T * K * all * D * size;
        rotate(s, (char *)joint + i * row, cos + i * (D / 2), sin + i * (D / 2), i % T, all, keys + of_a_sequence,
               values + of_a_sequence);
    }
    i64 next = 0;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int thread = 0; thread < threads; thread++) {
        float *mine = room + thread * own;
        Work work = {mine, mine + rows * D, mine + rows * (D + 1)};
        for (i64 task; (task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < B * K * blocks;) {
            i64 head = task % (B * K), first = (blocks - 1 - task / (B * K)) * POSITIONS; /* the longest come first */
            i64 b = head / K, k = head % K, end = first + POSITIONS < T ? first + POSITIONS : T, at = b * T + first;
            const char *queries = (char *)joint + at * row + k * G * D * size;
            const char *its_keys = keys + head * all * D * size, *its_values = values + head * all * D * size;
            const int32_t *its_ends = ends ? ends + b * T : NULL;
            char *to = (char *)out + (at * K + k) * G * D * size;
            if (pairs) {
                attend(s, 1, queries, row, its_keys, its_values, its_ends, first, end, all, work);
                write_rows(s, 1, to, first, end, work);
            } else {
                attend(s, 0, queries, row, its_keys, its_values, its_ends, first, end, all, work);
                write_rows(s, 0, to, first, end, work);
            }
        }
    }
    free(keys);
    free(room);
    return 0;
}
