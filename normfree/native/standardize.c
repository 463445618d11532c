/* Weight standardization, filter by filter: the twin in C of `normfree.models.kernels`, which says what `table`, `owner`
 * and `numbers` hold. Called by `normfree.models.standardized`. */

#include "share.h"

enum { CHUNK = 32 }; /* filters at a time: some 100 KB */

typedef struct {
    int64_t weights, gain, kernel, by_weight; /* addresses; `kernel` is the gradient's on the way back */
    int64_t length, first, by_gain, nothing;
} Row;

typedef struct {
    const Row *table;
    const int32_t *owner;
    const float *numbers;
    float floor;
} Work;

INLINE float sum(const float *restrict x, int64_t length) {
    SUM(total, length, x[i])
    return (float)total;
}

/* Sum of (x - mean) * (y - mean of y), for which one of both means is enough. */
INLINE float sum_of_products(const float *restrict x, float mean, const float *restrict y, float shift, int64_t length) {
    SUM(total, length, (x[i] - mean) * (y[i] - shift))
    return (float)total;
}

WIDE void standardize_forward_between(const void *given, int64_t start, int64_t stop) {
    const Work *work = given;
    for (int64_t filter = start; filter < stop; filter++) {
        int32_t which = work->owner[filter];
        const Row *row = work->table + which;
        int64_t index = filter - row->first, length = row->length;
        const float *restrict w = at(row->weights, index * length);
        float *restrict out = at(row->kernel, index * length);
        float mean = sum(w, length) / (float)length;
        float power = sum_of_products(w, mean, w, mean, length) + work->numbers[2 * which + 1];
        float factor = *at(row->gain, index) * work->numbers[2 * which] / sqrtf(fmaxf(power, work->floor));
        for (int64_t i = 0; i < length; i++) out[i] = (w[i] - mean) * factor;
    }
}

WIDE void standardize_backward_between(const void *given, int64_t start, int64_t stop) {
    const Work *work = given;
    for (int64_t filter = start; filter < stop; filter++) {
        int32_t which = work->owner[filter];
        const Row *row = work->table + which;
        int64_t index = filter - row->first, length = row->length;
        const float *restrict w = at(row->weights, index * length), *restrict g = at(row->kernel, index * length);
        float *restrict out = at(row->by_weight, index * length);
        float scale = work->numbers[2 * which], floor = work->floor;
        float mean = sum(w, length) / (float)length, grad_mean = sum(g, length) / (float)length;
        float power = sum_of_products(w, mean, w, mean, length) + work->numbers[2 * which + 1];
        float along = sum_of_products(w, mean, g, 0.0f, length);
        float inverse = 1.0f / sqrtf(fmaxf(power, floor));
        /* Through the power all of it comes back above the floor, half at the floor, nothing below it. */
        float back = along * inverse * inverse * (power > floor ? 1.0f : power == floor ? 0.5f : 0.0f);
        float factor = *at(row->gain, index) * scale * inverse;
        for (int64_t i = 0; i < length; i++) out[i] = factor * (g[i] - grad_mean - (w[i] - mean) * back);
        *at(row->by_gain, index) = along * inverse * scale;
    }
}

/* Writes the standardized kernels. */
void standardize_forward(
    const Row *table, const int32_t *owner, const float *numbers, float floor, int64_t filters, int threads) {
    share(standardize_forward_between, &(Work){table, owner, numbers, floor}, filters, CHUNK, threads);
}

/* Writes the gradients of weights and gains from those of the kernels. */
void standardize_backward(
    const Row *table, const int32_t *owner, const float *numbers, float floor, int64_t filters, int threads) {
    share(standardize_backward_between, &(Work){table, owner, numbers, floor}, filters, CHUNK, threads);
}
