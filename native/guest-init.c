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
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/netlink.h>
#include <net/if.h>
#include <poll.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

/* The serial of the guest image's disk, unless the host says otherwise; virtio allows 20 bytes. */
#define DEFAULT_ROOT_SERIAL "guest"
#define ROOT_SERIAL_WORD "kiln.image_serial="
#define MAX_SERIAL 20
#define MODULES_WORD "kiln.modules="
#define MAX_MODULES 16
#define BOOT_TIMER_WORD "kiln.boot_timer="
/* What Firecracker's boot timer waits for: src/vmm/src/devices/pseudo/boot_timer.rs of its v1.16. */
#define BOOT_TIMER_MAGIC 123
/* How long the disk may take to appear. It is there at once on every VMM we know; this only bounds a wrong set-up. */
#define ROOT_WAIT_MS 10000

static bool tracing;
/* The host has no hardware virtualisation: each piece of machine code is translated before it runs. */
static bool emulated;
/* Names with commas between them. */
static char wanted_modules[256];
/* Physical address of the VMM's boot timer; 0 for none. */
static unsigned long boot_timer;
/* The kernel was told to start the second stage itself. */
static bool has_one_stage;
static char root_serial[MAX_SERIAL + 1] = DEFAULT_ROOT_SERIAL;

static void say(const char *format, ...) __attribute__((format(printf, 1, 2)));

static void say(const char *format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  dprintf(STDERR_FILENO, "kiln-init: %s\n", text);
}

static void trace(const char *step) {
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

__attribute__((noreturn)) static void fail(const char *what) {
  say("%s: %s", what, strerror(errno));
  end_machine();
}

static void read_command_line(void) {
  char text[4096];
  int fd = open("/proc/cmdline", O_RDONLY | O_CLOEXEC);
  if (fd < 0) fail("open /proc/cmdline");
  ssize_t length = read(fd, text, sizeof(text) - 1);
  close(fd);
  if (length < 0) fail("read /proc/cmdline");
  text[length] = '\0';
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

/* Tells the VMM that the first program runs, where it asks for that. */
static void tell_boot_timer(void) {
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
static void mount_or_fail(const char *type, const char *target, unsigned long flags, const char *options) {
  if (mount(type, target, type, flags, options) == 0 || errno == EBUSY) return;
  char what[PATH_MAX];
  snprintf(what, sizeof(what), "mount %s on %s", type, target);
  fail(what);
}

static void make_directory(const char *path, mode_t mode) {
  if (mkdir(path, mode) != 0 && errno != EEXIST) {
    char what[PATH_MAX];
    snprintf(what, sizeof(what), "mkdir %s", path);
    fail(what);
  }
}

/* A setting that not every kernel has: its absence is no reason not to start. */
static void write_setting(const char *path, const char *value) {
  int fd = open(path, O_WRONLY | O_CLOEXEC);
  if (fd < 0 || write(fd, value, strlen(value)) < 0) say("warning: write %s to %s: %s", value, path, strerror(errno));
  if (fd >= 0) close(fd);
}

/* ---- first stage ---- */

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

static void first_stage(void) {
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

/* ---- second stage ---- */

static void mount_filesystems(void) {
  const unsigned long plain = MS_NOSUID | MS_NODEV | MS_NOEXEC;
  mount_or_fail("devtmpfs", "/dev", MS_NOSUID, "mode=0755");
  mount_or_fail("proc", "/proc", plain, NULL);
  mount_or_fail("sysfs", "/sys", plain, NULL);
  make_directory("/dev/pts", 0755);
  make_directory("/dev/shm", 01777);
  make_directory("/dev/mqueue", 0755);
  /* gid 5 is the group tty in every Debian image. */
  mount_or_fail("devpts", "/dev/pts", MS_NOSUID | MS_NOEXEC, "mode=0620,ptmxmode=0666,gid=5");
  mount_or_fail("tmpfs", "/dev/shm", MS_NOSUID | MS_NODEV, "mode=1777");
  mount_or_fail("mqueue", "/dev/mqueue", plain, NULL);
  mount_or_fail("tmpfs", "/run", MS_NOSUID | MS_NODEV, "mode=0755");
  mount_or_fail("tmpfs", "/tmp", MS_NOSUID | MS_NODEV, "mode=1777");
  mount_or_fail("tmpfs", "/var", MS_NOSUID | MS_NODEV, "mode=0755");
  make_directory("/run/lock", 01777);
  make_directory("/var/lib", 0755);
  make_directory("/var/log", 0755);
  make_directory("/var/tmp", 01777);
  if (chmod("/dev/shm", 01777) != 0 || chmod("/run/lock", 01777) != 0 || chmod("/var/tmp", 01777) != 0)
    fail("chmod shared directories");
  if (symlink("/run", "/var/run") != 0 || symlink("/run/lock", "/var/lock") != 0) fail("link /var/run");
  static const char *const links[][2] = {
      {"/proc/self/fd", "/dev/fd"}, {"fd/0", "/dev/stdin"}, {"fd/1", "/dev/stdout"}, {"fd/2", "/dev/stderr"}};
  for (size_t i = 0; i < sizeof(links) / sizeof(links[0]); i++)
    if (symlink(links[i][0], links[i][1]) != 0 && errno != EEXIST) fail(links[i][1]);
}

/* Every controller the kernel has is handed down, so that a container's cgroup can use it. */
static void open_cgroups(void) {
  mount_or_fail("cgroup2", "/sys/fs/cgroup", MS_NOSUID | MS_NODEV | MS_NOEXEC, "nsdelegate,memory_recursiveprot");
  char names[512], request[1024];
  int fd = open("/sys/fs/cgroup/cgroup.controllers", O_RDONLY | O_CLOEXEC);
  if (fd < 0) fail("open cgroup.controllers");
  ssize_t length = read(fd, names, sizeof(names) - 1);
  close(fd);
  if (length < 0) fail("read cgroup.controllers");
  names[length] = '\0';
  size_t used = 0;
  for (char *rest = names, *name; (name = strsep(&rest, " \n")) != NULL;) {
    if (name[0] != '\0') used += (size_t)snprintf(request + used, sizeof(request) - used, "+%s ", name);
  }
  fd = open("/sys/fs/cgroup/cgroup.subtree_control", O_WRONLY | O_CLOEXEC);
  if (fd < 0 || write(fd, request, used) != (ssize_t)used) fail("enable the cgroup controllers");
  close(fd);
}

/* The agent must outlive whatever the containers do. It gets a group of its own (what is not a container starts from
 * here, so everything else is in it, too), whose memory the kernel reclaims last, up to 96 MiB: 87 were measured, with the
 * pages of Node's program. When memory runs out it is never chosen; crun gives a container its own score. And when
 * all CPUs are busy, it goes first: it needs them rarely and briefly. */
static void protect_agent(void) {
  make_directory("/sys/fs/cgroup/agent", 0755);
  write_setting("/sys/fs/cgroup/agent/memory.low", "96M");
  write_setting("/sys/fs/cgroup/agent/cpu.weight", "1000");
  write_setting("/sys/fs/cgroup/agent/cgroup.procs", "0");
  write_setting("/proc/self/oom_score_adj", "-1000");
}

/* Starting Node reads some 40 MB of its 126 in small pieces all over the file. Larger pieces are fewer faults and fewer
 * disk requests, which costs less than the pages read in vain: 0.15 s less under emulation. Measured: 16 KiB to 8 MiB;
 * 128 KiB is the kernel's default. */
static void read_ahead(void) {
  struct stat root;
  char path[PATH_MAX];
  if (stat("/", &root) != 0) fail("stat /");
  snprintf(path, sizeof(path), "/sys/class/bdi/%u:%u/read_ahead_kb", major(root.st_dev), minor(root.st_dev));
  write_setting(path, "512");
}

static void bring_loopback_up(void) {
  struct ifreq request = {.ifr_name = "lo"};
  int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  if (fd < 0 || ioctl(fd, SIOCGIFFLAGS, &request) != 0) fail("read the state of lo");
  request.ifr_flags |= IFF_UP;
  if (ioctl(fd, SIOCSIFFLAGS, &request) != 0) fail("bring lo up");
  close(fd);
}

/* Nobody waits for it: what these drivers do is asked for later, if at all. tini reaps the process. */
static void load_wanted_modules(void) {
  if (wanted_modules[0] == '\0' || fork() != 0) return;
  char *arguments[MAX_MODULES + 4] = {"/sbin/modprobe", "-q", "-a"};
  size_t count = 3;
  for (char *rest = wanted_modules, *name; (name = strsep(&rest, ",")) != NULL && count < MAX_MODULES + 3;)
    if (name[0] != '\0') arguments[count++] = name;
  execv(arguments[0], arguments);
  _exit(1);
}

static void set_limits(void) {
  /* Databases map many files; watchers watch many trees: what a server distribution sets today. */
  write_setting("/proc/sys/vm/max_map_count", "1048576");
  write_setting("/proc/sys/fs/inotify/max_user_instances", "1024");
  write_setting("/proc/sys/fs/inotify/max_user_watches", "1048576");
  /* Containers without rlimits of their own inherit the agent's; the kernel's 1024/4096 is a desktop default. */
  const struct rlimit files = {.rlim_cur = 1048576, .rlim_max = 1048576};
  const struct rlimit unlimited = {.rlim_cur = RLIM_INFINITY, .rlim_max = RLIM_INFINITY};
  if (setrlimit(RLIMIT_NOFILE, &files) != 0 || setrlimit(RLIMIT_NPROC, &unlimited) != 0) fail("setrlimit");
}

static void second_stage(void) {
  mount_filesystems();
  read_command_line();
  if (has_one_stage) tell_boot_timer();
  trace("second stage");
  read_ahead();
  open_cgroups();
  protect_agent();
  bring_loopback_up();
  set_limits();
  load_wanted_modules();
  if (sethostname("kiln", 4) != 0) fail("sethostname");
  if (chdir("/") != 0) fail("chdir /");
  /* --max-semi-space-size=1 (MiB): the young generation stays small, so the agent touches fewer pages. Not
   * --single-threaded: with it the agent calls the host 0.3 s later under emulation (2.56 s and 2.24 s after QEMU's
   * start, medians of 4 on the minimal kernel). */
  char *arguments[] = {"/usr/bin/tini-static",
                       "--",
                       "/usr/bin/node",
                       "--max-semi-space-size=1",
                       "/usr/lib/kiln/agent.cjs",
                       NULL,
                       NULL};
  /* Machine code that V8 has made for itself would be translated anew, piece by piece; its interpreter is the same all the
   * time. A start from a template took 0.86 s with it and 1.06 s without, 20,000 lines of output 1.4 s and 2.3 s. */
  if (emulated) {
    arguments[5] = arguments[4];
    arguments[4] = "--jitless";
  }
  char *const environment[] = {"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root",
                               "LANG=C.UTF-8", "NODE_NO_WARNINGS=1",
                               "LD_PRELOAD=/usr/lib/kiln/kiln-joined-writes.so", NULL};
  trace("starting the agent");
  execve(arguments[0], arguments, environment);
  fail("exec /usr/bin/tini-static");
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
