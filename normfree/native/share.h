/* What the kernels of this room have in common. None of them has a state; a call takes addresses and a number of
 * threads. Every sum has its order, and no product is fused with an addition (-ffp-contract=off), but for the matrix
 * products of winograd.c: the same bits on every machine and for every number of threads. */

#include <math.h>
#include <omp.h>
#include <stdint.h>

/* The loader picks the functions for wider registers where the processor has them. NARROW: tests compare both. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(NARROW)
#define WIDE __attribute__((target_clones("avx2", "default")))
#else
#define WIDE
#endif
#define INLINE static inline __attribute__((always_inline))

typedef void Kernel(const void *work, int64_t start, int64_t stop);

/* Does `work` on items 0 to count, `chunk` of them at a time. torch has loaded an OpenMP library of the name that this
 * is linked to before, so that its threads do it: others would fight with those for the cores, as they stay awake. */
static inline void share(Kernel *kernel, const void *work, int64_t count, int64_t chunk, int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t start = 0; start < count; start += chunk)
        kernel(work, start, start + chunk < count ? start + chunk : count);
}

/* Which of the threads that `share` gave work this is. */
INLINE int thread(void) { return omp_get_thread_num(); }

INLINE float *at(int64_t address, int64_t offset) { return (float *)(intptr_t)address + offset; }

/* Partial sums of a row, for registers of any width, and how much of it they sum before they go into a double: however
 * long the row, a sum is as exact as one of a thousand numbers. */
enum { LANES = 16, SPAN = 1 << 14 };

/* total = the sum of `term`, which depends on i, for i from 0 to `length`. */
#define SUM(total, length, term) \
    double total = 0.0; \
    for (int64_t from = 0; from < (length); from += SPAN) { \
        int64_t end = from + SPAN < (length) ? from + SPAN : (length); \
        float lanes[LANES] = {0}; \
        for (int64_t first = from; first + LANES <= end; first += LANES) \
            for (int lane = 0; lane < LANES; lane++) { \
                int64_t i = first + lane; \
                lanes[lane] += (term); \
            } \
        for (int64_t i = end - (end - from) % LANES; i < end; i++) total += (term); \
        for (int lane = 0; lane < LANES; lane++) total += lanes[lane]; \
    }
