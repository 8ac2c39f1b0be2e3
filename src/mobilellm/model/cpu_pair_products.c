/* Matrix products on processors that multiply pairs of bf16 by the vector (AVX-512 BF16).
 *
 * out (M, N) = a (M, K) b (K, N) [+ addend], summed in float32; a, b and out are bf16 or float32 each, rounded to bf16
 * where they come in, and a and b may lie transposed. A unit is two numbers that follow each other along K: one
 * instruction spreads a unit of a, multiplies it by LANES units of b and adds both products to LANES sums.
 *
 * Threads share the output by columns and meet nowhere but where a has to be copied. Each copies b panel by panel,
 * as it comes to it: a panel stays in the second cache while all rows of a pass by, and a is read as it lies unless
 * it is transposed. The instruction finds what it needs in time from there, so nothing is cut to fit the first cache.
 */
#include "cpu_bf16.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#include <stdlib.h>
#ifdef _OPENMP
#include <omp.h>
#endif

enum {
    LANES = 16,
    VECTORS = 4,
    ROWS = 6, /* 6 x 4 vectors of sums, one row of b and a unit of a: 29 of 32 registers */
    COLUMNS = VECTORS * LANES,
    DEPTH = 1536,       /* of a panel, at most: it takes a fifth of the second cache */
    GROUP = 16 * ROWS,  /* rows of a that are copied side by side */
    PIECE = 64,         /* of their numbers that are copied at a time */
    COPIED = 1 << 21    /* numbers of a that are copied at a time, about */
};

#define INLINE static inline __attribute__((always_inline))

typedef uint32_t units __attribute__((vector_size(LANES * 4)));

typedef struct {
    const void *start;
    i64 row, column; /* how many numbers further the next row and the next column are */
    int is_float;
} Matrix;

static i64 least(i64 x, i64 y) { return x < y ? x : y; }

static i64 parts(i64 whole, i64 size) { return (whole + size - 1) / size; }

INLINE uint32_t pair(bf16 first, bf16 second) { return first | (uint32_t)second << 16; }

INLINE units units_of_float(const float *x) {
    return (units)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + LANES), _mm512_loadu_ps(x));
}

INLINE units units_of_bf16(const bf16 *x) { return (units)_mm512_loadu_si512(x); }

/* Row i, lane j to row j, lane i: in every turn one bit of i changes places with the same bit of j. */
INLINE void transpose(units *rows) {
    units lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#pragma GCC unroll 4
    for (uint32_t bit = 1; bit < LANES; bit *= 2) {
        units odd = (units)((lane & bit) != 0);
        units low = (odd & (lane - bit + LANES)) | (~odd & lane), high = (odd & (lane + LANES)) | (~odd & (lane + bit));
#pragma GCC unroll 16
        for (uint32_t i = 0; i < LANES; i++)
            if (!(i & bit)) {
                __m512i one = (__m512i)rows[i], other = (__m512i)rows[i + bit];
                rows[i] = (units)_mm512_permutex2var_epi32(one, (__m512i)low, other);
                rows[i + bit] = (units)_mm512_permutex2var_epi32(one, (__m512i)high, other);
            }
    }
}

/* `count` vectors of `depth` numbers, unit by unit side by side in rows of `width`, with zeros for what lacks. `along`
 * numbers further is the next of a vector, `across` the next vector. */
#define PACK(NAME, TYPE, NARROW, UNITS)                                                                               \
    static void NAME(const TYPE *from, i64 along, i64 across, i64 count, i64 depth, i64 width, uint32_t *to) {        \
        i64 whole = depth / 2;                                                                                        \
        if (count < width) memset(to, 0, (size_t)((depth + 1) / 2 * width) * sizeof *to);                             \
        if (across == 1) {                                                                                            \
            for (i64 k = 0; k < whole; k++)                                                                           \
                for (i64 i = 0; i < count; i++)                                                                       \
                    to[k * width + i] = pair(NARROW(from[2 * k * along + i]), NARROW(from[(2 * k + 1) * along + i])); \
        } else {                                                                                                      \
            i64 done = along == 1 ? whole / LANES * LANES : 0, blocks = done ? count / LANES * LANES : 0;             \
            for (i64 i = 0; i < blocks; i += LANES)                                                                   \
                for (i64 k = 0; k < done; k += LANES) {                                                               \
                    units rows[LANES];                                                                                \
                    for (i64 j = 0; j < LANES; j++) rows[j] = UNITS(from + (i + j) * across + 2 * k);                 \
                    transpose(rows);                                                                                  \
                    for (i64 j = 0; j < LANES; j++) memcpy(to + (k + j) * width + i, rows + j, sizeof *rows);         \
                }                                                                                                     \
            for (i64 i = 0; i < count; i++)                                                                           \
                for (i64 k = i < blocks ? done : 0; k < whole; k++)                                                   \
                    to[k * width + i] = pair(NARROW(from[i * across + 2 * k * along]),                                \
                                             NARROW(from[i * across + (2 * k + 1) * along]));                         \
        }                                                                                                             \
        for (i64 i = 0; i < count && depth % 2; i++)                                                                  \
            to[whole * width + i] = pair(NARROW(from[i * across + 2 * whole * along]), 0);                            \
    }
#define SAME(x) (x)
PACK(pack_float, float, narrow, units_of_float)
PACK(pack_bf16, bf16, SAME, units_of_bf16)

static void pack(Matrix from, i64 offset, i64 along, i64 across, i64 count, i64 depth, i64 width, uint32_t *to) {
    if (from.is_float)
        pack_float((const float *)from.start + offset, along, across, count, depth, width, to);
    else
        pack_bf16((const bf16 *)from.start + offset, along, across, count, depth, width, to);
}

/* A tile: what is at `from`, if anything, + the rows, whose next unit is `step` bytes further, times the panel; as float32
 * or as bf16. */
static __attribute__((noinline)) void multiply_panel(const char *const *rows, i64 step, const uint32_t *panel, i64 depth,
                                                     const float *from, i64 from_stride, void *to, i64 to_stride,
                                                     int to_float) {
    __m512 tile[ROWS][VECTORS];
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++)
            tile[i][v] = from ? _mm512_loadu_ps(from + i * from_stride + v * LANES) : _mm512_setzero_ps();
    for (i64 k = 0; k < depth; k++, panel += COLUMNS) {
        __m512bh many[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) many[v] = (__m512bh)_mm512_loadu_si512(panel + v * LANES);
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; i++) {
            int32_t unit;
            memcpy(&unit, rows[i] + k * step, sizeof unit);
            __m512bh one = (__m512bh)_mm512_set1_epi32(unit);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) tile[i][v] = _mm512_dpbf16_ps(tile[i][v], one, many[v]);
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v += 2)
            if (to_float) {
                _mm512_storeu_ps((float *)to + i * to_stride + v * LANES, tile[i][v]);
                _mm512_storeu_ps((float *)to + i * to_stride + (v + 1) * LANES, tile[i][v + 1]);
            } else
                _mm512_storeu_si512((bf16 *)to + i * to_stride + v * LANES,
                                    (__m512i)_mm512_cvtne2ps_pbh(tile[i][v + 1], tile[i][v]));
}

/* A part of a tile + addend to out; addend and out are rows of their strides. */
static void store(const float *tile, const float *addend, i64 addend_stride, void *out, i64 stride, int is_float,
                  i64 rows, i64 columns) {
    for (i64 i = 0; i < rows; i++)
        for (i64 j = 0; j < columns; j++) {
            float sum = tile[i * COLUMNS + j] + (addend ? addend[i * addend_stride + j] : 0);
            if (is_float)
                ((float *)out)[i * stride + j] = sum;
            else
                ((bf16 *)out)[i * stride + j] = narrow(sum);
        }
}

/* Rows of a by strips, each strip's units side by side. */
static void pack_strips(Matrix a, i64 offset, i64 count, i64 depth, uint32_t *to) {
    uint32_t beside[PIECE / 2 * GROUP];
    i64 units = parts(depth, 2);
    for (i64 low = 0; low < depth; low += PIECE) {
        i64 here = least(PIECE, depth - low);
        pack(a, offset + low * a.column, a.column, a.row, count, here, GROUP, beside);
        for (i64 i = 0; i < GROUP; i += ROWS)
            for (i64 k = 0; k < parts(here, 2); k++)
                memcpy(to + i * units + (low / 2 + k) * ROWS, beside + k * GROUP + i, ROWS * sizeof *to);
    }
}

/* `batch` products, `*_batch` numbers after each other. */
typedef struct {
    Matrix a, b;
    const float *addend;
    char *out;
    i64 a_batch, b_batch, out_batch, addend_stride, out_stride, M, N, K;
    int out_is_float;
    uint32_t *copy; /* of rows of a by strips, or NULL: then they are read where they lie */
    i64 copied;     /* strips of one product in it */
} Product;

/* Strips `from` … `to` of the rows `top` … `bottom`; strips are counted down a panel, panel after panel, product
 * after product. */
static void multiply_strips(const Product *p, i64 top, i64 bottom, i64 from, i64 to, uint32_t *panel, float *sums) {
    i64 strips = parts(bottom - top, ROWS), panels = parts(p->N, COLUMNS), units = parts(p->K, 2);
    for (i64 low = 0; low < p->K; low += DEPTH) {
        i64 depth = least(DEPTH, p->K - low);
        for (i64 at = from; at < to; at++) {
            i64 strip = at % strips, first = at / strips % panels * COLUMNS, n = at / strips / panels;
            i64 columns = least(COLUMNS, p->N - first), row = top + strip * ROWS, height = least(ROWS, bottom - row);
            if (at == from || strip == 0)
                pack(p->b, n * p->b_batch + low * p->b.row + first * p->b.column, p->b.row, p->b.column, columns, depth,
                     COLUMNS, panel);
            const char *rows[ROWS];
            for (int i = 0; i < ROWS; i++)
                rows[i] = p->copy ? (const char *)(p->copy + ((n * p->copied + strip) * units + low / 2) * ROWS + i)
                                  : (const char *)((const bf16 *)p->a.start + n * p->a_batch +
                                                   (row + least(i, height - 1)) * p->a.row + low);
            float *tile = sums + (p->K > DEPTH ? (at - from) * ROWS * COLUMNS : 0);
            const float *addend = p->addend ? p->addend + row * p->addend_stride + first : NULL;
            char *out = p->out + (n * p->out_batch + row * p->out_stride + first) * (p->out_is_float ? 4 : 2);
            int is_whole = height == ROWS && columns == COLUMNS, is_last = low + depth == p->K;
            multiply_panel(rows, p->copy ? 4 * ROWS : 4, panel, parts(depth, 2), low ? tile : is_whole ? addend : NULL,
                           low ? COLUMNS : p->addend_stride, is_last && is_whole ? (void *)out : tile,
                           is_last && is_whole ? p->out_stride : COLUMNS, p->out_is_float || !is_last || !is_whole);
            if (is_last && !is_whole)
                store(tile, addend, p->addend_stride, out, p->out_stride, p->out_is_float, height, columns);
        }
    }
}

static i64 thread_of(i64 *threads) {
#ifdef _OPENMP
    *threads = omp_get_num_threads();
    return omp_get_thread_num();
#else
    *threads = 1;
    return 0;
#endif
}

/* Returns 0, or 1 where there is no memory. */
int multiply_pairs(const void *a, i64 a_batch, i64 a_row, i64 a_column, int a_is_float, const void *b, i64 b_batch,
                   i64 b_row, i64 b_column, int b_is_float, const float *addend, i64 addend_stride, void *out,
                   i64 out_batch, i64 out_stride, int out_is_float, i64 batch, i64 M, i64 N, i64 K, int threads) {
    if (!batch || !M || !N) return 0;
    int copies = a_column != 1 || a_is_float || K % 2, failed = 0;
    i64 units = parts(K, 2), rows = copies ? least(parts(M, GROUP), parts(COPIED, K * GROUP)) * GROUP : M;
    i64 most = copies ? least(batch, parts(COPIED, K * rows)) : batch; /* products at a time */
    uint32_t *copy = copies ? malloc((size_t)(most * rows * units) * sizeof *copy) : NULL;
    if (copies && !copy) return 1;
#pragma omp parallel num_threads(threads)
    {
        i64 team, me = thread_of(&team), strips = parts(most * parts(least(rows, M), ROWS) * parts(N, COLUMNS), team);
        size_t of_sums = (size_t)(K > DEPTH ? strips : 1) * ROWS * COLUMNS * sizeof(float);
        size_t of_panel = (size_t)least(DEPTH / 2, units) * COLUMNS * sizeof(uint32_t);
        char *room = aligned_alloc(64, of_panel + of_sums); /* panels are read by whole cache lines */
        if (!room) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
        for (i64 n = 0; n < batch && !failed; n += most)
            for (i64 top = 0; top < M; top += rows) {
                i64 count = least(most, batch - n), bottom = least(top + rows, M), groups = parts(bottom - top, GROUP);
                Product p = {
                    {(const char *)a + n * a_batch * (a_is_float ? 4 : 2), a_row, a_column, a_is_float},
                    {(const char *)b + n * b_batch * (b_is_float ? 4 : 2), b_row, b_column, b_is_float},
                    addend,
                    (char *)out + n * out_batch * (out_is_float ? 4 : 2),
                    a_batch, b_batch, out_batch, addend_stride, out_stride, M, N, K, out_is_float, copy, rows / ROWS};
                if (copies) {
#pragma omp for schedule(static)
                    for (i64 i = 0; i < count * groups; i++) {
                        i64 which = i / groups, row = i % groups * GROUP;
                        pack_strips(p.a, which * a_batch + (top + row) * a_row, least(GROUP, bottom - top - row), K,
                                    copy + (which * rows + row) * units);
                    }
                }
                i64 all = count * parts(bottom - top, ROWS) * parts(N, COLUMNS);
                multiply_strips(&p, top, bottom, all * me / team, all * (me + 1) / team, (uint32_t *)room,
                                (float *)(room + of_panel));
                if (copies) {
#pragma omp barrier
                }
            }
        free(room);
    }
    free(copy);
    return failed;
}
#endif
