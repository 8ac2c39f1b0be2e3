/* Matrix products of bf16 and float32 on processors that have no instructions for bf16.
 *
 * out (M, N) = a (M, K) b (K, N) [+ addend], summed in float32; a, b and out are bf16 or float32 each, a and b may lie
 * transposed. The way of BLIS (Van Zee & van de Geijn 2015): parts of a and b are copied, as float32, into panels in
 * the order in which they are read; the innermost loop keeps a tile of ROWS x COLUMNS of the output in registers.
 */
#include "cpu_bf16.h"

#include <stdlib.h>
#ifdef _OPENMP
#include <omp.h>
#endif

typedef float lanes __attribute__((vector_size(32)));

enum {
    ROWS = 6,
    COLUMNS = 16,      /* 6 x 16 sums fill 12 of the 16 registers of AVX2 */
    DEPTH = 1600,       /* of a panel, at most */
    NEAR = 640,         /* of what is read of a panel of b before the next of a: it stays in the first cache */
    HEIGHT = 16 * ROWS, /* rows of a that are copied at a time, at most */
    SECOND = 60000,     /* their elements, at most: they stay in the second cache */
    LAST = 1 << 21      /* elements of b that are copied at a time, at most: they stay in the last cache */
};

typedef struct {
    const void *start;
    i64 row, column; /* how many elements further the next row and the next column are; one of them is 1 */
    int is_float;
} Matrix;

static i64 this_thread(void) {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

static i64 least(i64 x, i64 y) { return x < y ? x : y; }

static i64 parts(i64 whole, i64 size) { return (whole + size - 1) / size; }

/* One panel: `count` vectors of `depth` elements side by side, as many as `width` with zeros for those that lack.
 * `along` elements further is the next of a vector, `across` the next vector. */
#define PACK(NAME, TYPE, WIDE)                                                                                        \
    static inline void NAME(const TYPE *from, i64 along, i64 across, i64 count, i64 depth, int width, float *to) {    \
        if (count < width) memset(to, 0, (size_t)(depth * width) * sizeof(float));                                    \
        if (across == 1 && count == width) {                                                                          \
            for (i64 k = 0; k < depth; k++)                                                                           \
                for (int i = 0; i < width; i++) to[k * width + i] = WIDE(from[k * along + i]);                        \
        } else {                                                                                                      \
            for (i64 i = 0; i < count; i++)                                                                           \
                for (i64 k = 0; k < depth; k++) to[k * width + i] = WIDE(from[k * along + i * across]);               \
        }                                                                                                             \
    }
#define SAME(x) (x)
PACK(pack_narrow, bf16, wide)
PACK(pack_wide, float, SAME)

static void pack(Matrix from, i64 offset, i64 along, i64 across, i64 count, i64 depth, int width, float *to) {
    if (from.is_float)
        pack_wide((const float *)from.start + offset, along, across, count, depth, width, to);
    else
        pack_narrow((const bf16 *)from.start + offset, along, across, count, depth, width, to);
}

/* tile = (tile, or 0 where it is fresh) + panel a, panel b. */
static void multiply_panels(const float *restrict a, const float *restrict b, i64 depth, int fresh,
                            float *restrict tile) {
    lanes sums[ROWS][2];
    for (int i = 0; i < ROWS; i++) {
        sums[i][0] = sums[i][1] = (lanes){0};
        if (!fresh) {
            memcpy(&sums[i][0], tile + i * COLUMNS, sizeof(lanes));
            memcpy(&sums[i][1], tile + i * COLUMNS + 8, sizeof(lanes));
        }
    }
    for (i64 k = 0; k < depth; k++) {
        lanes left, right;
        memcpy(&left, b + k * COLUMNS, sizeof left);
        memcpy(&right, b + k * COLUMNS + 8, sizeof right);
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; i++) {
            sums[i][0] += a[k * ROWS + i] * left;
            sums[i][1] += a[k * ROWS + i] * right;
        }
    }
    for (int i = 0; i < ROWS; i++) {
        memcpy(tile + i * COLUMNS, &sums[i][0], sizeof(lanes));
        memcpy(tile + i * COLUMNS + 8, &sums[i][1], sizeof(lanes));
    }
}

/* tile + addend to out; addend and out are rows of `stride`, where the tile begins. */
static void store(const float *tile, const float *addend, i64 addend_stride, void *out, i64 stride, int is_float,
                  i64 rows, i64 columns) {
    for (i64 i = 0; i < rows; i++) {
        float sums[COLUMNS];
        memcpy(sums, tile + i * COLUMNS, sizeof sums);
        if (addend)
            for (i64 j = 0; j < columns; j++) sums[j] += addend[i * addend_stride + j];
        if (is_float) {
            memcpy((float *)out + i * stride, sums, (size_t)columns * sizeof(float));
        } else if (columns == COLUMNS) {
            for (i64 j = 0; j < COLUMNS; j++) ((bf16 *)out)[i * stride + j] = narrow(sums[j]);
        } else {
            for (i64 j = 0; j < columns; j++) ((bf16 *)out)[i * stride + j] = narrow(sums[j]);
        }
    }
}

/* Where one product is. `sums` holds unfinished sums of the columns from `first`, or is NULL if there are none. */
typedef struct {
    Matrix a, b;
    const float *addend;
    void *out;
    i64 M, N, addend_stride, out_stride;
    int out_is_float;
} Product;

/* All that the panels of b from column `first` and from `low` in depth give for rows `top` … `bottom`. */
static void multiply_block(const Product *p, const float *panels, float *mine, float *sums, i64 first, i64 width,
                           i64 low, i64 depth, int is_first, int is_last, i64 top, i64 bottom) {
    for (i64 i = top; i < bottom; i += ROWS)
        pack(p->a, i * p->a.row + low * p->a.column, p->a.column, p->a.row, least(ROWS, bottom - i), depth, ROWS,
             mine + (i - top) * depth);
    float tiles[HEIGHT * COLUMNS];
    i64 near = parts(depth, parts(depth, NEAR));
    for (i64 j = 0; j < width; j += COLUMNS) {
        for (i64 k = 0; k < depth; k += near)
            for (i64 i = top; i < bottom; i += ROWS)
                multiply_panels(mine + (i - top) * depth + k * ROWS, panels + j * depth + k * COLUMNS,
                                least(near, depth - k), k == 0, tiles + (i - top) * COLUMNS);
        for (i64 i = top; i < bottom; i += ROWS) {
            const float *tile = tiles + (i - top) * COLUMNS;
            const float *addend = is_first ? p->addend ? p->addend + i * p->addend_stride + first + j : NULL
                                           : sums + i * width + j;
            i64 addend_stride = is_first ? p->addend_stride : width;
            i64 rows = least(ROWS, bottom - i), columns = least(COLUMNS, width - j);
            if (!is_last)
                store(tile, addend, addend_stride, sums + i * width + j, width, 1, rows, columns);
            else if (p->out_is_float)
                store(tile, addend, addend_stride, (float *)p->out + i * p->out_stride + first + j, p->out_stride, 1,
                      rows, columns);
            else
                store(tile, addend, addend_stride, (bf16 *)p->out + i * p->out_stride + first + j, p->out_stride, 0,
                      rows, columns);
        }
    }
}

/* `batch` products, `*_batch` elements after each other. Returns 0, or 1 where there is no memory for the panels. */
int multiply(const void *a, i64 a_batch, i64 a_row, i64 a_column, int a_is_float, const void *b, i64 b_batch, i64 b_row,
             i64 b_column, int b_is_float, const float *addend, i64 addend_stride, void *out, i64 out_batch,
             i64 out_stride, int out_is_float, i64 batch, i64 M, i64 N, i64 K, int threads) {
    i64 depths = parts(K, DEPTH), deepest = parts(K, depths);
    i64 room = LAST / deepest / COLUMNS * COLUMNS, widest = least(parts(N, COLUMNS) * COLUMNS, room);
    i64 high = least(HEIGHT, SECOND / deepest / ROWS * ROWS), height = least(high, parts(parts(M, threads), ROWS) * ROWS);
    float *panels = malloc((size_t)(deepest * widest) * sizeof(float));
    float *blocks = malloc((size_t)(threads * deepest * height) * sizeof(float));
    float *sums = depths > 1 ? malloc((size_t)(M * widest) * sizeof(float)) : NULL;
    int failed = !panels || !blocks || (depths > 1 && !sums);
    if (!failed)
#pragma omp parallel num_threads(threads)
    {
        float *mine = blocks + this_thread() * deepest * height;
        for (i64 n = 0; n < batch; n++) {
            Product p = {
                {(const char *)a + n * a_batch * (a_is_float ? 4 : 2), a_row, a_column, a_is_float},
                {(const char *)b + n * b_batch * (b_is_float ? 4 : 2), b_row, b_column, b_is_float},
                addend,
                (char *)out + n * out_batch * (out_is_float ? 4 : 2),
                M, N, addend_stride, out_stride, out_is_float};
            for (i64 first = 0; first < N; first += widest) {
                i64 width = least(widest, N - first);
                for (i64 low = 0; low < K; low += deepest) {
                    i64 depth = least(deepest, K - low);
#pragma omp for schedule(static)
                    for (i64 j = 0; j < width; j += COLUMNS)
                        pack(p.b, low * b_row + (first + j) * b_column, b_row, b_column, least(COLUMNS, width - j),
                             depth, COLUMNS, panels + j * depth);
#pragma omp for schedule(dynamic)
                    for (i64 top = 0; top < M; top += height)
                        multiply_block(&p, panels, mine, sums, first, width, low, depth, low == 0,
                                       low + depth == K, top, least(top + height, M));
                }
            }
        }
    }
    free(panels);
    free(blocks);
    free(sums);
    return failed;
}
