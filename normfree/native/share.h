/* Shared by all kernels. Kernels are stateless; a call takes addresses and a number of threads. Every sum has a fixed
 * order, and no product is fused with an addition (-ffp-contract=off), except in the matrix products of winograd.c, so
 * results have the same bits on every machine and for every number of threads. */

#include <math.h>
#include <omp.h>
#include <stdint.h>

/* The loader picks the variants for wider registers if the processor has them. Tests define NARROW to compare both. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(NARROW)
#define WIDE __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define WIDE
#endif
#define INLINE static inline __attribute__((always_inline))

typedef void Kernel(const void *work, int64_t start, int64_t stop);

/* Run `kernel` on items 0 to `count`, `chunk` at a time. PyTorch has already loaded an OpenMP library of the name that
 * this file is linked to, so its threads are used. A second pool of threads would compete with them for the cores,
 * because idle OpenMP threads keep spinning. */
static inline void share(Kernel *kernel, const void *work, int64_t count, int64_t chunk, int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t start = 0; start < count; start += chunk)
        kernel(work, start, start + chunk < count ? start + chunk : count);
}

/* Index of the current thread among those that `share` uses. */
INLINE int thread(void) { return omp_get_thread_num(); }

INLINE float *at(int64_t address, int64_t offset) { return (float *)(intptr_t)address + offset; }

/* LANES partial sums in float, for registers of any width, are added to a double after every SPAN numbers: a sum of any
 * length is then as accurate as one of about a thousand numbers. */
enum { LANES = 16, SPAN = 1 << 14 };

/* Declare `total`, the sum of `term`, which depends on i, for i from 0 to `length`. */
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
