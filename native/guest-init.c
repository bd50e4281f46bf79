/* The first program of a Kiln guest: turns a booted kernel into one that runs kiln-agent.
 *
 * It runs twice, told apart by the name it is started under:
 *
 *   /init            (in the initrd, for a kernel whose drivers are modules) loads the modules listed in
 *                    /modules/order, finds the disk whose virtio serial is "guest" (or the one that
 *                    kiln.image_serial=… on the kernel's command line names, for a VMM that chooses the serials
 *                    itself), mounts it and starts the second stage from it.
 *   /sbin/kiln-init  (on the guest image; a kernel with everything built in starts here with
 *                    root=/dev/vda rootfstype=erofs ro init=/sbin/kiln-init) mounts the kernel's filesystems, opens
 *                    the cgroup controllers to containers, protects the agent from them, brings the loopback
 *                    interface up and becomes tini -> node -> the agent.
 *
 * The root must be a disk, not the initramfs: pivot_root(2), which crun uses, refuses the latter.
 *
 * Whatever fails is named on the console ("kiln-init: what: why"), where the host reads it, and ends the machine by a
 * reboot, which every VMM turns into its own exit. `kiln.trace` on the kernel's command line prints the time since
 * boot at each step; `kiln.emulated` says that the machine is emulated in software; `kiln.modules=one,two` names drivers that
 * are wanted beside those that every guest needs, which are loaded while the agent starts; `kiln.boot_timer=A` is the
 * physical address of a boot timer.
 */
#define _GNU_SOURCE
#include "guest-init.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

/* The serial of the guest image's disk, unless the host says otherwise. */
#define DEFAULT_ROOT_SERIAL "guest"
#define ROOT_SERIAL_WORD "kiln.image_serial="
#define MODULES_WORD "kiln.modules="
#define BOOT_TIMER_WORD "kiln.boot_timer="
/* What Firecracker's boot timer waits for: src/vmm/src/devices/pseudo/boot_timer.rs of its v1.16. */
#define BOOT_TIMER_MAGIC 123

bool emulated;
char wanted_modules[256];
bool has_one_stage;
char root_serial[MAX_SERIAL + 1] = DEFAULT_ROOT_SERIAL;
static bool tracing;
/* Physical address of the VMM's boot timer; 0 for none. */
static unsigned long boot_timer;

void say(const char *format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  dprintf(STDERR_FILENO, "kiln-init: %s\n", text);
}

void trace(const char *step) {
  if (!tracing) return;
  struct timespec now;
  clock_gettime(CLOCK_BOOTTIME, &now);
  say("%5lld.%03ld %s", (long long)now.tv_sec, now.tv_nsec / 1000000, step);
}

__attribute__((noreturn)) static void end_machine(void) {
  tcdrain(STDERR_FILENO);
  sync();
  reboot(RB_AUTOBOOT);
  _exit(1); /* Only when not PID 1 or not privileged; the kernel panics on it, and panic=-1 reboots. */
}

void fail(const char *what) {
  say("%s: %s", what, strerror(errno));
  end_machine();
}

void read_or_fail(const char *path, char *text, size_t size) {
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) fail(path);
  ssize_t length = read(fd, text, size - 1);
  close(fd);
  if (length < 0) fail(path);
  text[length] = '\0';
}

void read_command_line(void) {
  char text[4096];
  read_or_fail("/proc/cmdline", text, sizeof(text));
  tracing = strstr(text, "kiln.trace") != NULL;
  emulated = strstr(text, "kiln.emulated") != NULL;
  has_one_stage = strstr(text, "init=/sbin/kiln-init") != NULL;
  for (char *rest = text, *word; (word = strsep(&rest, " \n")) != NULL;) {
    if (strncmp(word, ROOT_SERIAL_WORD, strlen(ROOT_SERIAL_WORD)) == 0)
      snprintf(root_serial, sizeof(root_serial), "%s", word + strlen(ROOT_SERIAL_WORD));
    if (strncmp(word, BOOT_TIMER_WORD, strlen(BOOT_TIMER_WORD)) == 0)
      boot_timer = strtoul(word + strlen(BOOT_TIMER_WORD), NULL, 0);
    if (strncmp(word, MODULES_WORD, strlen(MODULES_WORD)) == 0)
      snprintf(wanted_modules, sizeof(wanted_modules), "%s", word + strlen(MODULES_WORD));
  }
}

void tell_boot_timer(void) {
  if (boot_timer == 0) return;
  int fd = open("/dev/mem", O_RDWR | O_SYNC | O_CLOEXEC);
  void *page = fd < 0 ? MAP_FAILED : mmap(NULL, 1, PROT_WRITE, MAP_SHARED, fd, (off_t)boot_timer);
  if (page == MAP_FAILED)
    say("warning: write to the boot timer by /dev/mem: %s", strerror(errno));
  else
    *(volatile unsigned char *)page = BOOT_TIMER_MAGIC;
  if (page != MAP_FAILED) munmap(page, 1);
  if (fd >= 0) close(fd);
}

/* The kernel may already have mounted devtmpfs (CONFIG_DEVTMPFS_MOUNT): the same again is EBUSY and fine. */
void mount_or_fail(const char *type, const char *target, unsigned long flags, const char *options) {
  if (mount(type, target, type, flags, options) == 0 || errno == EBUSY) return;
  char what[PATH_MAX];
  snprintf(what, sizeof(what), "mount %s on %s", type, target);
  fail(what);
}

void make_directory(const char *path, mode_t mode) {
  if (mkdir(path, mode) != 0 && errno != EEXIST) {
    char what[PATH_MAX];
    snprintf(what, sizeof(what), "mkdir %s", path);
    fail(what);
  }
}

int main(int argc, char **argv) {
  if (getpid() != 1) {
    dprintf(STDERR_FILENO, "kiln-init: is the first program of a Kiln guest and does nothing elsewhere\n");
    return 1;
  }
  umask(022);
  if (argc > 0 && strcmp(argv[0], "/init") == 0)
    first_stage();
  else
    second_stage();
}
