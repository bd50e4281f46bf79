/* The second stage of kiln-init, on the guest image: makes a system of it that containers can run in (filesystems, control
 * groups, limits, the loopback interface), protects the agent from them, and becomes the agent.
 */
#define _GNU_SOURCE
#include "guest-init.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <net/if.h>
#include <stdio.h>
#include <string.h>
#include <sys/io.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#define MAX_MODULES 16

/* A setting that not every kernel has: its absence is no reason not to start. */
static void write_setting(const char *path, const char *value) {
  int fd = open(path, O_WRONLY | O_CLOEXEC);
  if (fd < 0 || write(fd, value, strlen(value)) < 0) say("warning: write %s to %s: %s", value, path, strerror(errno));
  if (fd >= 0) close(fd);
}

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
  read_or_fail("/sys/fs/cgroup/cgroup.controllers", names, sizeof(names));
  size_t used = 0;
  for (char *rest = names, *name; (name = strsep(&rest, " \n")) != NULL;) {
    if (name[0] != '\0') used += (size_t)snprintf(request + used, sizeof(request) - used, "+%s ", name);
  }
  int fd = open("/sys/fs/cgroup/cgroup.subtree_control", O_WRONLY | O_CLOEXEC);
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

/* QEMU's PIT counts from its reset on, and wakes QEMU 36 times a second for interrupts that nobody takes: Linux has the
 * local APIC's timer. In mode 0 it counts once (i8254; Linux does the same where it has used it, pit_shutdown). */
static void stop_pit(void) {
  enum { CHANNEL_0 = 0x40, MODE = 0x43, CHANNEL_0_MODE_0 = 0x30 };
  if (ioperm(CHANNEL_0, MODE - CHANNEL_0 + 1, 1) != 0) {
    say("warning: ioperm: %s", strerror(errno));
    return;
  }
  outb(CHANNEL_0_MODE_0, MODE);
  outb(0, CHANNEL_0);
  outb(0, CHANNEL_0);
  ioperm(CHANNEL_0, MODE - CHANNEL_0 + 1, 0);
}

/* What else wakes a guest that does nothing: compaction in advance twice a second, the counters of memory once, and a watch for
 * a CPU that hangs, which is also what one looks like that the host gives no time. */
static void let_it_sleep(void) {
  static const char *const settings[][2] = {{"/proc/sys/vm/compaction_proactiveness", "0"},
                                            {"/proc/sys/vm/stat_interval", "10"},
                                            {"/proc/sys/kernel/watchdog", "0"}};
  /* Not every kernel is built with all of them. */
  for (size_t i = 0; i < sizeof settings / sizeof *settings; i++)
    if (access(settings[i][0], F_OK) == 0) write_setting(settings[i][0], settings[i][1]);
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

void second_stage(void) {
  mount_filesystems();
  read_command_line();
  if (has_one_stage) tell_boot_timer();
  trace("second stage");
  read_ahead();
  open_cgroups();
  protect_agent();
  bring_loopback_up();
  set_limits();
  let_it_sleep();
  if (emulated) stop_pit();
  load_wanted_modules();
  if (sethostname("kiln", 4) != 0) fail("sethostname");
  if (chdir("/") != 0) fail("chdir /");
  /* --max-semi-space-size=1 (MiB): the young generation stays small, so the agent touches fewer pages. Not
   * --single-threaded: with it the agent calls the host 0.3 s later under emulation (2.56 s and 2.24 s after QEMU's
   * start, medians of 4 on the minimal kernel). --no-flush-bytecode: a function that has not run for some collections is not
   * compiled again at a container's start. --no-memory-reducer: V8 would look through its heap a second and ten seconds after
   * the start of each container, 0.6 s of CPU under emulation, and touch 7 MiB of pages that all clones share.
   * --jitless: machine code that V8 has made for itself would be translated anew, piece by piece; its interpreter is the same
   * all the time. A start from a template took 0.86 s with it and 1.06 s without, 20,000 lines of output 1.4 s and 2.3 s. */
  char *agent = "/usr/lib/kiln/agent.cjs";
  char *arguments[] = {"/usr/bin/tini-static",
                       "--",
                       "/usr/bin/node",
                       "--max-semi-space-size=1",
                       "--no-flush-bytecode",
                       "--no-memory-reducer",
                       emulated ? "--jitless" : agent,
                       emulated ? agent : NULL,
                       NULL};
  char *const environment[] = {"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root",
                               "LANG=C.UTF-8", "NODE_NO_WARNINGS=1",
                               "LD_PRELOAD=/usr/lib/kiln/kiln-joined-writes.so", NULL};
  trace("starting the agent");
  execve(arguments[0], arguments, environment);
  fail("exec /usr/bin/tini-static");
}
