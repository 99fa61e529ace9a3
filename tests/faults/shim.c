/* Hurts what processes do to files below one folder. Loaded by LD_PRELOAD; what to do is in the environment:
   FAULT_ROOT the folder, FAULT_PAGE a file of counters that all processes share, FAULT_JOURNAL where events are noted,
   FAULT "OP N ACTION ARGUMENT": at the N-th event of a kind (write sync rename other any), and with a trailing '+' at all
   after it, do ACTION. A forked process is told by fault_arm(). */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { WRITE, SYNC, RENAME, OTHER, ANY };
enum { HALF = -1, TORN = -2 };
static const char *OPS[] = {"write", "sync", "rename", "other", "any"};
static struct page { atomic_long seen[ANY + 1], fired; } *page;
static char root[PATH_MAX], journal[PATH_MAX], action[16], argument[PATH_MAX], last;
static long at;
static int op;

__attribute__((constructor)) void fault_arm(void) {
    const char *plan = getenv("FAULT"), *folder = getenv("FAULT_ROOT"), *shared = getenv("FAULT_PAGE"), *notes = getenv("FAULT_JOURNAL");
    char kind[16], stay = 0;
    page = NULL;
    if (!plan || !folder || !shared || sscanf(plan, "%15s %ld%c %15s %4095s", kind, &at, &stay, action, argument) < 4) return;
    last = stay == '+';
    for (op = 0; op < ANY && strcmp(kind, OPS[op]); op++);
    snprintf(root, sizeof root, "%s/", folder);
    snprintf(journal, sizeof journal, "%s", notes ? notes : "");
    int fd = syscall(SYS_openat, AT_FDCWD, shared, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0 || ftruncate(fd, sizeof *page)) return;
    page = mmap(NULL, sizeof *page, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    syscall(SYS_close, fd);
    if (page == MAP_FAILED) page = NULL;
}

static void end(void) { syscall(SYS_kill, syscall(SYS_getpid), SIGKILL); }

static void whole(int folder, const char *path, char *out) {  /* the path from / on */
    char before[PATH_MAX / 2] = "", link[64];
    if (path[0] != '/') {
        snprintf(link, sizeof link, folder == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", folder);
        ssize_t n = readlink(link, before, sizeof before - 2);
        if (n > 0) before[n] = '/';
    }
    snprintf(out, PATH_MAX, "%s%s", before, path);
}

/* 0: go on; HALF, TORN: with half of the bytes, then dead; else the errno that it fails with */
static int decide(int what, const char *path, const char *to) {
    if (!page || strncmp(path, root, strlen(root))) return 0;
    if (journal[0]) {
        char line[2 * PATH_MAX + 16];
        int n = snprintf(line, sizeof line, "%s\t%s\t%s\n", OPS[what], path, to), fd = syscall(SYS_openat, AT_FDCWD, journal, O_WRONLY | O_CREAT | O_APPEND, 0600);
        syscall(SYS_write, fd, line, n);
        syscall(SYS_close, fd);
    }
    long one = atomic_fetch_add(&page->seen[what], 1) + 1, all = atomic_fetch_add(&page->seen[ANY], 1) + 1;
    long n = op == ANY ? all : op == what ? one : 0;
    if (n < at || (n > at && !last)) return 0;
    int first = !atomic_fetch_add(&page->fired, 1);
    if (!strcmp(action, "kill")) end();
    if (!strcmp(action, "torn")) return TORN;
    if (!strcmp(action, "short")) return HALF;
    if (!strcmp(action, "errno")) return atoi(argument);
    if (!strcmp(action, "away") && first) {
        char gone[PATH_MAX + 8];
        snprintf(gone, sizeof gone, "%s.away", argument);
        syscall(SYS_renameat2, AT_FDCWD, argument, AT_FDCWD, gone, 0);
    }
    return 0;
}

static int opened(int fd, int what) {
    char link[64], path[PATH_MAX];
    int saved = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = page ? readlink(link, path, sizeof path - 1) : -1;
    errno = saved;
    if (n < 0) return 0;
    path[n] = 0;
    return decide(what, path, "");
}

static int named(int what, int folder, const char *path, int other, const char *to) {
    char from[PATH_MAX], into[PATH_MAX] = "";
    if (!page) return 0;
    whole(folder, path, from);
    if (to) whole(other, to, into);
    return decide(what, from, into);
}

#define FAIL(code) do { errno = (code); return -1; } while (0)
#define WRITES(call, half) do { int how = opened(fd, WRITE); if (how > 0) FAIL(how); if (how == 0) return call; \
    ssize_t done = half; if (how == TORN) end(); return done; } while (0)
#define HALVED(n) ((n) > 1 ? (n) / 2 : (n))

ssize_t write(int fd, const void *b, size_t n) { WRITES(syscall(SYS_write, fd, b, n), syscall(SYS_write, fd, b, HALVED(n))); }
ssize_t pwrite(int fd, const void *b, size_t n, off_t o) { WRITES(syscall(SYS_pwrite64, fd, b, n, o), syscall(SYS_pwrite64, fd, b, HALVED(n), o)); }
ssize_t pwrite64(int fd, const void *b, size_t n, off_t o) { return pwrite(fd, b, n, o); }
ssize_t writev(int fd, const struct iovec *v, int n) { WRITES(syscall(SYS_writev, fd, v, n), syscall(SYS_writev, fd, v, HALVED(n))); }
ssize_t pwritev(int fd, const struct iovec *v, int n, off_t o) { WRITES(syscall(SYS_pwritev, fd, v, n, o, 0), syscall(SYS_pwritev, fd, v, HALVED(n), o, 0)); }
ssize_t pwritev64(int fd, const struct iovec *v, int n, off_t o) { return pwritev(fd, v, n, o); }
size_t fwrite(const void *b, size_t size, size_t n, FILE *f) {
    size_t (*real)(const void *, size_t, size_t, FILE *) = dlsym(RTLD_NEXT, "fwrite");
    int how = opened(fileno(f), WRITE);
    if (how > 0) { errno = how; return 0; }
    size_t done = real(b, size, how == TORN ? HALVED(n) : n, f);
    if (how == TORN) { fflush(f); end(); }
    return done;
}
int fsync(int fd) { int how = opened(fd, SYNC); if (how > 0) FAIL(how); return syscall(SYS_fsync, fd); }
int fdatasync(int fd) { int how = opened(fd, SYNC); if (how > 0) FAIL(how); return syscall(SYS_fdatasync, fd); }
int renameat2(int d, const char *a, int e, const char *b, unsigned f) {
    int how = named(RENAME, d, a, e, b);
    if (how > 0) FAIL(how);
    return syscall(SYS_renameat2, d, a, e, b, f);
}
int renameat(int d, const char *a, int e, const char *b) { return renameat2(d, a, e, b, 0); }
int rename(const char *a, const char *b) { return renameat2(AT_FDCWD, a, AT_FDCWD, b, 0); }
int mkdirat(int d, const char *a, mode_t m) { int how = named(OTHER, d, a, 0, NULL); if (how > 0) FAIL(how); return syscall(SYS_mkdirat, d, a, m); }
int mkdir(const char *a, mode_t m) { return mkdirat(AT_FDCWD, a, m); }
int unlinkat(int d, const char *a, int f) { int how = named(OTHER, d, a, 0, NULL); if (how > 0) FAIL(how); return syscall(SYS_unlinkat, d, a, f); }
int unlink(const char *a) { return unlinkat(AT_FDCWD, a, 0); }
int rmdir(const char *a) { return unlinkat(AT_FDCWD, a, AT_REMOVEDIR); }

static int opens(int d, const char *a, int flags, mode_t mode) {
    int how = flags & (O_CREAT | O_WRONLY | O_RDWR | O_TRUNC) ? named(OTHER, d, a, 0, NULL) : 0;
    if (how > 0) FAIL(how);
    return syscall(SYS_openat, d, a, flags, mode);
}
#define MODE(flags) mode_t mode = 0; if ((flags) & (O_CREAT | O_TMPFILE)) { va_list l; va_start(l, flags); mode = va_arg(l, int); va_end(l); }
int open(const char *a, int flags, ...) { MODE(flags) return opens(AT_FDCWD, a, flags, mode); }
int open64(const char *a, int flags, ...) { MODE(flags) return opens(AT_FDCWD, a, flags, mode); }
int openat(int d, const char *a, int flags, ...) { MODE(flags) return opens(d, a, flags, mode); }
int openat64(int d, const char *a, int flags, ...) { MODE(flags) return opens(d, a, flags, mode); }

static time_t ahead(void) { return page && !strcmp(action, "clock") && page->fired ? atol(argument) : 0; }
int clock_gettime(clockid_t id, struct timespec *t) {
    int bad = syscall(SYS_clock_gettime, id, t);
    if (!bad && id == CLOCK_REALTIME) t->tv_sec += ahead();
    return bad;
}
time_t time(time_t *out) { struct timespec t; clock_gettime(CLOCK_REALTIME, &t); if (out) *out = t.tv_sec; return t.tv_sec; }
