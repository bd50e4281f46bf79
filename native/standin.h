/*
 * What stands on the host for a process in a guest: kiln-standin (standin.c) for containerd, kiln-process (process.c) for
 * whoever calls Kiln as an OCI runtime. Both have nothing to show to those who look through /proc/PID.
 */
#ifndef KILN_STANDIN_H
#define KILN_STANDIN_H

#define STATUS_FD 3

/* Writes "error: WHAT WHICH: reason of errno" to STATUS_FD, and exits with 1. */
void fail(const char *what, const char *which) __attribute__((noreturn));

/* A network namespace of our own, with lo up. */
void make_netns(void);
void join_netns(const char *path);

/* An empty read-only filesystem for a root, mounted at path where only we see it. */
void enter_empty_root(const char *path);

/* The container's own root filesystem for a root, which is at path on the host: seen as it is, with nothing to run in it. */
void enter_container_root(const char *path);

/* Every capability, for ever. */
void drop_privileges(void);

#endif
