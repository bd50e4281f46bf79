/*
 * What the parts of containerd-shim-kiln-v2 share: launcher.c speaks (command line, request, reply), launcher-kilnd.c
 * finds or starts the kilnd to speak to, relay*.c is the process that stays. The story is at the head of launcher.c.
 */
#ifndef KILN_LAUNCHER_H
#define KILN_LAUNCHER_H

#include <limits.h>
#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

#define PROTOCOL "2"	 /* of what is said to kilnd; the same stands in src/shim/control/request.ts */
#define STDERR_TAIL 2048 /* bytes of kilnd.stderr shown when kilnd ends without a word */

struct bytes {
	char *data;
	size_t length, capacity;
};

/* What we wait for just now; the time limit's message names it. */
extern const char *volatile waiting_for;

/* Prints the text on stdout, where containerd takes it as the error, and exits with 1. */
void fail(const char *format, ...) __attribute__((noreturn, format(printf, 1, 2)));

/* False when the reader is gone. */
bool write_all(int fd, const char *data, size_t length);

/* path has PATH_MAX bytes; a longer result is an error. */
void make_path(char *path, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* From now on the process may wait for TIME_LIMIT_S; then it says what it was waiting for, and exits with 1. */
void start_time_limit(void);

/* Must come before anything below. Fails on a KILN_STATE_DIR that cannot work. */
void find_paths(void);

/* The folder of this program, after symlinks; kilnd lies in it. */
extern char binary_dir[PATH_MAX];

/* The path of something in the state folder; path has PATH_MAX bytes. */
void state_path(char *path, const char *name);

/* A descriptor whose closing unlocks the folder that `path` is in; -1 with errno. Waits for whoever has the lock. */
int lock_folder_of(const char *path);

/* A connected Unix socket; flags as in socket(2). -1 with errno, which is EPERM for a process of another user. */
int dial(const char *path, int flags);

/*
 * A socket connected to a kilnd that is ready. Ten launchers at once start one kilnd. Where it is not needed, -1 when there is
 * none and nothing of any container either, which a kilnd that is started could know of.
 */
int connect_or_start(bool needed);

/* The size of <state>/kilnd.stderr; and what was added since it had the size `from`, at most STDERR_TAIL bytes + NUL. */
off_t stderr_size(void);
void read_stderr_tail(char *tail, off_t from);

#endif
