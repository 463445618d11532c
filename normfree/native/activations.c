/* Activations x g(x) and their gradients: GELU in its tanh form, and SiLU. Called by `normfree.ops.gelu`.
 *
 * One pass over memory, without branches, so that the compiler vectorizes it. Both gates g are the logistic function,
 * computed from exp of a number that is at most 0, so the relative error is small in both tails. */

#include "share.h"

#include <string.h>

enum { CHUNK = 1 << 14 }; /* elements at a time */

typedef struct {
    const float *x, *up;
    float *out;
} Work;

/* g(x) and the derivative of x g(x). */
typedef struct {
    float value, slope;
} Pair;

/* exp(x) for x <= 0; 0 where the result would be subnormal. It is 2^k exp(r), |r| <= ln 2 / 2, with the minimax
 * polynomial 1 + r + r² q(r), q of degree 4, whose relative error is at most 3e-9. */
INLINE float exp_of(float x) {
    const float round = 12582912.0f; /* 1.5 * 2^23: adding it leaves a whole number in the low bits */
    float near = x < -87.0f ? -87.0f : x;
    float shifted = near * 1.44269504f + round, k = shifted - round;
    float r = (near - k * 0.693359375f) + k * 2.12194440e-4f; /* ln 2 in two parts, the first with few bits */
    float q = 0.00138145986f;
    q = q * r + 0.00836871688f;
    q = q * r + 0.041668388f;
    q = q * r + 0.166665206f;
    q = q * r + 0.499999934f;
    float value = q * r * r + r + 1.0f;
    int32_t exponent, bits;
    memcpy(&exponent, &shifted, 4);
    memcpy(&bits, &value, 4);
    bits += (int32_t)((uint32_t)exponent << 23);
    memcpy(&value, &bits, 4);
    return x < -87.0f ? 0.0f : value;
}

/* Value of the logistic function 1 / (1 + exp(-u)), and slope of x times it, where `by_x` is du/dx. */
INLINE Pair logistic(float x, float u, float by_x) {
    float e = exp_of(-fabsf(u)), s = 1.0f / (1.0f + e), value = u < 0.0f ? e * s : s;
    return (Pair){value, value + x * e * s * s * by_x};
}

INLINE Pair silu(float x) { return logistic(x, x, 1.0f); }

/* (1 + tanh(u / 2)) / 2 is the logistic function of u = 2 √(2/π) (x + 0.044715 x³). */
INLINE Pair gelu(float x) {
    const float twice = 1.5957691216f, cubic = 0.044715f;
    float square = x * x;
    return logistic(x, twice * (x + cubic * x * square), twice * (1.0f + 3.0f * cubic * square));
}

#define ACTIVATION(name) \
    WIDE void name##_forward_between(const void *given, int64_t start, int64_t stop) { \
        const float *restrict x = ((const Work *)given)->x; \
        float *restrict out = ((const Work *)given)->out; \
        for (int64_t i = start; i < stop; i++) out[i] = x[i] * name(x[i]).value; \
    } \
    WIDE void name##_backward_between(const void *given, int64_t start, int64_t stop) { \
        const float *restrict x = ((const Work *)given)->x, *restrict up = ((const Work *)given)->up; \
        float *restrict out = ((const Work *)given)->out; \
        for (int64_t i = start; i < stop; i++) out[i] = up[i] * name(x[i]).slope; \
    } \
    /* out = x g(x). */ \
    EXPORT void name##_forward(const float *x, float *out, int64_t elements, int threads) { \
        share(name##_forward_between, &(Work){x, 0, out}, elements, CHUNK, threads); \
    } \
    /* out = up (x g(x))'. */ \
    EXPORT void name##_backward(const float *x, const float *up, float *out, int64_t elements, int threads) { \
        share(name##_backward_between, &(Work){x, up, out}, elements, CHUNK, threads); \
    }

ACTIVATION(gelu)
ACTIVATION(silu)
