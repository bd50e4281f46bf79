/*
 * fake-console SOCKET PROGRAM ARGS...: what crun does for a process with a terminal, without a container. Makes a
 * pseudo-terminal, sends its master to the socket, prints the pid of a process that has the slave as its controlling
 * terminal and becomes PROGRAM, and exits.
 */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static void send_fd(const char *path, int fd) {
  struct sockaddr_un address = {.sun_family = AF_UNIX};
  strncpy(address.sun_path, path, sizeof address.sun_path - 1);
  int to = socket(AF_UNIX, SOCK_STREAM, 0);
  if (to < 0 || connect(to, (struct sockaddr *)&address, sizeof address) != 0) err(1, "%s", path);
  char name[] = "/dev/ptmx", control[CMSG_SPACE(sizeof fd)] = {0};
  struct iovec iov = {.iov_base = name, .iov_len = sizeof name};
  struct msghdr message = {
      .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
  struct cmsghdr *header = CMSG_FIRSTHDR(&message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(sizeof fd);
  memcpy(CMSG_DATA(header), &fd, sizeof fd);
  if (sendmsg(to, &message, 0) < 0) err(1, "sendmsg");
  close(to);
}

int main(int argc, char **argv) {
  if (argc < 3) errx(1, "a socket and a program are needed");
  int master = posix_openpt(O_RDWR | O_NOCTTY);
  if (master < 0 || grantpt(master) != 0 || unlockpt(master) != 0) err(1, "posix_openpt");
  int slave = open(ptsname(master), O_RDWR | O_NOCTTY);
  if (slave < 0) err(1, "open the slave");
  send_fd(argv[1], master);
  pid_t child = fork();
  if (child < 0) err(1, "fork");
  if (child > 0) {
    printf("%d\n", child);
    return 0;
  }
  close(master);
  setsid();
  if (ioctl(slave, TIOCSCTTY, 0) != 0) err(1, "TIOCSCTTY");
  for (int fd = 0; fd < 3; fd++) dup2(slave, fd);
  if (slave > 2) close(slave);
  execvp(argv[2], argv + 2);
  err(127, "%s", argv[2]);
}
