/*
 * kiln-joined-writes.so: a library that the agent's Node is started with (LD_PRELOAD). Each write to the host, by a
 * virtio-serial port or a vsock, is a turn of the VMM and wakes kilnd, and a port gets what writev(2) is given piece by piece
 * (Linux 6.12, drivers/char/virtio_console.c: it has no write_iter). An answer of the agent would be up to six writes: its
 * header, its frame, the message in two pieces and, a turn of Node's event loop later, its status.
 *
 * So what is written to the host is held until the event loop has nothing else to do, and goes out in one write then. Elsewhere
 * writes are what they were, but for short pieces of one writev(2), which are joined.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

/* What is longer is mostly one piece: a program's output. In bytes. */
#define LONGEST_JOINED (16 * 1024)

/*
 * libuv looks for events without waiting before it waits, and in each turn in which callbacks of setImmediate are due. In the
 * second of these after a write, a status that belongs to it has come.
 */
#define LOOKS_HELD 2

/* How long the loop waits at a time while the host takes nothing, in ms. */
#define RETRY_MS 10

/* The kernel's set of signals, which is smaller than the C library's: rt_sigprocmask(2). */
#define SIGNALS_BYTES 8

/* The way to the host. */
static int channel = -1;
static struct stat channel_file;
/* Node has threads with event loops of their own. */
static pthread_t owner;
static char held[LONGEST_JOINED];
static size_t held_length;
static int looks;

static bool is_channel(int fd) {
  struct stat file;
  if (fd < 0 || fd != channel || !pthread_equal(pthread_self(), owner)) return false;
  if (fstat(fd, &file) == 0 && file.st_dev == channel_file.st_dev && file.st_ino == channel_file.st_ino) return true;
  /* It was closed, and the number may be another file's. */
  channel = -1;
  held_length = 0;
  return false;
}

/* The calling thread's writes to this file are held from now on. What was held for an earlier one is dropped. */
void kiln_hold_writes_to(int fd) {
  held_length = 0;
  owner = pthread_self();
  channel = fstat(fd, &channel_file) == 0 ? fd : -1;
}

/* False when the host takes no more for now. */
static bool let_go(void) {
  if (held_length == 0 || !is_channel(channel)) return true;
  size_t at = 0;
  while (at < held_length) {
    ssize_t length = syscall(SYS_write, channel, held + at, held_length - at);
    if (length > 0) at += length;
    else if (length == 0 || errno == EAGAIN) break;
    /* Nobody is there any more, which reading tells. */
    else if (errno != EINTR) at = held_length;
  }
  held_length -= at;
  memmove(held, held + at, held_length);
  return held_length == 0;
}

/* Of what is longer than may be joined: more than that. */
static size_t length_of(const struct iovec *pieces, int count) {
  size_t length = 0;
  for (int i = 0; i < count; i++) {
    if (pieces[i].iov_len > LONGEST_JOINED - length) return LONGEST_JOINED + 1;
    length += pieces[i].iov_len;
  }
  return length;
}

static void copy(const struct iovec *pieces, int count, char *to) {
  for (int i = 0; i < count; i++) {
    memcpy(to, pieces[i].iov_base, pieces[i].iov_len);
    to += pieces[i].iov_len;
  }
}

static ssize_t hold(const struct iovec *pieces, int count) {
  size_t length = length_of(pieces, count);
  if (length > sizeof(held) - held_length) {
    if (!let_go()) {
      errno = EAGAIN;
      return -1;
    }
    if (length > sizeof(held)) return syscall(SYS_writev, channel, pieces, count);
  }
  if (held_length == 0) looks = 0;
  copy(pieces, count, held + held_length);
  held_length += length;
  return length;
}

ssize_t write(int fd, const void *bytes, size_t length) {
  struct iovec piece = {(void *)bytes, length};
  return is_channel(fd) ? hold(&piece, 1) : syscall(SYS_write, fd, bytes, length);
}

ssize_t writev(int fd, const struct iovec *pieces, int count) {
  if (is_channel(fd)) return hold(pieces, count);
  char joined[LONGEST_JOINED];
  size_t length = length_of(pieces, count);
  if (length > sizeof(joined)) return syscall(SYS_writev, fd, pieces, count);
  copy(pieces, count, joined);
  return syscall(SYS_write, fd, joined, length);
}

int shutdown(int fd, int how) {
  if (is_channel(fd)) let_go();
  return syscall(SYS_shutdown, fd, how);
}

int epoll_pwait(int fd, struct epoll_event *events, int count, int timeout, const sigset_t *signals) {
  if (held_length > 0 && pthread_equal(pthread_self(), owner)) {
    looks += 1;
    if ((timeout != 0 || looks >= LOOKS_HELD) && !let_go() && (timeout < 0 || timeout > RETRY_MS)) timeout = RETRY_MS;
  }
  return syscall(SYS_epoll_pwait, fd, events, count, timeout, signals, SIGNALS_BYTES);
}
