/*
 * kiln-joined-writes.so: a library that the agent's Node is started with (LD_PRELOAD). A virtio-serial port gets what
 * writev(2) is given piece by piece (Linux 6.12, drivers/char/virtio_console.c: it has no write_iter), and each piece is
 * a turn of the VMM and wakes the host: an answer of the agent would be four. Short pieces go out in one write here, which
 * for any other file is the same.
 */
#define _GNU_SOURCE
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

/* What is longer is mostly one piece: a program's output. In bytes. */
#define LONGEST_JOINED (16 * 1024)

ssize_t writev(int fd, const struct iovec *pieces, int count) {
  char joined[LONGEST_JOINED];
  size_t length = 0;
  for (int i = 0; i < count; i++) {
    if (pieces[i].iov_len > sizeof(joined) - length) return syscall(SYS_writev, fd, pieces, count);
    memcpy(joined + length, pieces[i].iov_base, pieces[i].iov_len);
    length += pieces[i].iov_len;
  }
  return write(fd, joined, length);
}
