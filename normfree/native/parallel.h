/* What differs between compilers and systems: inlining, atomic counters, and the threads of PyTorch. */

#define _GNU_SOURCE /* for RTLD_DEFAULT */
#include <stdint.h>

#if defined(_MSC_VER) && !defined(__clang__)
#include <intrin.h>
#define INLINE static __forceinline
#define THREAD_LOCAL __declspec(thread)
#define PREFETCH(address)
typedef volatile __int64 Counter;
INLINE int64_t fetch_add(Counter *counter, int64_t more) { return _InterlockedExchangeAdd64(counter, more); }
#else
#define INLINE static inline __attribute__((always_inline))
#define THREAD_LOCAL _Thread_local
#define PREFETCH(address) __builtin_prefetch(address)
typedef int64_t Counter;
INLINE int64_t fetch_add(Counter *counter, int64_t more) { return __atomic_fetch_add(counter, more, __ATOMIC_RELAXED); }
#endif

/* Run `task` on `data` in so many threads at once, or fewer, and wait for all of them.
 *
 * They are the threads of the OpenMP library that PyTorch has loaded. A second pool would compete with them for the
 * cores, because idle OpenMP threads keep spinning. So this file is not linked to an OpenMP library: it looks for the
 * one in the process, whatever its file is called, and runs the task in one thread if there is none. */
typedef void Task(void *data);

#if defined(_WIN32)
/* From windows.h, which would define far, near and more as macros. */
__declspec(dllimport) void *__stdcall GetModuleHandleA(const char *name);
__declspec(dllimport) void *__stdcall GetProcAddress(void *module, const char *name);

/* The OpenMP of LLVM and Intel, declared as in LLVM's kmp.h. */
typedef struct {
    int32_t reserved_1, flags, reserved_2, reserved_3;
    const char *source;
} Origin;
typedef int32_t NumberOfThread(Origin *);
typedef void Request(Origin *, int32_t thread, int32_t threads);
typedef void Body(int32_t *global, int32_t *local, Task *, void *data);
typedef void Fork(Origin *, int32_t count, Body *, Task *, void *data);

static void run_task(int32_t *global, int32_t *local, Task *task, void *data) {
    (void)global, (void)local;
    task(data);
}

static inline void run_in_threads(Task *task, void *data, int threads) {
    static Origin origin = {0, 2, 0, 0, ";unknown;unknown;0;0;;"}; /* 2: KMP_IDENT_KMPC */
    void *openmp = threads > 1 ? GetModuleHandleA("libiomp5md.dll") : 0;
    if (!openmp) {
        task(data);
        return;
    }
    NumberOfThread *number;
    Request *request;
    Fork *fork;
    *(void **)&number = GetProcAddress(openmp, "__kmpc_global_thread_num");
    *(void **)&request = GetProcAddress(openmp, "__kmpc_push_num_threads");
    *(void **)&fork = GetProcAddress(openmp, "__kmpc_fork_call");
    request(&origin, number(&origin), threads);
    fork(&origin, 2, run_task, task, data);
}
#else
#include <dlfcn.h>

/* GNU's OpenMP, whose interface LLVM's and Intel's offer as well: omp parallel num_threads(threads). */
typedef void Parallel(Task *, void *data, unsigned threads, unsigned flags);

static inline void run_in_threads(Task *task, void *data, int threads) {
    Parallel *parallel = 0;
    if (threads > 1) *(void **)&parallel = dlsym(RTLD_DEFAULT, "GOMP_parallel"); /* POSIX casts it like this */
    if (parallel) parallel(task, data, (unsigned)threads, 0);
    else task(data);
}
#endif
