/* Shared by all kernels. Kernels are stateless; a call takes addresses and a number of threads. Every sum has a fixed
 * order, and no product is fused with an addition (-ffp-contract=off), except in the matrix products of winograd.c, so
 * results have the same bits on every machine and for every number of threads. */

#include "parallel.h"

#include <math.h>
#include <stdint.h>

/* The loader picks the variants for wider registers if the processor has them. Tests define NARROW to compare both. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(NARROW)
#define WIDE __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define WIDE
#endif

/* What Python calls. */
#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT
#endif

typedef void Kernel(const void *work, int64_t start, int64_t stop);

typedef struct {
    Kernel *kernel;
    const void *work;
    int64_t count, chunk;
    Counter next, threads; /* first item that no thread has taken; threads that have begun */
} Shared;

static THREAD_LOCAL int own_thread = 0;

/* Index of the current thread among those that `share` uses. */
INLINE int thread(void) { return own_thread; }

/* Process chunks until none is left. Each of the threads runs this. */
static void take_chunks(void *given) {
    Shared *k = given;
    own_thread = (int)fetch_add(&k->threads, 1);
    for (int64_t start; (start = fetch_add(&k->next, k->chunk)) < k->count;)
        k->kernel(k->work, start, start + k->chunk < k->count ? start + k->chunk : k->count);
    own_thread = 0;
}

/* Run `kernel` on items 0 to `count`, `chunk` at a time, by at most so many threads. */
static inline void share(Kernel *kernel, const void *work, int64_t count, int64_t chunk, int threads) {
    Shared shared = {kernel, work, count, chunk, 0, 0};
    run_in_threads(take_chunks, &shared, threads);
}

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
