/* One optimizer step, one unit of AGC at a time. `normfree.optim.units` and `normfree.optim.fused` call it.
 * `normfree.native.table` describes `table` and `owner`; `numbers` are 1 - d of the average, then GROUP_NUMBERS of each
 * group. */

#include "share.h"

/* VERSION of normfree.native.library: increase both with any change of a signature in this folder. */
EXPORT const int native_version = 3;

enum { CHUNK = 32 };  /* units at a time: about 100 KB */
#define FLOOR 1e-6f   /* GRADIENT_FLOOR of normfree.optim.agc */

typedef struct {
    int64_t weights, gradient, momentum, average; /* addresses */
    int64_t length, first, group, nothing;
} Row;

enum { LR, DECAY, MOMENTUM, NESTEROV, CLIPPING, GROUP_NUMBERS };

typedef struct {
    const Row *table;
    const int32_t *owner;
    const float *numbers;
    float *values; /* one for each unit */
    int8_t *clipped;
    float eps;
    int average;
} Work;

INLINE float sum_of_squares(const float *restrict x, int64_t length) {
    SUM(total, length, x[i] * x[i])
    return (float)total;
}

WIDE void squares_between(const void *given, int64_t start, int64_t stop) {
    const Work *work = given;
    for (int64_t unit = start; unit < stop; unit++) {
        const Row *row = work->table + work->owner[unit];
        work->values[unit] = sum_of_squares(at(row->gradient, (unit - row->first) * row->length), row->length);
    }
}

WIDE void scale_between(const void *given, int64_t start, int64_t stop) {
    const Work *work = given;
    for (int64_t unit = start; unit < stop; unit++) {
        const Row *row = work->table + work->owner[unit];
        float *restrict g = at(row->gradient, (unit - row->first) * row->length);
        float factor = work->values[unit];
        if (factor == 1.0f) continue;
        for (int64_t i = 0; i < row->length; i++) g[i] *= factor;
    }
}

/* Decay, momentum, step and average of one unit, compiled for each combination of `nesterov` and `average`. */
INLINE void step(
    float *restrict p, const float *restrict g, float *restrict m, float *restrict e, int64_t length, float scale,
    const float *group, float weight, int nesterov, int average) {
    float lr = group[LR], decay = group[DECAY], momentum = group[MOMENTUM];
    int near = weight < 0.5f;
    for (int64_t i = 0; i < length; i++) {
        float gradient = g[i] * scale + decay * p[i];
        float moved = momentum * m[i] + gradient;
        float next = p[i] - lr * (nesterov ? gradient + momentum * moved : moved);
        m[i] = moved;
        p[i] = next;
        if (average) {
            float gap = next - e[i];
            /* the two forms of torch.lerp, each exact at its end of [0, 1] */
            e[i] = near ? e[i] + weight * gap : next - gap * (1.0f - weight);
        }
    }
}

WIDE void update_between(const void *given, int64_t start, int64_t stop) {
    const Work *work = given;
    for (int64_t unit = start; unit < stop; unit++) {
        const Row *row = work->table + work->owner[unit];
        const float *group = work->numbers + 1 + row->group * GROUP_NUMBERS;
        float weight = work->numbers[0], scale = 1.0f;
        int64_t length = row->length, offset = (unit - row->first) * length;
        float *p = at(row->weights, offset), *m = at(row->momentum, offset), *e = at(row->average, offset);
        const float *g = at(row->gradient, offset);
        int nesterov = group[NESTEROV] > 0.0f, over = 0;
        if (group[CLIPPING] > 0.0f) {
            float limit = fmaxf(sqrtf(sum_of_squares(p, length)), work->eps) * group[CLIPPING];
            float norm = sqrtf(work->values[unit]);
            over = norm > limit;
            if (over) scale = limit / fmaxf(norm, FLOOR);
        }
        work->clipped[unit] = (int8_t)over;
        if (nesterov && work->average) step(p, g, m, e, length, scale, group, weight, 1, 1);
        else if (nesterov) step(p, g, m, e, length, scale, group, weight, 1, 0);
        else if (work->average) step(p, g, m, e, length, scale, group, weight, 0, 1);
        else step(p, g, m, e, length, scale, group, weight, 0, 0);
    }
}

/* squares[unit] = sum of g² over the unit */
EXPORT void unit_squares(const Row *table, const int32_t *owner, float *squares, int64_t units, int threads) {
    share(squares_between, &(Work){.table = table, .owner = owner, .values = squares}, units, CHUNK, threads);
}

/* g *= factors[unit] over the unit; units with a factor of 1 are not accessed */
EXPORT void scale_units(const Row *table, const int32_t *owner, float *factors, int64_t units, int threads) {
    share(scale_between, &(Work){.table = table, .owner = owner, .values = factors}, units, CHUNK, threads);
}

/* Clipping, decay, momentum, step and average; clipped[unit] = 1 if the unit was clipped. Gradients are only read. */
EXPORT void update(
    const Row *table, const int32_t *owner, const float *numbers, float *squares, int8_t *clipped, float eps,
    int average, int64_t units, int threads) {
    Work work = {table, owner, numbers, squares, clipped, eps, average};
    share(update_between, &work, units, CHUNK, threads);
}

static void nothing(const void *work, int64_t start, int64_t stop) { (void)work, (void)start, (void)stop; }

/* Number of threads that share work, of `threads`: 1 if PyTorch's OpenMP library was not found. */
EXPORT int native_threads(int threads) {
    Shared shared = {nothing, 0, 0, 1, 0, 0};
    run_in_threads(take_chunks, &shared, threads);
    return (int)shared.threads;
}
