/*
 * What the two halves of containerd-shim-kiln-v2 share: launcher.c speaks (command line, request, reply),
 * launcher-kilnd.c finds or starts the kilnd to speak to. The story is at the head of launcher.c.
 */
#ifndef KILN_LAUNCHER_H
#define KILN_LAUNCHER_H

#include <limits.h>
#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

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

/* Must come before anything below. Fails on a KILN_STATE_DIR that cannot work. */
void find_paths(void);

/* The folder of this program, after symlinks; kilnd lies in it. */
extern char binary_dir[PATH_MAX];

/* A socket connected to a kilnd that is ready. Ten launchers at once start one kilnd. */
int connect_or_start(void);

/* The size of <state>/kilnd.stderr; and what was added since it had the size `from`, at most STDERR_TAIL bytes + NUL. */
off_t stderr_size(void);
void read_stderr_tail(char *tail, off_t from);

#endif
