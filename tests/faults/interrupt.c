/* Counts the calls that change files below a folder, and lets the nth fail or end the process group.
 *
 * Loaded by LD_PRELOAD into a process and all that it starts. They share one page of memory, the file that
 * EDGE_SD_FAULT_PAGE names, in which the test says what is to happen and reads how many calls there were. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, FAIL_ONCE, FAIL_FROM, KILL };

struct page {
    long calls, nth, mode, error;
    char root[4000];
};

static struct page *page;

__attribute__((constructor)) static void begin(void) {
    const char *name = getenv("EDGE_SD_FAULT_PAGE");
    int fd = name ? open(name, O_RDWR | O_CLOEXEC) : -1;
    if (fd < 0) return;
    void *at = mmap(0, sizeof(struct page), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at != MAP_FAILED) page = at;
}

/* A removal does not fail for want of room, so that it is only counted where processes are killed. */
static int strike(const char *path, int removal) {
    if (!page || !page->root[0] || strncmp(path, page->root, strlen(page->root))) return 0;
    if (removal && page->mode != KILL && page->mode != COUNT) return 0;
    if (removal && page->mode == COUNT && page->error) return 0;
    long n = __sync_add_and_fetch(&page->calls, 1);
    if (page->mode == COUNT || !page->nth || n < page->nth || (page->mode != FAIL_FROM && n > page->nth)) return 0;
    if (page->mode == KILL) {
        kill(0, SIGKILL);
        pause();
    }
    errno = (int)page->error;
    return 1;
}

static int strike_at(int folder, const char *name, int removal) {
    char path[PATH_MAX] = "", link[64];
    if (!page || !name) return 0;
    if (name[0] == '/') return strike(name, removal);
    if (folder == AT_FDCWD) {
        if (!getcwd(path, sizeof path)) return 0;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t length = readlink(link, path, sizeof path - 1);
        if (length < 0) return 0;
        path[length] = 0;
    }
    strncat(path, "/", sizeof path - strlen(path) - 1);
    strncat(path, name, sizeof path - strlen(path) - 1);
    return strike(path, removal);
}

static int strike_fd(int fd) {
    char path[PATH_MAX] = "", link[64];
    if (!page) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    return length > 0 && strike(path, 0);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define CHANGES(flags) ((flags) & (O_WRONLY | O_RDWR | O_CREAT))

#define OPEN(name)                                                                                                     \
    int name(const char *path, int flags, ...) {                                                                       \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        int mode = va_arg(rest, int);                                                                                  \
        va_end(rest);                                                                                                  \
        if (CHANGES(flags) && strike_at(AT_FDCWD, path, 0)) return -1;                                                 \
        return ((int (*)(const char *, int, ...))dlsym(RTLD_NEXT, #name))(path, flags, mode);                          \
    }
#define OPENAT(name)                                                                                                   \
    int name(int folder, const char *path, int flags, ...) {                                                           \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        int mode = va_arg(rest, int);                                                                                  \
        va_end(rest);                                                                                                  \
        if (CHANGES(flags) && strike_at(folder, path, 0)) return -1;                                                   \
        return ((int (*)(int, const char *, int, ...))dlsym(RTLD_NEXT, #name))(folder, path, flags, mode);             \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(name)                                                                                                    \
    FILE *name(const char *path, const char *mode) {                                                                   \
        if (strpbrk(mode, "wa+") && strike_at(AT_FDCWD, path, 0)) return 0;                                            \
        return REAL(name)(path, mode);                                                                                 \
    }
FOPEN(fopen)
FOPEN(fopen64)

ssize_t write(int fd, const void *data, size_t size) { return strike_fd(fd) ? -1 : REAL(write)(fd, data, size); }
ssize_t writev(int fd, const struct iovec *data, int n) { return strike_fd(fd) ? -1 : REAL(writev)(fd, data, n); }
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    return strike_fd(fd) ? -1 : REAL(pwrite)(fd, data, size, at);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    return strike_fd(fd) ? -1 : REAL(pwrite64)(fd, data, size, at);
}
int fsync(int fd) { return strike_fd(fd) ? -1 : REAL(fsync)(fd); }
int fdatasync(int fd) { return strike_fd(fd) ? -1 : REAL(fdatasync)(fd); }
int ftruncate(int fd, off_t size) { return strike_fd(fd) ? -1 : REAL(ftruncate)(fd, size); }
int ftruncate64(int fd, off64_t size) { return strike_fd(fd) ? -1 : REAL(ftruncate64)(fd, size); }

extern ssize_t sendfile(int, int, off_t *, size_t);
extern ssize_t sendfile64(int, int, off64_t *, size_t);
ssize_t sendfile(int out, int in, off_t *at, size_t size) { return strike_fd(out) ? -1 : REAL(sendfile)(out, in, at, size); }
ssize_t sendfile64(int out, int in, off64_t *at, size_t size) {
    return strike_fd(out) ? -1 : REAL(sendfile64)(out, in, at, size);
}
ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t size, unsigned flags) {
    return strike_fd(out) ? -1 : REAL(copy_file_range)(in, from, out, to, size, flags);
}

int rename(const char *old, const char *new) { return strike_at(AT_FDCWD, new, 0) ? -1 : REAL(rename)(old, new); }
int renameat(int a, const char *old, int b, const char *new) {
    return strike_at(b, new, 0) ? -1 : REAL(renameat)(a, old, b, new);
}
int renameat2(int a, const char *old, int b, const char *new, unsigned flags) {
    return strike_at(b, new, 0) ? -1 : REAL(renameat2)(a, old, b, new, flags);
}
int link(const char *old, const char *new) { return strike_at(AT_FDCWD, new, 0) ? -1 : REAL(link)(old, new); }
int linkat(int a, const char *old, int b, const char *new, int flags) {
    return strike_at(b, new, 0) ? -1 : REAL(linkat)(a, old, b, new, flags);
}
int symlink(const char *old, const char *new) { return strike_at(AT_FDCWD, new, 0) ? -1 : REAL(symlink)(old, new); }
int mkdir(const char *path, mode_t mode) { return strike_at(AT_FDCWD, path, 0) ? -1 : REAL(mkdir)(path, mode); }
int mkdirat(int folder, const char *path, mode_t mode) {
    return strike_at(folder, path, 0) ? -1 : REAL(mkdirat)(folder, path, mode);
}
int unlink(const char *path) { return strike_at(AT_FDCWD, path, 1) ? -1 : REAL(unlink)(path); }
int unlinkat(int folder, const char *path, int flags) {
    return strike_at(folder, path, 1) ? -1 : REAL(unlinkat)(folder, path, flags);
}
int rmdir(const char *path) { return strike_at(AT_FDCWD, path, 1) ? -1 : REAL(rmdir)(path); }
