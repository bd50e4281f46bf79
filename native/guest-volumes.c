/* Mounts the host's files in a Kiln guest: 9P2000.L over the channel that the host has made for it.
 *
 *   kiln-mount-volumes TARGET OPTIONS vsock PORT       dials the host (CID 2)
 *   kiln-mount-volumes TARGET OPTIONS serial DEVICE    a virtio-serial port, for example /dev/vport0p2
 *
 * TARGET is an existing directory; OPTIONS are v9fs's own (Documentation/filesystems/9p.rst), without those that name
 * the transport. Exits 0 when it is mounted, else 1 with a sentence on stderr.
 *
 * The kernel speaks 9P on a descriptor (trans=fd) and closes the mount's session when that reaches its end: everything
 * fails with an I/O error from then on, and nothing waits. A socket can be given to it as it is. A virtio-serial port
 * cannot, since the kernel can read it only for a program (it has no read_iter). So a process stays, which carries the
 * bytes between the port and a socket pair, and ends when either end is gone.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <linux/vm_sockets.h>
#include <unistd.h>

/* The longest message that is asked for, and some more: mostly one read(2) and one write(2) a message. */
#define BUFFER_SIZE (1 << 20)

/* From the nice value 0 of the agent, so that file traffic does not wait behind a busy program. */
#define RELAY_NICE (-10)

__attribute__((noreturn)) static void fail(const char *what) {
  dprintf(STDERR_FILENO, "%s: %s\n", what, strerror(errno));
  _exit(1);
}

static int dial_host(unsigned int port) {
  int fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) fail("socket");
  struct sockaddr_vm host = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST, .svm_port = port};
  if (connect(fd, (struct sockaddr *)&host, sizeof(host)) != 0) fail("cannot reach the host's file server");
  return fd;
}

struct way {
  int from;
  int to;
};

/* Carries bytes until one end is gone, and ends the process then: with it goes the other direction. */
static void *carry(void *argument) {
  const struct way *way = argument;
  char *buffer = malloc(BUFFER_SIZE);
  if (buffer == NULL) _exit(1);
  for (;;) {
    ssize_t length = read(way->from, buffer, BUFFER_SIZE);
    if (length < 0 && errno == EINTR) continue;
    if (length <= 0) _exit(0);
    for (ssize_t done = 0; done < length;) {
      ssize_t written = write(way->to, buffer + done, (size_t)(length - done));
      if (written < 0 && errno == EINTR) continue;
      if (written <= 0) _exit(0);
      done += written;
    }
  }
}

/* In a process of its own, which inherits the score by which the kernel spares the agent when memory runs out. */
static pid_t start_relay(int port, int pair, int others) {
  pid_t pid = fork();
  if (pid < 0) fail("fork");
  if (pid > 0) return pid;
  close(others);
  setsid();
  signal(SIGPIPE, SIG_IGN);
  setpriority(PRIO_PROCESS, 0, RELAY_NICE);
  /* The agent reads our stdout and stderr to their end. */
  int null = open("/dev/null", O_RDWR);
  for (int fd = STDIN_FILENO; fd <= STDERR_FILENO && null >= 0; fd++) dup2(null, fd);
  static struct way to_host, to_guest;
  to_host = (struct way){.from = pair, .to = port};
  to_guest = (struct way){.from = port, .to = pair};
  pthread_t thread;
  if (pthread_create(&thread, NULL, carry, &to_host) != 0) _exit(1);
  carry(&to_guest);
  _exit(0);
}

static void mount_session(const char *target, const char *options, int fd) {
  char all[1024];
  int length = snprintf(all, sizeof(all), "trans=fd,rfdno=%d,wfdno=%d,version=9p2000.L,%s", fd, fd, options);
  if (length < 0 || (size_t)length >= sizeof(all)) {
    errno = E2BIG;
    fail("options");
  }
  if (mount("kiln", target, "9p", MS_NODEV, all) != 0) fail("mount");
}

int main(int count, char **arguments) {
  if (count != 5) {
    dprintf(STDERR_FILENO, "usage: kiln-mount-volumes TARGET OPTIONS vsock PORT | serial DEVICE\n");
    return 1;
  }
  const char *target = arguments[1], *options = arguments[2], *channel = arguments[3], *place = arguments[4];
  if (strcmp(channel, "vsock") == 0) {
    mount_session(target, options, dial_host((unsigned int)strtoul(place, NULL, 10)));
    return 0;
  }
  int port = open(place, O_RDWR | O_CLOEXEC);
  if (port < 0) fail(place);
  int pair[2];
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0) fail("socketpair");
  start_relay(port, pair[1], pair[0]);
  close(port);
  close(pair[1]);
  /* When this fails, the end of this process is the end of the pair, and so of the relay. */
  mount_session(target, options, pair[0]);
  return 0;
}
