/* 3x3 convolutions by F(2 x 2, 3 x 3) and F(4 x 4, 3 x 3), which `normfree.ops.winograd` explains and calls.
 *
 * A map is B H W C. It has a tile for every SIDE x SIDE outputs, in memory order; the last ones may extend beyond its
 * border. Its planes are T² matrices tiles x channels, one for each position in a tile of T x T inputs, T = SIDE + 2.
 * Filters and their gradients are O 3 3 I/groups. Channels and filters of a group are multiples of PANEL.
 *
 * Transforms are written for a `side` that is a constant where they are inlined. Each applies one of the matrices of
 * Lavin and Gray (2015) to the columns of a tile, and then to the rows of the result. */

#include "share.h"

#include <string.h>

enum { PANEL = 16, ROWS = 12, HALF = ROWS / 2 }; /* columns and rows of a small product */
enum { PAD = 16 }; /* numbers between planes: a distance of a power of two would map all to one set of the cache */

#define EACH(lane) for (int lane = 0; lane < PANEL; lane++)

typedef float Numbers[PANEL]; /* one number for each of PANEL channels */

/* Only matrix products are fused with additions. Every number of a product is one sum in the order of k, so registers of
 * any width give the same bits. Python calls these kernels only if the processor has AVX2. Tests define PLAIN to compare
 * the code for other processors, and for the compiler of Visual Studio, which does not define __x86_64__. */
#if defined(__x86_64__) && !defined(PLAIN)
#include <immintrin.h>
#define WITH_256 __attribute__((target("avx2,fma")))
#if defined(__clang__)
#define WITH_512 __attribute__((target("avx512f")))
#else
#define WITH_512 __attribute__((target("avx512f,prefer-vector-width=512")))
#endif
#else
#define WITH_256
#endif

/* A map, and the planes of some of its tiles and channels. */
typedef struct {
    float *map, *planes;
    const float *border; /* a pixel of zeros outside the map; for outputs, a pixel that is added to each (the bias) */
    int64_t height, width, channels; /* of the map */
    int64_t from, to, each;          /* range of channels of the planes; every `each` channels have T² planes */
    int64_t first, plane;            /* first tile of the planes; distance from plane to plane */
} Maps;

/* The image of a tile, and the row and column of its first output. */
typedef struct {
    int64_t image, top, left;
} Corner;

INLINE Corner corner_of(const Maps *k, int64_t tile, int side) {
    int64_t tall = (k->height + side - 1) / side, wide = (k->width + side - 1) / side;
    tile += k->first;
    int64_t inside = tile % (tall * wide);
    return (Corner){tile / (tall * wide), inside / wide * side, inside % wide * side};
}

INLINE float *pixel(const Maps *k, int64_t image, int64_t y, int64_t x) {
    int inside = y >= 0 && x >= 0 && y < k->height && x < k->width;
    return inside ? k->map + ((image * k->height + y) * k->width + x) * k->channels : (float *)k->border;
}

/* Address of `tile` and `channel` in the first plane. */
INLINE float *on_plane(const Maps *k, int64_t tile, int64_t channel, int side) {
    int64_t inside = channel - k->from;
    return k->planes + inside / k->each * (side + 2) * (side + 2) * k->plane + tile * k->each + inside % k->each;
}

/* The numbers of a line are `step` apart in `d`, and those of its result `stride` apart in `to`. */
#define D(i) d[(i) * step][l]
#define TO(i) to[(i) * stride + l]

/* Bᵀ d: side + 2 numbers to as many. */
INLINE void input_line(Numbers *d, int step, float *restrict to, int64_t stride, int side) {
    if (side == 2) EACH(l) {
        TO(0) = D(0) - D(2);
        TO(1) = D(1) + D(2);
        TO(2) = D(2) - D(1);
        TO(3) = D(1) - D(3);
    }
    else EACH(l) {
        float a = D(4) - 4 * D(2), b = D(3) - 4 * D(1), c = D(4) - D(2), e = 2 * (D(3) - D(1));
        TO(0) = 4 * D(0) - 5 * D(2) + D(4);
        TO(1) = a + b;
        TO(2) = a - b;
        TO(3) = c + e;
        TO(4) = c - e;
        TO(5) = 4 * D(1) - 5 * D(3) + D(5);
    }
}

/* Aᵀ d: side + 2 numbers to `side`. */
INLINE void output_line(Numbers *d, int step, float *restrict to, int64_t stride, int side) {
    if (side == 2) EACH(l) {
        TO(0) = D(0) + D(1) + D(2);
        TO(1) = D(1) - D(2) - D(3);
    }
    else EACH(l) {
        float a = D(1) + D(2), b = D(1) - D(2), c = D(3) + D(4), e = D(3) - D(4);
        TO(0) = D(0) + a + c;
        TO(1) = b + 2 * e;
        TO(2) = a + 4 * c;
        TO(3) = b + 8 * e + D(5);
    }
}

/* A d: `side` numbers to side + 2. */
INLINE void gradient_line(Numbers *d, int step, float *restrict to, int64_t stride, int side) {
    if (side == 2) EACH(l) {
        TO(0) = D(0);
        TO(1) = D(0) + D(1);
        TO(2) = D(0) - D(1);
        TO(3) = -D(1);
    }
    else EACH(l) {
        float a = D(0) + D(2), b = D(1) + D(3), c = D(0) + 4 * D(2), e = 2 * D(1) + 8 * D(3);
        TO(0) = D(0);
        TO(1) = a + b;
        TO(2) = a - b;
        TO(3) = c + e;
        TO(4) = c - e;
        TO(5) = D(3);
    }
}

#define SIXTH (1 / 6.0f)

/* G d: 3 numbers to side + 2. */
INLINE void filter_line(Numbers *d, int step, float *restrict to, int64_t stride, int side) {
    if (side == 2) EACH(l) {
        float a = 0.5f * (D(0) + D(2)), b = 0.5f * D(1);
        TO(0) = D(0);
        TO(1) = a + b;
        TO(2) = a - b;
        TO(3) = D(2);
    }
    else EACH(l) {
        float a = -SIXTH * (D(0) + D(2)), b = -SIXTH * D(1), c = SIXTH * (0.25f * D(0) + D(2)), e = 0.5f * SIXTH * D(1);
        TO(0) = 0.25f * D(0);
        TO(1) = a + b;
        TO(2) = a - b;
        TO(3) = c + e;
        TO(4) = c - e;
        TO(5) = D(2);
    }
}

/* Gᵀ d: side + 2 numbers to 3. */
INLINE void filter_gradient_line(Numbers *d, int step, float *restrict to, int64_t stride, int side) {
    if (side == 2) EACH(l) {
        float a = 0.5f * (D(1) + D(2));
        TO(0) = D(0) + a;
        TO(1) = 0.5f * (D(1) - D(2));
        TO(2) = a + D(3);
    }
    else EACH(l) {
        float a = D(1) + D(2), c = D(3) + D(4);
        TO(0) = 0.25f * D(0) + SIXTH * (0.25f * c - a);
        TO(1) = SIXTH * (D(2) - D(1) + 0.5f * (D(3) - D(4)));
        TO(2) = SIXTH * (c - a) + D(5);
    }
}

/* planes = Bᵀ d B of the T x T pixels d around the tile. */
INLINE void input_tile(const Maps *k, int64_t tile, int side) {
    enum { MOST = 6 };
    int all = side + 2;
    Corner corner = corner_of(k, tile, side);
    const float *from[MOST * MOST];
    for (int i = 0; i < all * all; i++)
        from[i] = pixel(k, corner.image, corner.top - 1 + i / all, corner.left - 1 + i % all);
    for (int64_t channel = k->from; channel < k->to; channel += PANEL) {
        float *planes = on_plane(k, tile, channel, side);
        Numbers d[MOST], e[MOST * MOST];
        for (int x = 0; x < all; x++) {
            for (int y = 0; y < all; y++) EACH(l) d[y][l] = from[y * all + x][channel + l];
            input_line(d, 1, e[x], all * PANEL, side);
        }
        for (int y = 0; y < all; y++) input_line(e + y * all, 1, planes + y * all * k->plane, k->plane, side);
    }
}

/* map = Aᵀ m A + border of the T x T numbers m of the tile. */
INLINE void output_tile(const Maps *k, int64_t tile, int side) {
    enum { MOST = 6 };
    int all = side + 2;
    Corner corner = corner_of(k, tile, side);
    int64_t down = k->height - corner.top, right = k->width - corner.left;
    float *pixels = pixel(k, corner.image, corner.top, corner.left);
    for (int64_t channel = k->from; channel < k->to; channel += PANEL) {
        const float *planes = on_plane(k, tile, channel, side), *added = k->border + channel;
        Numbers d[MOST], e[MOST * MOST], line[MOST];
        for (int x = 0; x < all; x++) {
            for (int y = 0; y < all; y++) EACH(l) d[y][l] = planes[(y * all + x) * k->plane + l];
            output_line(d, 1, e[x], all * PANEL, side);
        }
        for (int y = 0; y < side && y < down; y++) {
            output_line(e + y * all, 1, line[0], PANEL, side);
            for (int x = 0; x < side; x++)
                if (x < right) EACH(l) pixels[(y * k->width + x) * k->channels + channel + l] = line[x][l] + added[l];
        }
    }
}

/* planes = A g Aᵀ of the gradients g of the tile's outputs. */
INLINE void gradient_tile(const Maps *k, int64_t tile, int side) {
    enum { MOST = 6 };
    int all = side + 2;
    Corner corner = corner_of(k, tile, side);
    const float *from[MOST * MOST];
    for (int i = 0; i < side * side; i++)
        from[i] = pixel(k, corner.image, corner.top + i / side, corner.left + i % side);
    for (int64_t channel = k->from; channel < k->to; channel += PANEL) {
        float *planes = on_plane(k, tile, channel, side);
        Numbers d[MOST], e[MOST * MOST];
        for (int x = 0; x < side; x++) {
            for (int y = 0; y < side; y++) EACH(l) d[y][l] = from[y * side + x][channel + l];
            gradient_line(d, 1, e[x], side * PANEL, side);
        }
        for (int y = 0; y < all; y++) gradient_line(e + y * side, 1, planes + y * all * k->plane, k->plane, side);
    }
}

typedef struct {
    float *filters, *planes;
    int64_t inputs, each, plane; /* channels of a filter; filters of a group; distance from plane to plane */
    int rotated, side;
} Filters;

/* out = G f Gᵀ of the 3 x 3 numbers f of PANEL inputs, with position i at out[i·PANEL²]. */
INLINE void filter_planes(const float *f, int64_t inputs, float *restrict out, int rotated, int side) {
    enum { MOST = 6 };
    Numbers d[3], e[MOST * 3];
    for (int x = 0; x < 3; x++) {
        for (int y = 0; y < 3; y++) {
            int tap = rotated ? 8 - (y * 3 + x) : y * 3 + x;
            PREFETCH(f + tap * inputs + PANEL); /* for the next call: lines are far apart */
            EACH(l) d[y][l] = f[tap * inputs + l];
        }
        filter_line(d, 1, e[x], 3 * PANEL, side);
    }
    for (int y = 0; y < side + 2; y++)
        filter_line(e + y * 3, 1, out + y * (side + 2) * PANEL * PANEL, PANEL * PANEL, side);
}

/* Planes of the filters PANEL·start to PANEL·stop, in the layout of the products: groups x T² x N/PANEL x K x PANEL. The
 * convolution sums over K inputs for N filters; its gradient uses rotated filters and sums over the filters. */
INLINE void filters_between(const Filters *k, int64_t start, int64_t stop, int side) {
    enum { MOST = 36 };
    int positions = (side + 2) * (side + 2);
    for (int64_t filter = PANEL * start; filter < PANEL * stop; filter += PANEL) {
        int64_t inside = filter % k->each;
        float *planes = k->planes + filter / k->each * positions * k->plane, square[MOST][PANEL * PANEL];
        for (int64_t input = 0; input < k->inputs; input += PANEL) {
            for (int64_t one = 0; one < PANEL; one++) {
                const float *from = k->filters + (filter + one) * 9 * k->inputs + input;
                filter_planes(from, k->inputs, square[0] + one * PANEL, k->rotated, side);
            }
            int64_t to = k->rotated ? input * k->each + inside * PANEL : inside * k->inputs + input * PANEL;
            for (int position = 0; position < positions; position++) {
                float *found = planes + position * k->plane + to, *own = square[position];
                if (k->rotated) memcpy(found, own, sizeof square[position]);
                else for (int row = 0; row < PANEL; row++) EACH(l) found[row * PANEL + l] = own[l * PANEL + row];
            }
        }
    }
}

WIDE void winograd_filters_between(const void *given, int64_t start, int64_t stop) {
    const Filters *k = given;
    if (k->side == 2) filters_between(k, start, stop, 2);
    else filters_between(k, start, stop, 4);
}

/* Compute the planes of panels·PANEL filters with `inputs` channels each; a group has `each` filters. */
EXPORT void winograd_filters(
    float *filters, float *planes, int64_t inputs, int64_t each, int64_t plane, int rotated, int side, int64_t panels,
    int threads) {
    share(winograd_filters_between, &(Filters){filters, planes, inputs, each, plane, rotated, side}, panels, 1, threads);
}

/* c = a b of ROWS x depth and depth x PANEL, or c += a b if `more`. Element k of row r of `a` is a[r·next_row + k·next];
 * rows of `c` are `width` numbers apart. */
typedef void Product(
    const float *a, int64_t next_row, int64_t next, const float *b, float *c, int64_t depth, int64_t width, int more);

#if defined(WITH_512)
typedef float Lanes __attribute__((vector_size(32), aligned(4)));
enum { EIGHT = 8 };

/* For 16 registers of eight numbers, which hold half of the sums. */
WITH_256 static void product_256(
    const float *a, int64_t next_row, int64_t next, const float *b, float *c, int64_t depth, int64_t width, int more) {
    for (int half = 0; half < 2; half++, a += HALF * next_row, c += HALF * width) {
        Lanes sums[HALF][2];
#pragma GCC unroll 6
        for (int row = 0; row < HALF; row++) sums[row][0] = sums[row][1] = (Lanes){0};
#pragma GCC unroll 1
        for (int64_t k = 0; k < depth; k++) {
            Lanes left = *(const Lanes *)(b + k * PANEL), right = *(const Lanes *)(b + k * PANEL + EIGHT);
#pragma GCC unroll 6
            for (int row = 0; row < HALF; row++) {
                float one = a[row * next_row + k * next];
                Lanes same = {one, one, one, one, one, one, one, one};
                sums[row][0] = _mm256_fmadd_ps(same, left, sums[row][0]);
                sums[row][1] = _mm256_fmadd_ps(same, right, sums[row][1]);
            }
        }
#pragma GCC unroll 6
        for (int row = 0; row < HALF; row++) {
            Lanes *left = (Lanes *)(c + row * width), *right = (Lanes *)(c + row * width + EIGHT);
            if (more) sums[row][0] += *left, sums[row][1] += *right;
            *left = sums[row][0];
            *right = sums[row][1];
        }
    }
}

#if !defined(NARROW)
/* For 32 registers of sixteen numbers. */
WITH_512 static void product_512(
    const float *a, int64_t next_row, int64_t next, const float *b, float *c, int64_t depth, int64_t width, int more) {
    __m512 sums[ROWS];
#pragma GCC unroll 12
    for (int row = 0; row < ROWS; row++) sums[row] = _mm512_setzero_ps();
#pragma GCC unroll 1
    for (int64_t k = 0; k < depth; k++) {
        __m512 right = _mm512_loadu_ps(b + k * PANEL);
#pragma GCC unroll 12
        for (int row = 0; row < ROWS; row++)
            sums[row] = _mm512_fmadd_ps(_mm512_set1_ps(a[row * next_row + k * next]), right, sums[row]);
    }
#pragma GCC unroll 12
    for (int row = 0; row < ROWS; row++) {
        if (more) sums[row] = _mm512_add_ps(sums[row], _mm512_loadu_ps(c + row * width));
        _mm512_storeu_ps(c + row * width, sums[row]);
    }
}
#endif
#else
static void product_256(
    const float *a, int64_t next_row, int64_t next, const float *b, float *c, int64_t depth, int64_t width, int more) {
    for (int row = 0; row < ROWS; row++) {
        float sums[PANEL] = {0};
        for (int64_t k = 0; k < depth; k++) EACH(l) sums[l] = fmaf(a[row * next_row + k * next], b[k * PANEL + l], sums[l]);
        EACH(l) c[row * width + l] = more ? sums[l] + c[row * width + l] : sums[l];
    }
}
#endif

typedef struct {
    float *x, *y;
    const float *filters, *zeros, *bias;
    float *scratch;
    int64_t height, width, inputs, outputs, groups, plane, tiles, block;
    int side;
} Convolution;

/* Item i is block i % blocks of tiles in group i / blocks. */
INLINE void convolve_between(const Convolution *k, int64_t start, int64_t stop, int side, Product *product) {
    int64_t own = k->inputs / k->groups, each = k->outputs / k->groups, blocks = (k->tiles + k->block - 1) / k->block;
    int64_t before = k->block * own + PAD, after = k->block * each + PAD; /* distances from plane to plane */
    int positions = (side + 2) * (side + 2);
    float *planes = k->scratch + thread() * positions * (before + after), *products = planes + positions * before;
    for (int64_t item = start; item < stop; item++) {
        int64_t group = item / blocks, first = item % blocks * k->block;
        int64_t tiles = first + k->block < k->tiles ? k->block : k->tiles - first;
        const float *filters = k->filters + group * positions * k->plane;
        Maps in = {k->x, planes, k->zeros, k->height, k->width, k->inputs, group * own, (group + 1) * own, own, first,
                   before};
        Maps out = {k->y, products, k->bias, k->height, k->width, k->outputs, group * each, (group + 1) * each, each,
                    first, after};
        for (int64_t tile = 0; tile < tiles; tile++) input_tile(&in, tile, side);
        for (int position = 0; position < positions; position++)
            for (int64_t panel = 0; panel < each; panel += PANEL)
                for (int64_t tile = 0; tile < tiles; tile += ROWS)
                    product(
                        planes + position * before + tile * own, own, 1, filters + position * k->plane + panel * own,
                        products + position * after + tile * each + panel, own, each, 0);
        for (int64_t tile = 0; tile < tiles; tile++) output_tile(&out, tile, side);
    }
}

/* filter = Gᵀ u G of the T x T numbers u of each input. */
INLINE void filter_of_planes(float *filter, const float *planes, int64_t inputs, int64_t plane, int side) {
    enum { MOST = 6 };
    int all = side + 2;
    for (int64_t input = 0; input < inputs; input += PANEL) {
        Numbers d[MOST], e[MOST * 3];
        for (int x = 0; x < all; x++) {
            for (int y = 0; y < all; y++) EACH(l) d[y][l] = planes[(y * all + x) * plane + input + l];
            filter_gradient_line(d, 1, e[x], all * PANEL, side);
        }
        for (int y = 0; y < 3; y++)
            filter_gradient_line(e + y * all, 1, filter + 3 * y * inputs + input, inputs, side);
    }
}

typedef struct {
    float *x, *grad, *filters;
    const float *zeros;
    float *scratch;
    int64_t height, width, inputs, outputs, groups, parts, tiles, block;
    int side;
} WeightGradient;

/* Item i is part i % parts of the filters in group i / parts. */
INLINE void weight_gradient_between(
    const WeightGradient *k, int64_t start, int64_t stop, int side, Product *product) {
    int64_t own = k->inputs / k->groups, each = k->outputs / k->groups / k->parts;
    int64_t rows = (each + ROWS - 1) / ROWS * ROWS, plane = rows * own + PAD; /* of sums */
    int64_t before = k->block * PANEL + PAD, after = k->block * each + PAD;  /* distances from plane to plane */
    int positions = (side + 2) * (side + 2);
    int64_t panels = own * (k->block + 1) * positions, gradients = positions * after + ROWS;
    float *sums = k->scratch + thread() * (positions * plane + panels + gradients);
    float *planes = sums + positions * plane, *by_output = planes + panels;
    for (int64_t item = start; item < stop; item++) {
        int64_t group = item / k->parts, filter = item * each;
        for (int64_t first = 0; first < k->tiles; first += k->block) {
            int64_t tiles = first + k->block < k->tiles ? k->block : k->tiles - first;
            Maps in = {k->x, planes, k->zeros, k->height, k->width, k->inputs, group * own, (group + 1) * own, PANEL,
                       first, before};
            Maps out = {k->grad, by_output, k->zeros, k->height, k->width, k->outputs, filter, filter + each, each,
                        first, after};
            for (int64_t tile = 0; tile < tiles; tile++) {
                input_tile(&in, tile, side);
                gradient_tile(&out, tile, side);
            }
            for (int position = 0; position < positions; position++)
                for (int64_t panel = 0; panel < own; panel += PANEL)
                    for (int64_t row = 0; row < each; row += ROWS)
                        product(
                            by_output + position * after + row, 1, each,
                            planes + (panel / PANEL * positions + position) * before,
                            sums + position * plane + row * own + panel, tiles, own, first > 0);
        }
        for (int64_t row = 0; row < each; row++)
            filter_of_planes(k->filters + (filter + row) * 9 * own, sums + row * own, own, plane, side);
    }
}

/* Define a kernel for registers of one width; WIDEST names that for the widest ones of this processor. */
#define KERNEL(body, Work, suffix, with, product) \
    with static void body##_##suffix(const void *given, int64_t start, int64_t stop) { \
        const Work *k = given; \
        if (k->side == 2) body##_between(k, start, stop, 2, product); \
        else body##_between(k, start, stop, 4, product); \
    }
KERNEL(convolve, Convolution, 256, WITH_256, product_256)
KERNEL(weight_gradient, WeightGradient, 256, WITH_256, product_256)
#if defined(WITH_512) && !defined(NARROW)
KERNEL(convolve, Convolution, 512, WITH_512, product_512)
KERNEL(weight_gradient, WeightGradient, 512, WITH_512, product_512)
#endif

#if defined(WITH_512) && !defined(NARROW)
#define WIDEST(body) (__builtin_cpu_supports("avx512f") ? body##_512 : body##_256)
#else
#define WIDEST(body) body##_256
#endif

/* y = conv(x) + bias. `filters`: their planes, `plane` numbers apart. `block`: tiles at a time, a multiple of ROWS.
 * `scratch`: for each thread T² x (block x channels of a group + PAD) numbers of both maps. */
EXPORT void winograd_convolve(
    float *x, float *y, const float *filters, const float *zeros, const float *bias, float *scratch, int64_t height,
    int64_t width, int64_t inputs, int64_t outputs, int64_t groups, int64_t plane, int64_t tiles, int64_t block,
    int side, int64_t items, int threads) {
    Convolution all = {x, y, filters, zeros, bias, scratch, height, width, inputs, outputs, groups, plane, tiles,
                       block, side};
    share(WIDEST(convolve), &all, items, 1, threads);
}

/* Gradients of the filters from those of the outputs. `block`: tiles at a time. `scratch`: for each thread
 * T² x (rows x own + PAD) sums, where rows is the number of filters of a part rounded up to ROWS and own the number of
 * inputs of a group; T² x own x (block + 1) for planes of the input; and T² x (block x filters of a part + PAD) + ROWS
 * for planes of the outputs' gradients. */
EXPORT void winograd_weight_gradient(
    float *x, float *grad, float *filters, const float *zeros, float *scratch, int64_t height, int64_t width,
    int64_t inputs, int64_t outputs, int64_t groups, int64_t parts, int64_t tiles, int64_t block, int side,
    int64_t items, int threads) {
    WeightGradient all = {x, grad, filters, zeros, scratch, height, width, inputs, outputs, groups, parts, tiles,
                          block, side};
    share(WIDEST(weight_gradient), &all, items, 1, threads);
}
