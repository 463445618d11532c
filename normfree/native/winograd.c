/* 3x3 convolutions by F(2 x 2, 3 x 3), which `normfree.ops.winograd` explains and calls.
 *
 * A map is B H W C. It has a tile for every 2 x 2 outputs, in memory order; the last ones may extend beyond its border.
 * Its planes are 16 matrices tiles x channels, one for each position in a tile of 4 x 4. Filters and their gradients are
 * O 3 3 I/groups. Channels and filters of a group are multiples of PANEL. */

#include <string.h>

#include "share.h"

enum { EIGHT = 8, PANEL = 16, ROWS = 6 }; /* lanes of a register; columns and rows of a small product */
enum { PAD = 16 }; /* numbers between planes: a distance of a power of two would map all to one set of the cache */

#define EACH(lane, count) for (int lane = 0; lane < (count); lane++)

/* A map, and the planes of some of its tiles and channels. */
typedef struct {
    float *map, *planes;
    const float *border; /* a pixel of zeros outside the map; for outputs, a pixel that is added to each (the bias) */
    int64_t height, width, channels; /* of the map */
    int64_t from, to, each;          /* range of channels of the planes; every `each` channels have 16 planes */
    int64_t first, plane;            /* first tile of the planes; distance from plane to plane */
} Maps;

/* The image of a tile, and the row and column of its first output. */
typedef struct {
    int64_t image, top, left;
} Corner;

INLINE Corner corner_of(const Maps *k, int64_t tile) {
    int64_t tall = (k->height + 1) / 2, wide = (k->width + 1) / 2;
    tile += k->first;
    int64_t inside = tile % (tall * wide);
    return (Corner){tile / (tall * wide), inside / wide * 2, inside % wide * 2};
}

INLINE float *pixel(const Maps *k, int64_t image, int64_t y, int64_t x) {
    int inside = y >= 0 && x >= 0 && y < k->height && x < k->width;
    return inside ? k->map + ((image * k->height + y) * k->width + x) * k->channels : (float *)k->border;
}

/* Address of `tile` and `channel` in the first plane. */
INLINE float *on_plane(const Maps *k, int64_t tile, int64_t channel) {
    int64_t inside = channel - k->from;
    return k->planes + inside / k->each * 16 * k->plane + tile * k->each + inside % k->each;
}

/* planes = Bᵀ d B of the 4 x 4 pixels d around the tile */
INLINE void input_tile(const Maps *k, int64_t tile) {
    int64_t plane = k->plane;
    Corner corner = corner_of(k, tile);
    const float *from[16];
    for (int i = 0; i < 16; i++) from[i] = pixel(k, corner.image, corner.top - 1 + i / 4, corner.left - 1 + i % 4);
    for (int64_t channel = k->from; channel < k->to; channel += EIGHT) {
        float *restrict to = on_plane(k, tile, channel);
        float d[16][EIGHT], e[16][EIGHT];
        for (int i = 0; i < 16; i++) EACH(l, EIGHT) d[i][l] = from[i][channel + l];
        for (int i = 0; i < 4; i++) EACH(l, EIGHT) {
            e[i][l] = d[i][l] - d[8 + i][l];
            e[4 + i][l] = d[4 + i][l] + d[8 + i][l];
            e[8 + i][l] = d[8 + i][l] - d[4 + i][l];
            e[12 + i][l] = d[4 + i][l] - d[12 + i][l];
        }
        for (int i = 0; i < 16; i += 4) EACH(l, EIGHT) {
            to[i * plane + l] = e[i][l] - e[i + 2][l];
            to[(i + 1) * plane + l] = e[i + 1][l] + e[i + 2][l];
            to[(i + 2) * plane + l] = e[i + 2][l] - e[i + 1][l];
            to[(i + 3) * plane + l] = e[i + 1][l] - e[i + 3][l];
        }
    }
}

/* map = Aᵀ m A + border of the 4 x 4 numbers m of the tile. */
INLINE void output_tile(const Maps *k, int64_t tile) {
    int64_t plane = k->plane, row = k->width * k->channels, next = k->channels;
    Corner corner = corner_of(k, tile);
    int down = corner.top + 1 < k->height, right = corner.left + 1 < k->width;
    float *pixels = pixel(k, corner.image, corner.top, corner.left);
    for (int64_t channel = k->from; channel < k->to; channel += EIGHT) {
        const float *from = on_plane(k, tile, channel), *added = k->border + channel;
        float *restrict to = pixels + channel;
        float e[8][EIGHT];
        for (int i = 0; i < 4; i++) EACH(l, EIGHT) {
            float b = from[(4 + i) * plane + l], c = from[(8 + i) * plane + l];
            e[i][l] = from[i * plane + l] + b + c;
            e[4 + i][l] = b - c - from[(12 + i) * plane + l];
        }
        EACH(l, EIGHT) to[l] = e[0][l] + e[1][l] + e[2][l] + added[l];
        if (right) EACH(l, EIGHT) to[next + l] = e[1][l] - e[2][l] - e[3][l] + added[l];
        if (down) EACH(l, EIGHT) to[row + l] = e[4][l] + e[5][l] + e[6][l] + added[l];
        if (down && right) EACH(l, EIGHT) to[row + next + l] = e[5][l] - e[6][l] - e[7][l] + added[l];
    }
}

/* planes = A g Aᵀ of the 2 x 2 gradients g of the tile. */
INLINE void gradient_tile(const Maps *k, int64_t tile) {
    int64_t plane = k->plane;
    Corner corner = corner_of(k, tile);
    const float *from[4];
    for (int i = 0; i < 4; i++) from[i] = pixel(k, corner.image, corner.top + i / 2, corner.left + i % 2);
    for (int64_t channel = k->from; channel < k->to; channel += EIGHT) {
        float *restrict to = on_plane(k, tile, channel);
        float e[8][EIGHT];
        for (int i = 0; i < 2; i++) EACH(l, EIGHT) {
            float a = from[i][channel + l], b = from[2 + i][channel + l];
            e[i][l] = a;
            e[2 + i][l] = a + b;
            e[4 + i][l] = a - b;
            e[6 + i][l] = -b;
        }
        for (int i = 0; i < 4; i++) EACH(l, EIGHT) {
            float a = e[2 * i][l], b = e[2 * i + 1][l];
            to[4 * i * plane + l] = a;
            to[(4 * i + 1) * plane + l] = a + b;
            to[(4 * i + 2) * plane + l] = a - b;
            to[(4 * i + 3) * plane + l] = -b;
        }
    }
}

typedef struct {
    float *filters, *planes;
    int64_t inputs, each, plane; /* channels of a filter; filters of a group; distance from plane to plane */
    int rotated;
} Filters;

/* out = G f Gᵀ of the 3 x 3 numbers f of PANEL inputs, with position i of lane l at out[i·PANEL² + l·step]. Rotating a
 * filter by 180 degrees exchanges the first and last rows, and the first and last columns, of the result. */
INLINE void filter_planes(const float *f, int64_t inputs, float *restrict out, int64_t step, int rotated) {
    float e[12][PANEL];
    for (int i = 0; i < 3; i++) EACH(l, PANEL) {
        float a = f[i * inputs + l], b = f[(3 + i) * inputs + l], c = f[(6 + i) * inputs + l];
        e[i][l] = a;
        e[3 + i][l] = 0.5f * (a + b + c);
        e[6 + i][l] = 0.5f * (a - b + c);
        e[9 + i][l] = c;
    }
    for (int i = 0; i < 4; i++) {
        float *restrict to = out + 4 * (rotated && i % 3 == 0 ? 3 - i : i) * PANEL * PANEL;
        EACH(l, PANEL) {
            float a = e[3 * i][l], b = e[3 * i + 1][l], c = e[3 * i + 2][l];
            to[l * step] = rotated ? c : a;
            to[PANEL * PANEL + l * step] = 0.5f * (a + b + c);
            to[2 * PANEL * PANEL + l * step] = 0.5f * (a - b + c);
            to[3 * PANEL * PANEL + l * step] = rotated ? a : c;
        }
    }
}

/* Planes of the filters PANEL·start to PANEL·stop, in the layout of the products: groups x 16 x N/PANEL x K x PANEL. The
 * convolution sums over K inputs for N filters; its gradient uses rotated filters and sums over the filters. */
WIDE void winograd_filters_between(const void *given, int64_t start, int64_t stop) {
    const Filters *k = given;
    for (int64_t filter = PANEL * start; filter < PANEL * stop; filter += PANEL) {
        int64_t inside = filter % k->each;
        float *planes = k->planes + filter / k->each * 16 * k->plane, square[16][PANEL * PANEL];
        for (int64_t input = 0; input < k->inputs; input += PANEL) {
            for (int64_t one = 0; one < PANEL; one++) {
                const float *from = k->filters + (filter + one) * 9 * k->inputs + input;
                if (k->rotated) filter_planes(from, k->inputs, square[0] + one * PANEL, 1, 1);
                else filter_planes(from, k->inputs, square[0] + one, PANEL, 0);
            }
            int64_t to = k->rotated ? input * k->each + inside * PANEL : inside * k->inputs + input * PANEL;
            for (int position = 0; position < 16; position++)
                memcpy(planes + position * k->plane + to, square[position], sizeof square[position]);
        }
    }
}

/* Compute the planes of panels·PANEL filters with `inputs` channels each; a group has `each` filters. */
void winograd_filters(
    float *filters, float *planes, int64_t inputs, int64_t each, int64_t plane, int rotated, int64_t panels,
    int threads) {
    share(winograd_filters_between, &(Filters){filters, planes, inputs, each, plane, rotated}, panels, 1, threads);
}

/* Small matrix products. Only here are products fused with additions: on x86 with AVX2, not elsewhere. */
typedef float Lanes __attribute__((vector_size(4 * EIGHT), aligned(4)));

#if defined(__x86_64__)
#include <immintrin.h>
#define FUSED __attribute__((target("avx2,fma")))
#define TIMES_PLUS(a, b, c) _mm256_fmadd_ps(a, b, c)
#else
#define FUSED
#define TIMES_PLUS(a, b, c) ((a) * (b) + (c))
#endif

/* c = a b of ROWS x depth and depth x PANEL, or c += a b if `more`. Element k of row r of `a` is a[r·next_row + k·next];
 * rows of `c` are `width` numbers apart. */
FUSED INLINE void product(
    const float *a, int64_t next_row, int64_t next, const float *b, float *c, int64_t depth, int64_t width, int more) {
    Lanes sums[ROWS][2];
#pragma GCC unroll 6
    for (int row = 0; row < ROWS; row++) sums[row][0] = sums[row][1] = (Lanes){0};
#pragma GCC unroll 1
    for (int64_t k = 0; k < depth; k++) {
        Lanes left = *(const Lanes *)(b + k * PANEL), right = *(const Lanes *)(b + k * PANEL + EIGHT);
#pragma GCC unroll 6
        for (int row = 0; row < ROWS; row++) {
            float one = a[row * next_row + k * next];
            Lanes same = {one, one, one, one, one, one, one, one};
            sums[row][0] = TIMES_PLUS(same, left, sums[row][0]);
            sums[row][1] = TIMES_PLUS(same, right, sums[row][1]);
        }
    }
#pragma GCC unroll 6
    for (int row = 0; row < ROWS; row++) {
        Lanes *left = (Lanes *)(c + row * width), *right = (Lanes *)(c + row * width + EIGHT);
        if (more) sums[row][0] += *left, sums[row][1] += *right;
        *left = sums[row][0];
        *right = sums[row][1];
    }
}

typedef struct {
    float *x, *y;
    const float *filters, *zeros, *bias;
    float *scratch;
    int64_t height, width, inputs, outputs, groups, plane, tiles, block;
} Convolution;

/* Item i is block i % blocks of tiles in group i / blocks. */
FUSED void winograd_convolve_between(const void *given, int64_t start, int64_t stop) {
    const Convolution *k = given;
    int64_t own = k->inputs / k->groups, each = k->outputs / k->groups, blocks = (k->tiles + k->block - 1) / k->block;
    int64_t before = k->block * own + PAD, after = k->block * each + PAD; /* distances from plane to plane */
    float *planes = k->scratch + thread() * 16 * (before + after), *products = planes + 16 * before;
    for (int64_t item = start; item < stop; item++) {
        int64_t group = item / blocks, first = item % blocks * k->block;
        int64_t tiles = first + k->block < k->tiles ? k->block : k->tiles - first;
        const float *filters = k->filters + group * 16 * k->plane;
        Maps in = {k->x, planes, k->zeros, k->height, k->width, k->inputs, group * own, (group + 1) * own, own, first,
                   before};
        Maps out = {k->y, products, k->bias, k->height, k->width, k->outputs, group * each, (group + 1) * each, each,
                    first, after};
        for (int64_t tile = 0; tile < tiles; tile++) input_tile(&in, tile);
        for (int position = 0; position < 16; position++)
            for (int64_t panel = 0; panel < each; panel += PANEL)
                for (int64_t tile = 0; tile < tiles; tile += ROWS)
                    product(
                        planes + position * before + tile * own, own, 1, filters + position * k->plane + panel * own,
                        products + position * after + tile * each + panel, own, each, 0);
        for (int64_t tile = 0; tile < tiles; tile++) output_tile(&out, tile);
    }
}

/* y = conv(x) + bias. `filters`: their planes, `plane` numbers apart. `scratch`: for each thread 32 x PAD numbers, and
 * 16 x block x channels of a group of both maps. `block`: tiles at a time, a multiple of ROWS. */
void winograd_convolve(
    float *x, float *y, const float *filters, const float *zeros, const float *bias, float *scratch, int64_t height,
    int64_t width, int64_t inputs, int64_t outputs, int64_t groups, int64_t plane, int64_t tiles, int64_t block,
    int64_t items, int threads) {
    Convolution all = {x, y, filters, zeros, bias, scratch, height, width, inputs, outputs, groups, plane, tiles,
                       block};
    share(winograd_convolve_between, &all, items, 1, threads);
}

/* filter = Gᵀ u G of the 4 x 4 numbers u of each input */
INLINE void filter_of_planes(float *filter, const float *planes, int64_t inputs, int64_t plane) {
    for (int64_t input = 0; input < inputs; input += EIGHT) {
        float *restrict to = filter + input;
        const float *from = planes + input;
        float e[12][EIGHT];
        for (int i = 0; i < 4; i++) EACH(l, EIGHT) {
            float b = from[(4 + i) * plane + l], c = from[(8 + i) * plane + l];
            e[i][l] = from[i * plane + l] + 0.5f * (b + c);
            e[4 + i][l] = 0.5f * (b - c);
            e[8 + i][l] = 0.5f * (b + c) + from[(12 + i) * plane + l];
        }
        for (int i = 0; i < 3; i++) EACH(l, EIGHT) {
            float b = e[4 * i + 1][l], c = e[4 * i + 2][l];
            to[3 * i * inputs + l] = e[4 * i][l] + 0.5f * (b + c);
            to[(3 * i + 1) * inputs + l] = 0.5f * (b - c);
            to[(3 * i + 2) * inputs + l] = 0.5f * (b + c) + e[4 * i + 3][l];
        }
    }
}

typedef struct {
    float *x, *grad, *filters;
    const float *zeros;
    float *scratch;
    int64_t height, width, inputs, outputs, groups, parts, tiles, block;
} WeightGradient;

/* Item i is part i % parts of the filters in group i / parts. */
FUSED void winograd_weight_gradient_between(const void *given, int64_t start, int64_t stop) {
    const WeightGradient *k = given;
    int64_t own = k->inputs / k->groups, each = k->outputs / k->groups / k->parts;
    int64_t rows = (each + ROWS - 1) / ROWS * ROWS, plane = rows * own + PAD; /* of sums */
    int64_t before = k->block * PANEL + PAD, after = k->block * each + PAD;  /* distances from plane to plane */
    int64_t panels = own * (k->block + 1) * 16, gradients = 16 * after + PANEL;
    float *sums = k->scratch + thread() * (16 * plane + panels + gradients);
    float *planes = sums + 16 * plane, *by_output = planes + panels;
    for (int64_t item = start; item < stop; item++) {
        int64_t group = item / k->parts, filter = item * each;
        for (int64_t first = 0; first < k->tiles; first += k->block) {
            int64_t tiles = first + k->block < k->tiles ? k->block : k->tiles - first;
            Maps in = {k->x, planes, k->zeros, k->height, k->width, k->inputs, group * own, (group + 1) * own, PANEL,
                       first, before};
            Maps out = {k->grad, by_output, k->zeros, k->height, k->width, k->outputs, filter, filter + each, each,
                        first, after};
            for (int64_t tile = 0; tile < tiles; tile++) {
                input_tile(&in, tile);
                gradient_tile(&out, tile);
            }
            for (int position = 0; position < 16; position++)
                for (int64_t panel = 0; panel < own; panel += PANEL)
                    for (int64_t row = 0; row < each; row += ROWS)
                        product(
                            by_output + position * after + row, 1, each, planes + (panel + position) * before,
                            sums + position * plane + row * own + panel, tiles, own, first > 0);
        }
        for (int64_t row = 0; row < each; row++)
            filter_of_planes(k->filters + (filter + row) * 9 * own, sums + row * own, own, plane);
    }
}

/* Gradients of the filters from those of the outputs. `block`: tiles at a time. `scratch`: for each thread
 * 16 x (rows x own + PAD) sums, where rows is the number of filters of a part rounded up to ROWS and own the number of
 * inputs of a group; 16 x own x (block + 1) for planes of the input; and 16 x (block x filters of a part + PAD) + PANEL
 * for planes of the outputs' gradients. */
void winograd_weight_gradient(
    float *x, float *grad, float *filters, const float *zeros, float *scratch, int64_t height, int64_t width,
    int64_t inputs, int64_t outputs, int64_t groups, int64_t parts, int64_t tiles, int64_t block, int64_t items,
    int threads) {
    WeightGradient all = {x, grad, filters, zeros, scratch, height, width, inputs, outputs, groups, parts, tiles,
                          block};
    share(winograd_weight_gradient_between, &all, items, 1, threads);
}
