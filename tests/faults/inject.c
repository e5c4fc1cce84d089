/* Makes a file operation fail, or behave in a rare but legal way, below Python. Preloaded into a
 * process and its children (LD_PRELOAD); Linux with glibc. Controlled by environment variables:
 *
 *   FAULT_ROOTS   class=/folder:class=/folder…  files outside these folders are not affected
 *   FAULT_LOG     append a line for each operation: operation, class, site, path
 *   FAULT_SITE    "operation class site" of the operation that fails
 *   FAULT_AT      number of the occurrence that fails, starting at 1
 *   FAULT_COUNT   file of 8 bytes that counts occurrences in all threads and processes
 *   FAULT_ERRNO   errno of the failure
 *   FAULT_MODE    once, always (from FAULT_AT on), short (each write writes only half),
 *                 eintr (every second read, write or open is interrupted by a signal),
 *                 nodirsync (fsync of a folder gives EINVAL),
 *                 kill (the process is killed at operation FAULT_AT, counted over all sites:
 *                 before it, or after half of a write; FAULT_LOG then has only this operation)
 *
 * A site is the innermost Python frames of mlxgpt, file:line, at most DEPTH of them.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define DEPTH 4
#define ROOTS 12

static char roots[4096];
static struct { const char *class, *folder; size_t length; } root[ROOTS];
static int root_count, log_fd = -1, fault_errno;
static char wanted[1024];
static long fault_at;
static atomic_long *counter;
static enum { ONCE, ALWAYS, SHORT, EINTR_MODE, NODIRSYNC, KILL } mode;
static __thread int inside; /* nonzero during our own calls, which are not counted */
static __thread unsigned turn;
static __thread int dying; /* kill the process in the middle of the next write */

/* Python's stable ABI, if the process runs Python. */
static int (*initialized)(void);
static int (*ensure)(void);
static void (*release)(int);
static void *(*this_thread)(void);
static void *(*get_frame)(void);
static void *(*get_back)(void *);
static void *(*get_code)(void *);
static int (*get_line)(void *);
static void *(*get_attribute)(void *, const char *);
static const char *(*as_utf8)(void *);
static void (*decrease)(void *);
static int (*finalizing)(void);

void fault_begin(void) {
    inside++;
    const char *text = getenv("FAULT_ROOTS");
    root_count = 0;
    if (text) {
        strncpy(roots, text, sizeof roots - 1);
        for (char *rest = roots, *part; (part = strtok_r(rest, ":", &rest)) && root_count < ROOTS;) {
            char *folder = strchr(part, '=');
            if (!folder) continue;
            *folder++ = 0;
            root[root_count].class = part;
            root[root_count].folder = folder;
            root[root_count++].length = strlen(folder);
        }
    }
    if ((text = getenv("FAULT_LOG")))
        log_fd = syscall(SYS_openat, AT_FDCWD, text, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    wanted[0] = 0;
    if ((text = getenv("FAULT_SITE"))) strncpy(wanted, text, sizeof wanted - 1);
    if ((text = getenv("FAULT_AT"))) fault_at = atol(text);
    if ((text = getenv("FAULT_ERRNO"))) fault_errno = atoi(text);
    mode = ONCE;
    if ((text = getenv("FAULT_MODE"))) {
        if (!strcmp(text, "always")) mode = ALWAYS;
        if (!strcmp(text, "short")) mode = SHORT;
        if (!strcmp(text, "eintr")) mode = EINTR_MODE;
        if (!strcmp(text, "nodirsync")) mode = NODIRSYNC;
        if (!strcmp(text, "kill")) mode = KILL;
    }
    if ((text = getenv("FAULT_COUNT"))) {
        int fd = syscall(SYS_openat, AT_FDCWD, text, O_RDWR | O_CLOEXEC, 0);
        if (fd >= 0) {
            counter = mmap(NULL, sizeof *counter, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
            syscall(SYS_close, fd);
        }
    }
    initialized = dlsym(RTLD_DEFAULT, "Py_IsInitialized");
    finalizing = dlsym(RTLD_DEFAULT, "Py_IsFinalizing");
    if (!finalizing) finalizing = dlsym(RTLD_DEFAULT, "_Py_IsFinalizing");
    ensure = dlsym(RTLD_DEFAULT, "PyGILState_Ensure");
    release = dlsym(RTLD_DEFAULT, "PyGILState_Release");
    this_thread = dlsym(RTLD_DEFAULT, "PyGILState_GetThisThreadState");
    get_frame = dlsym(RTLD_DEFAULT, "PyEval_GetFrame");
    get_back = dlsym(RTLD_DEFAULT, "PyFrame_GetBack");
    get_code = dlsym(RTLD_DEFAULT, "PyFrame_GetCode");
    get_line = dlsym(RTLD_DEFAULT, "PyFrame_GetLineNumber");
    get_attribute = dlsym(RTLD_DEFAULT, "PyObject_GetAttrString");
    as_utf8 = dlsym(RTLD_DEFAULT, "PyUnicode_AsUTF8");
    decrease = dlsym(RTLD_DEFAULT, "Py_DecRef");
    inside--;
}

__attribute__((constructor)) static void at_start(void) {
    if (getenv("FAULT_ROOTS")) fault_begin();
}

static const char *class_of(const char *path) {
    for (int i = 0; i < root_count; i++)
        if (!strncmp(path, root[i].folder, root[i].length) &&
            (path[root[i].length] == '/' || !path[root[i].length]))
            return root[i].class;
    return NULL;
}

/* The absolute path of (folder, name), or of a descriptor without a name. */
static int path_at(int folder, const char *name, char *path, size_t size) {
    ssize_t length = 0;
    if (name && name[0] == '/') {
        snprintf(path, size, "%s", name);
        return 1;
    }
    char link[64] = "/proc/self/cwd";
    if (folder != AT_FDCWD) snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    length = syscall(SYS_readlinkat, AT_FDCWD, link, path, size - 1);
    if (length <= 0 || path[0] != '/') return 0;
    path[length] = 0;
    if (name && name[0]) snprintf(path + length, size - length, "/%s", name);
    return 1;
}

static void site_of(char *site, size_t size) {
    snprintf(site, size, "native");
    if (!initialized || !initialized() || (finalizing && finalizing()) || !this_thread()) return;
    int state = ensure();
    void *frame = get_frame();
    size_t length = 0;
    int depth = 0, borrowed = 1;
    while (frame && depth < DEPTH) {
        void *code = get_code(frame), *name = get_attribute(code, "co_filename");
        const char *file = name ? as_utf8(name) : NULL;
        const char *ours = file ? strstr(file, "/mlxgpt/") : NULL;
        for (const char *next; ours && (next = strstr(ours + 1, "/mlxgpt/"));) ours = next;
        if (ours && length < size - 1) {
            length += snprintf(site + length, size - length, "%s%s:%d", depth ? "<" : "", ours + 8,
                               get_line(frame));
            depth++;
        }
        if (name) decrease(name);
        decrease(code);
        void *back = get_back(frame);
        if (!borrowed) decrease(frame);
        frame = back;
        borrowed = 0;
    }
    if (frame && !borrowed) decrease(frame);
    release(state);
}

/* Whether this operation should fail now; sets errno in that case. */
static int fails(const char *operation, int folder, const char *name) {
    if (!root_count || inside) return 0;
    int saved = errno, result = 0;
    inside++;
    char path[4200], site[512], line[6000];
    const char *class = NULL;
    if (path_at(folder, name, path, sizeof path) && (class = class_of(path))) {
        if (mode == NODIRSYNC) {
            struct stat s;
            if (!strcmp(operation, "fsync") && !syscall(SYS_fstat, folder, &s) && S_ISDIR(s.st_mode))
                result = EINVAL;
        } else if (mode == EINTR_MODE) {
            int able = strstr("open read write pread pwrite readv writev", operation) != NULL;
            if (able && strcmp(class, "log") && ++turn % 2) result = EINTR;
        } else if (mode == KILL) {
            if (counter && atomic_fetch_add(counter, 1) + 1 == fault_at) {
                int length = snprintf(line, sizeof line, "%s %s - %s\n", operation, class, path);
                if (log_fd >= 0) syscall(SYS_write, log_fd, line, length);
                dying = !strcmp(operation, "write") || !strcmp(operation, "pwrite");
                if (!dying) kill(getpid(), SIGKILL);
            }
        } else if (log_fd >= 0 || wanted[0]) {
            site_of(site, sizeof site);
            int length = snprintf(line, sizeof line, "%s %s %s", operation, class, site);
            if (wanted[0] && counter && !strcmp(line, wanted)) {
                long number = atomic_fetch_add(counter, 1) + 1;
                if (number == fault_at || (mode == ALWAYS && number > fault_at)) result = fault_errno;
            }
            if (log_fd >= 0) {
                length += snprintf(line + length, sizeof line - length, " %s\n", path);
                syscall(SYS_write, log_fd, line, length);
            }
        }
    }
    inside--;
    errno = result ? result : saved;
    return result;
}

static ssize_t written(ssize_t count) {
    if (dying) kill(getpid(), SIGKILL);
    return count;
}

static size_t shorter(int fd, size_t count) {
    if (dying) return count / 2;
    if (mode != SHORT || inside || count < 2) return count;
    char path[4200];
    int saved = errno, ours = path_at(fd, NULL, path, sizeof path) && class_of(path);
    errno = saved;
    return ours ? count / 2 : count;
}

#define REAL(type, name, ...)                             \
    static type (*real)(__VA_ARGS__);                     \
    if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

#define OPEN(function)                                                                           \
    int function(const char *path, int flags, ...) {                                             \
        REAL(int, #function, const char *, int, ...);                                            \
        va_list rest;                                                                            \
        va_start(rest, flags);                                                                   \
        mode_t permissions = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;           \
        va_end(rest);                                                                            \
        if (fails(flags & O_CREAT ? "create" : "open", AT_FDCWD, path)) return -1;               \
        return real(path, flags, permissions);                                                   \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(function)                                                                         \
    int function(int folder, const char *path, int flags, ...) {                                 \
        REAL(int, #function, int, const char *, int, ...);                                       \
        va_list rest;                                                                            \
        va_start(rest, flags);                                                                   \
        mode_t permissions = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;           \
        va_end(rest);                                                                            \
        if (fails(flags & O_CREAT ? "create" : "open", folder, path)) return -1;                 \
        return real(folder, path, flags, permissions);                                           \
    }
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(function)                                                                          \
    FILE *function(const char *path, const char *how) {                                          \
        REAL(FILE *, #function, const char *, const char *);                                     \
        if (fails(how[0] == 'r' ? "open" : "create", AT_FDCWD, path)) return NULL;               \
        return real(path, how);                                                                  \
    }
FOPEN(fopen)
FOPEN(fopen64)

ssize_t read(int fd, void *bytes, size_t count) {
    REAL(ssize_t, "read", int, void *, size_t);
    return fails("read", fd, NULL) ? -1 : real(fd, bytes, count);
}

#define PREAD(function, offset_type)                                                             \
    ssize_t function(int fd, void *bytes, size_t count, offset_type offset) {                    \
        REAL(ssize_t, #function, int, void *, size_t, offset_type);                              \
        return fails("pread", fd, NULL) ? -1 : real(fd, bytes, count, offset);                   \
    }
PREAD(pread, off_t)
PREAD(pread64, off64_t)

ssize_t readv(int fd, const struct iovec *parts, int count) {
    REAL(ssize_t, "readv", int, const struct iovec *, int);
    return fails("readv", fd, NULL) ? -1 : real(fd, parts, count);
}

ssize_t write(int fd, const void *bytes, size_t count) {
    REAL(ssize_t, "write", int, const void *, size_t);
    return fails("write", fd, NULL) ? -1 : written(real(fd, bytes, shorter(fd, count)));
}

#define PWRITE(function, offset_type)                                                            \
    ssize_t function(int fd, const void *bytes, size_t count, offset_type offset) {              \
        REAL(ssize_t, #function, int, const void *, size_t, offset_type);                        \
        if (fails("pwrite", fd, NULL)) return -1;                                                \
        return written(real(fd, bytes, shorter(fd, count), offset));                             \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(ssize_t, "writev", int, const struct iovec *, int);
    return fails("writev", fd, NULL) ? -1 : real(fd, parts, count);
}

#define SENDFILE(function, offset_type)                                                          \
    ssize_t function(int out, int in, offset_type *offset, size_t count) {                       \
        REAL(ssize_t, #function, int, int, offset_type *, size_t);                               \
        if (fails("write", out, NULL) || fails("read", in, NULL)) return -1;                     \
        return written(real(out, in, offset, dying ? count / 2 : count));                        \
    }
SENDFILE(sendfile, off_t)
SENDFILE(sendfile64, off64_t)

#define OF_FD(function)                                                                          \
    int function(int fd) {                                                                       \
        REAL(int, #function, int);                                                               \
        return fails(#function, fd, NULL) ? -1 : real(fd);                                       \
    }
OF_FD(fsync)
OF_FD(fdatasync)

int close(int fd) {
    REAL(int, "close", int);
    if (!fails("close", fd, NULL)) return real(fd);
    int saved = errno;
    real(fd);
    errno = saved;
    return -1;
}

int flock(int fd, int operation) {
    REAL(int, "flock", int, int);
    return fails("flock", fd, NULL) ? -1 : real(fd, operation);
}

#define TRUNCATE(function, offset_type)                                                          \
    int function(int fd, offset_type length) {                                                   \
        REAL(int, #function, int, offset_type);                                                  \
        return fails("truncate", fd, NULL) ? -1 : real(fd, length);                              \
    }
TRUNCATE(ftruncate, off_t)
TRUNCATE(ftruncate64, off64_t)

#define TRUNCATE_PATH(function, offset_type)                                                     \
    int function(const char *path, offset_type length) {                                         \
        REAL(int, #function, const char *, offset_type);                                         \
        return fails("truncate", AT_FDCWD, path) ? -1 : real(path, length);                      \
    }
TRUNCATE_PATH(truncate, off_t)
TRUNCATE_PATH(truncate64, off64_t)

int rename(const char *old, const char *new) {
    REAL(int, "rename", const char *, const char *);
    return fails("rename", AT_FDCWD, new) ? -1 : real(old, new);
}

int renameat(int from, const char *old, int to, const char *new) {
    REAL(int, "renameat", int, const char *, int, const char *);
    return fails("rename", to, new) ? -1 : real(from, old, to, new);
}

int link(const char *old, const char *new) {
    REAL(int, "link", const char *, const char *);
    return fails("link", AT_FDCWD, new) ? -1 : real(old, new);
}

int symlink(const char *target, const char *path) {
    REAL(int, "symlink", const char *, const char *);
    return fails("symlink", AT_FDCWD, path) ? -1 : real(target, path);
}

#define OF_PATH(function, operation)                                                             \
    int function(const char *path) {                                                             \
        REAL(int, #function, const char *);                                                      \
        return fails(operation, AT_FDCWD, path) ? -1 : real(path);                               \
    }
OF_PATH(unlink, "unlink")
OF_PATH(rmdir, "rmdir")
OF_PATH(remove, "unlink")

int unlinkat(int folder, const char *path, int flags) {
    REAL(int, "unlinkat", int, const char *, int);
    return fails(flags & AT_REMOVEDIR ? "rmdir" : "unlink", folder, path) ? -1
                                                                          : real(folder, path, flags);
}

int mkdir(const char *path, mode_t permissions) {
    REAL(int, "mkdir", const char *, mode_t);
    return fails("mkdir", AT_FDCWD, path) ? -1 : real(path, permissions);
}

int mkdirat(int folder, const char *path, mode_t permissions) {
    REAL(int, "mkdirat", int, const char *, mode_t);
    return fails("mkdir", folder, path) ? -1 : real(folder, path, permissions);
}

int chmod(const char *path, mode_t permissions) {
    REAL(int, "chmod", const char *, mode_t);
    return fails("chmod", AT_FDCWD, path) ? -1 : real(path, permissions);
}

int fchmodat(int folder, const char *path, mode_t permissions, int flags) {
    REAL(int, "fchmodat", int, const char *, mode_t, int);
    return fails("chmod", folder, path) ? -1 : real(folder, path, permissions, flags);
}

#define STAT(function, type)                                                                     \
    int function(const char *path, struct type *result) {                                        \
        REAL(int, #function, const char *, struct type *);                                       \
        return fails("stat", AT_FDCWD, path) ? -1 : real(path, result);                          \
    }
STAT(stat, stat)
STAT(stat64, stat64)
STAT(lstat, stat)
STAT(lstat64, stat64)

#define FSTAT(function, type)                                                                    \
    int function(int fd, struct type *result) {                                                  \
        REAL(int, #function, int, struct type *);                                                \
        return fails("stat", fd, NULL) ? -1 : real(fd, result);                                  \
    }
FSTAT(fstat, stat)
FSTAT(fstat64, stat64)

#define FSTATAT(function, type)                                                                  \
    int function(int folder, const char *path, struct type *result, int flags) {                 \
        REAL(int, #function, int, const char *, struct type *, int);                             \
        return fails("stat", folder, path) ? -1 : real(folder, path, result, flags);             \
    }
FSTATAT(fstatat, stat)
FSTATAT(fstatat64, stat64)

int statx(int folder, const char *path, int flags, unsigned mask, struct statx *result) {
    REAL(int, "statx", int, const char *, int, unsigned, struct statx *);
    return fails("stat", folder, path) ? -1 : real(folder, path, flags, mask, result);
}

/* Used before glibc 2.33. */
int __xstat64(int version, const char *path, struct stat64 *result) {
    REAL(int, "__xstat64", int, const char *, struct stat64 *);
    return fails("stat", AT_FDCWD, path) ? -1 : real(version, path, result);
}

int __lxstat64(int version, const char *path, struct stat64 *result) {
    REAL(int, "__lxstat64", int, const char *, struct stat64 *);
    return fails("stat", AT_FDCWD, path) ? -1 : real(version, path, result);
}

int __fxstat64(int version, int fd, struct stat64 *result) {
    REAL(int, "__fxstat64", int, int, struct stat64 *);
    return fails("stat", fd, NULL) ? -1 : real(version, fd, result);
}

#define STATVFS(function, type)                                                                  \
    int function(const char *path, struct type *result) {                                        \
        REAL(int, #function, const char *, struct type *);                                       \
        return fails("statvfs", AT_FDCWD, path) ? -1 : real(path, result);                       \
    }
STATVFS(statvfs, statvfs)
STATVFS(statvfs64, statvfs64)

int access(const char *path, int how) {
    REAL(int, "access", const char *, int);
    return fails("access", AT_FDCWD, path) ? -1 : real(path, how);
}

DIR *opendir(const char *path) {
    REAL(DIR *, "opendir", const char *);
    return fails("opendir", AT_FDCWD, path) ? NULL : real(path);
}

DIR *fdopendir(int fd) {
    REAL(DIR *, "fdopendir", int);
    return fails("opendir", fd, NULL) ? NULL : real(fd);
}

#define READDIR(function, type)                                                                  \
    struct type *function(DIR *folder) {                                                         \
        REAL(struct type *, #function, DIR *);                                                   \
        return fails("readdir", dirfd(folder), NULL) ? NULL : real(folder);                      \
    }
READDIR(readdir, dirent)
READDIR(readdir64, dirent64)

#define MMAP(function, offset_type)                                                              \
    void *function(void *address, size_t length, int protection, int flags, int fd,              \
                   offset_type offset) {                                                         \
        REAL(void *, #function, void *, size_t, int, int, int, offset_type);                     \
        if (fd >= 0 && !(flags & MAP_ANONYMOUS) && fails("mmap", fd, NULL)) return MAP_FAILED;   \
        return real(address, length, protection, flags, fd, offset);                             \
    }
MMAP(mmap, off_t)
MMAP(mmap64, off64_t)
