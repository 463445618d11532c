// Count the calls that change files in one folder; let the n-th one fail, and those after it, or kill the process at it.
// Loaded with LD_PRELOAD, so that it also sees the writes of libraries in other languages. Used by faults.py.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/sendfile.h>
#include <unistd.h>

enum { KILL = -1, VANISH = -2 };  // in place of an error number
enum { ONCE = 1, ALWAYS = 2 };

static char folder[4096];
static long target = -1;         // index of the call with the fault
static int fault, lasting;       // an error number, KILL or VANISH; ONCE or ALWAYS
static int only_opens;           // after the target, only open() fails: there are no more file descriptors
static _Atomic long *calls = NULL;  // in a file that is mapped, so that a killed process leaves it behind

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

void fault_arm(const char *path, const char *counter, long at, int what, int how, int opens) {
    snprintf(folder, sizeof folder, "%s", path);
    target = at, fault = what, lasting = how, only_opens = opens;
    int fd = REAL(open)(counter, O_RDWR);
    calls = mmap(NULL, sizeof(long), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
}

static int inside(int directory, const char *path) {
    char full[8192];
    if (calls == NULL || path == NULL) return 0;
    if (path[0] != '/') {
        char link[64];
        snprintf(link, sizeof link, directory == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", directory);
        ssize_t n = readlink(link, full, sizeof full / 2);
        if (n < 0) return 0;
        snprintf(full + n, sizeof full - n, "/%s", path);
    } else snprintf(full, sizeof full, "%s", path);
    size_t n = strlen(folder);
    return strncmp(full, folder, n) == 0 && (full[n] == '/' || full[n] == 0);
}

static int inside_fd(int fd) {
    char link[64], full[8192];
    if (calls == NULL) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, full, sizeof full - 1);
    if (n < 0) return 0;
    full[n] = 0;
    return inside(AT_FDCWD, full);
}

// Return 1 if this call must fail; does not return if it must kill. `counted`: it changes files.
static int faulty(int counted, int opens) {
    long index = counted ? atomic_fetch_add(calls, 1) : atomic_load(calls) - 1;
    if (target < 0 || index < target || (lasting == ONCE && (index > target || !counted))) return 0;
    if (fault == VANISH) {
        static _Atomic int gone = 0;
        char other[4200];
        snprintf(other, sizeof other, "%s.gone", folder);
        if (!atomic_exchange(&gone, 1)) REAL(rename)(folder, other);
        return 0;
    }
    if (fault == KILL) kill(getpid(), SIGKILL);
    if (only_opens ? !opens : !counted) return 0;
    errno = fault;
    return 1;
}

#define PATH_CALL(type, name, directory, path, parameters, arguments)          \
    type name parameters {                                                      \
        if (inside(directory, path) && faulty(1, 0)) return -1;                 \
        return REAL(name) arguments;                                            \
    }
#define FD_CALL(type, name, fd, parameters, arguments)                          \
    type name parameters {                                                      \
        if (inside_fd(fd) && faulty(1, 0)) return -1;                           \
        return REAL(name) arguments;                                            \
    }

PATH_CALL(int, mkdir, AT_FDCWD, path, (const char *path, mode_t mode), (path, mode))
PATH_CALL(int, mkdirat, fd, path, (int fd, const char *path, mode_t mode), (fd, path, mode))
PATH_CALL(int, rmdir, AT_FDCWD, path, (const char *path), (path))
PATH_CALL(int, unlink, AT_FDCWD, path, (const char *path), (path))
PATH_CALL(int, unlinkat, fd, path, (int fd, const char *path, int flags), (fd, path, flags))
PATH_CALL(int, rename, AT_FDCWD, to, (const char *from, const char *to), (from, to))
PATH_CALL(int, renameat, fd, to, (int from_fd, const char *from, int fd, const char *to), (from_fd, from, fd, to))
FD_CALL(int, fsync, fd, (int fd), (fd))
FD_CALL(int, fdatasync, fd, (int fd), (fd))
FD_CALL(int, ftruncate, fd, (int fd, off_t length), (fd, length))
FD_CALL(int, ftruncate64, fd, (int fd, off64_t length), (fd, length))
FD_CALL(ssize_t, sendfile, fd, (int fd, int in, off_t *offset, size_t count), (fd, in, offset, count))

// A write that fails, or at which the process is killed, has written half of its bytes.
ssize_t write(int fd, const void *data, size_t size) {
    if (inside_fd(fd)) {
        long next = atomic_load(calls);
        if (target >= 0 && next >= target && !only_opens && fault != VANISH && (lasting == ALWAYS || next == target))
            REAL(write)(fd, data, size / 2);
        if (faulty(1, 0)) return -1;
    }
    return REAL(write)(fd, data, size);
}

#define OPENS(name, directory, parameters, ...)                                 \
    int name parameters {                                                       \
        mode_t mode = 0;                                                        \
        if (flags & (O_CREAT | O_TMPFILE)) {                                    \
            va_list list;                                                       \
            va_start(list, flags);                                              \
            mode = va_arg(list, mode_t);                                        \
            va_end(list);                                                       \
        }                                                                       \
        int changes = (flags & (O_WRONLY | O_RDWR | O_CREAT)) != 0;             \
        if (inside(directory, path) && faulty(changes, 1)) return -1;           \
        return REAL(name)(__VA_ARGS__, flags, mode);                            \
    }

OPENS(open, AT_FDCWD, (const char *path, int flags, ...), path)
OPENS(open64, AT_FDCWD, (const char *path, int flags, ...), path)
OPENS(openat, fd, (int fd, const char *path, int flags, ...), fd, path)
OPENS(openat64, fd, (int fd, const char *path, int flags, ...), fd, path)
