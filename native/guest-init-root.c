/* The first stage of kiln-init, in the initrd: loads the kernel's modules, finds the disk with the guest image, and changes
 * over to it.
 */
#define _GNU_SOURCE
#include "guest-init.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/netlink.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* How long the disk may take to appear. It is there at once on every VMM we know; this only bounds a wrong set-up. */
#define ROOT_WAIT_MS 10000

static void load_module(const char *name) {
  char path[PATH_MAX];
  snprintf(path, sizeof(path), "/modules/%s", name);
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  /* EEXIST: built into this kernel, or loaded already. */
  if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) != 0 && errno != EEXIST)) {
    char what[PATH_MAX + 16];
    snprintf(what, sizeof(what), "load module %s", path);
    fail(what);
  }
  close(fd);
  /* The file lies in the initramfs, so in memory: give it back. */
  unlink(path);
}

static void load_modules(void) {
  FILE *order = fopen("/modules/order", "re");
  if (order == NULL) fail("open /modules/order");
  char line[256];
  while (fgets(line, sizeof(line), order) != NULL) {
    line[strcspn(line, "\n")] = '\0';
    if (line[0] != '\0') load_module(line);
  }
  fclose(order);
}

/* Reads /sys/block/NAME/serial: true when it is the guest image's. */
static bool has_root_serial(const char *name) {
  char path[PATH_MAX], serial[32];
  snprintf(path, sizeof(path), "/sys/block/%s/serial", name);
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return false; /* Not a virtio disk. */
  ssize_t length = read(fd, serial, sizeof(serial) - 1);
  close(fd);
  if (length < 0) return false;
  serial[length] = '\0';
  serial[strcspn(serial, "\n")] = '\0';
  return strcmp(serial, root_serial) == 0;
}

static bool find_root_disk(char *device, size_t size) {
  DIR *blocks = opendir("/sys/block");
  if (blocks == NULL) fail("open /sys/block");
  bool found = false;
  struct dirent *entry;
  while (!found && (entry = readdir(blocks)) != NULL) {
    if (entry->d_name[0] == '.') continue;
    found = has_root_serial(entry->d_name);
    if (found) snprintf(device, size, "/dev/%s", entry->d_name);
  }
  closedir(blocks);
  return found;
}

/* Drains the queued kernel events: which ones they are does not matter, the disks are looked at again. */
static void drain_events(int events) {
  char event[4096];
  while (recv(events, event, sizeof(event), MSG_DONTWAIT) >= 0 || errno == ENOBUFS) {
  }
}

static int milliseconds_since(const struct timespec *start) {
  struct timespec now;
  clock_gettime(CLOCK_BOOTTIME, &now);
  return (int)((now.tv_sec - start->tv_sec) * 1000 + (now.tv_nsec - start->tv_nsec) / 1000000);
}

/* `events` was opened before the disk drivers were loaded, so no appearance can be missed. */
static void wait_for_root_disk(int events, char *device, size_t size) {
  struct timespec start;
  clock_gettime(CLOCK_BOOTTIME, &start);
  for (;;) {
    drain_events(events);
    if (find_root_disk(device, size)) return;
    int left = ROOT_WAIT_MS - milliseconds_since(&start);
    struct pollfd wait = {.fd = events, .events = POLLIN};
    if (left <= 0 || poll(&wait, 1, left) == 0) {
      char what[64];
      snprintf(what, sizeof(what), "find a disk with the serial \"%s\"", root_serial);
      errno = ENODEV;
      fail(what);
    }
  }
}

static int open_events(void) {
  struct sockaddr_nl address = {.nl_family = AF_NETLINK, .nl_groups = 1};
  int fd = socket(AF_NETLINK, SOCK_DGRAM | SOCK_CLOEXEC, NETLINK_KOBJECT_UEVENT);
  if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof(address)) != 0) fail("listen to kernel events");
  return fd;
}

void first_stage(void) {
  make_directory("/dev", 0755);
  make_directory("/proc", 0755);
  make_directory("/sys", 0755);
  make_directory("/guest", 0755);
  mount_or_fail("devtmpfs", "/dev", MS_NOSUID, "mode=0755");
  mount_or_fail("proc", "/proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
  mount_or_fail("sysfs", "/sys", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
  read_command_line();
  tell_boot_timer();
  trace("first stage");
  int events = open_events();
  load_modules();
  trace("modules loaded");
  char device[PATH_MAX];
  wait_for_root_disk(events, device, sizeof(device));
  close(events);
  if (mount(device, "/guest", "erofs", MS_RDONLY | MS_NODEV, NULL) != 0) fail("mount the guest image");
  trace("guest image mounted");
  /* switch_root: the image takes the place of the initramfs; /dev and the others are mounted anew on it. */
  umount2("/sys", MNT_DETACH);
  umount2("/proc", MNT_DETACH);
  umount2("/dev", MNT_DETACH);
  if (chdir("/guest") != 0 || mount(".", "/", NULL, MS_MOVE, NULL) != 0 || chroot(".") != 0 || chdir("/") != 0)
    fail("switch to the guest image");
  char *const arguments[] = {"/sbin/kiln-init", NULL};
  execv(arguments[0], arguments);
  fail("exec /sbin/kiln-init");
}
