/* Weight standardization, one filter at a time. `normfree.ops.standardize` calls it. `normfree.native.table` describes
 * `table` and `owner`; `numbers` are scale and the constant added to v·N of each weight, `floor` the lower bound of v·N.
 */

#include "share.h"

enum { CHUNK = 32 }; /* filters at a time: about 100 KB */

typedef struct {
    int64_t weights, gain, result, by_weight; /* addresses; backward, `result` is that of the result's gradient */
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

/* Sum of (x - mean) * (y - shift). If `mean` is the mean of x, the result does not depend on `shift`. */
INLINE float sum_of_products(const float *restrict x, float mean, const float *restrict y, float shift, int64_t length) {
    SUM(total, length, (x[i] - mean) * (y[i] - shift))
    return (float)total;
}

/* One filter of the table: its position, and what forward and backward need. */
typedef struct {
    const Row *row;
    const float *w;
    int64_t index, offset;
    float gain, scale, mean, power;
} Filter;

INLINE Filter find(const Work *work, int64_t number) {
    int32_t which = work->owner[number];
    const Row *row = work->table + which;
    int64_t index = number - row->first, length = row->length;
    const float *w = at(row->weights, index * length);
    float mean = sum(w, length) / (float)length;
    float power = sum_of_products(w, mean, w, mean, length) + work->numbers[2 * which + 1];
    return (Filter){row, w, index, index * length, *at(row->gain, index), work->numbers[2 * which], mean, power};
}

WIDE void standardize_forward_between(const void *given, int64_t start, int64_t stop) {
    const Work *work = given;
    for (int64_t number = start; number < stop; number++) {
        Filter f = find(work, number);
        const float *restrict w = f.w;
        float *restrict out = at(f.row->result, f.offset);
        float factor = f.gain * f.scale / sqrtf(fmaxf(f.power, work->floor));
        for (int64_t i = 0; i < f.row->length; i++) out[i] = (w[i] - f.mean) * factor;
    }
}

WIDE void standardize_backward_between(const void *given, int64_t start, int64_t stop) {
    const Work *work = given;
    for (int64_t number = start; number < stop; number++) {
        Filter f = find(work, number);
        int64_t length = f.row->length;
        const float *restrict w = f.w, *restrict g = at(f.row->result, f.offset);
        float *restrict out = at(f.row->by_weight, f.offset);
        float grad_mean = sum(g, length) / (float)length;
        float along = sum_of_products(w, f.mean, g, 0.0f, length);
        float inverse = 1.0f / sqrtf(fmaxf(f.power, work->floor));
        /* the gradient through the power: all of it above the lower bound, half at equality, none below */
        float part = f.power > work->floor ? 1.0f : f.power == work->floor ? 0.5f : 0.0f;
        float back = along * inverse * inverse * part, factor = f.gain * f.scale * inverse;
        for (int64_t i = 0; i < length; i++) out[i] = factor * (g[i] - grad_mean - (w[i] - f.mean) * back);
        *at(f.row->by_gain, f.index) = along * inverse * f.scale;
    }
}

/* Write the standardized weights. */
EXPORT void standardize_forward(
    const Row *table, const int32_t *owner, const float *numbers, float floor, int64_t filters, int threads) {
    share(standardize_forward_between, &(Work){table, owner, numbers, floor}, filters, CHUNK, threads);
}

/* Write the gradients of weights and gains from those of the standardized weights. */
EXPORT void standardize_backward(
    const Row *table, const int32_t *owner, const float *numbers, float floor, int64_t filters, int threads) {
    share(standardize_backward_between, &(Work){table, owner, numbers, floor}, filters, CHUNK, threads);
}
