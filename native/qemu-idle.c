/* A plugin of QEMU (its docs/devel/tcg-plugins): an emulated guest that does nothing gives the memory of what QEMU has translated
 * of it back to the host. That is most of what such a virtual machine has for itself, and QEMU by itself never lets go of it.
 *
 *   -plugin file=kiln-qemu-idle.so,after=SECONDS[,unless=FILE]
 *
 * Where QEMU has used little CPU time for so long, and FILE is not there, all translations are dropped by qemu_plugin_reset.
 * When QEMU says that none is left, no CPU of the guest is in one, and the pages of its buffer are given back. What runs next
 * is translated anew.
 *
 * QEMU's header for plugins is not packaged by Debian. What is declared here is version 7 of it, whose functions and callbacks
 * have a pointer for the plugin as their last argument. Before, callbacks had the plugin's id as their first. None here looks
 * at its arguments, and what is passed in vain does no harm (System V ABI), so the same code is right for both.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <inttypes.h>
#include <malloc.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

typedef uint64_t plugin_id;

extern void qemu_plugin_register_flush_cb(plugin_id, void (*)(void *), void *);
extern void qemu_plugin_register_vcpu_resume_cb(plugin_id, void (*)(unsigned, void *), void *);
extern void qemu_plugin_reset(plugin_id, void (*)(void *), void *);

/* Of the interface: 1 until QEMU 8.2; 9.0 takes no plugin below 2, and 11.1 none below 7. */
int qemu_plugin_version = 1;

__attribute__((constructor)) static void choose_version(void) {
  if (dlsym(RTLD_DEFAULT, "qemu_plugin_num_vcpus") != NULL) qemu_plugin_version = 2;
  if (dlsym(RTLD_DEFAULT, "qemu_plugin_set_pc") != NULL) qemu_plugin_version = 7;
}

/* In milliseconds of CPU time. A guest that does nothing takes some 2 in a second, and up to 6 on a busy host. */
enum { MOST_IN_A_SECOND = 8, WORTH_A_FLUSH = 300 };

/* TCG's code is by far the largest memory that can be written and executed; what other libraries have is smaller. The
 * first page of TCG's holds code that stays (tcg_prologue_init). In bytes. */
enum { LEAST_BUFFER = 4 << 20, KEPT = 64 << 10 };

static struct {
  pthread_mutex_t lock;
  plugin_id id;
  int64_t after_ms;
  const char *unless;
  /* When the time that is looked at began, and what QEMU had used by then. */
  int64_t began_ms, began_cpu_ms;
  /* What QEMU had used when translations were dropped last. */
  int64_t flush_cpu_ms;
  bool asked;
} state = {.lock = PTHREAD_MUTEX_INITIALIZER};

static int64_t read_ms(clockid_t clock) {
  struct timespec now;
  clock_gettime(clock, &now);
  return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static void give_back_buffers(void) {
  FILE *maps = fopen("/proc/self/maps", "re");
  if (maps == NULL) return;
  char line[512];
  while (fgets(line, sizeof line, maps) != NULL) {
    uintptr_t start, end;
    unsigned long inode;
    if (sscanf(line, "%" SCNxPTR "-%" SCNxPTR " rwxp %*s %*s %lu", &start, &end, &inode) != 3 || inode != 0) continue;
    if (end - start >= LEAST_BUFFER) madvise((void *)(start + KEPT), end - start - KEPT, MADV_DONTNEED);
  }
  fclose(maps);
}

/* QEMU calls it when all translations are dropped, also when it has done so by itself; then it fills its buffer again. */
static void flushed(void *unused) {
  (void)unused;
  pthread_mutex_lock(&state.lock);
  if (state.asked) {
    give_back_buffers();
    malloc_trim(0);
  }
  pthread_mutex_unlock(&state.lock);
}

/* Whether it is time to drop what is translated. */
static bool is_idle(void) {
  int64_t now = read_ms(CLOCK_MONOTONIC), passed = now - state.began_ms;
  if (state.asked || passed < state.after_ms) return false;
  /* Which is a system call, and CPUs that are busy come here thousands of times a second. */
  int64_t cpu = read_ms(CLOCK_PROCESS_CPUTIME_ID), used = cpu - state.began_cpu_ms;
  state.began_ms = now;
  state.began_cpu_ms = cpu;
  if (used * 1000 > passed * MOST_IN_A_SECOND || cpu - state.flush_cpu_ms < WORTH_A_FLUSH) return false;
  return state.unless == NULL || access(state.unless, F_OK) != 0;
}

static void watch(void);

static void forgotten(void *unused) {
  (void)unused;
  pthread_mutex_lock(&state.lock);
  state.asked = false;
  state.flush_cpu_ms = read_ms(CLOCK_PROCESS_CPUTIME_ID);
  pthread_mutex_unlock(&state.lock);
  watch();
}

/* On the thread of a CPU that had nothing to do, and has now: a guest that sleeps wakes some times in a second. */
static void resumed(unsigned cpu, void *unused) {
  (void)cpu;
  (void)unused;
  if (pthread_mutex_trylock(&state.lock) != 0) return;
  bool idle = is_idle();
  if (idle) state.asked = true;
  pthread_mutex_unlock(&state.lock);
  if (idle) qemu_plugin_reset(state.id, forgotten, NULL);
}

/* A reset has taken the callbacks away, too. */
static void watch(void) {
  qemu_plugin_register_flush_cb(state.id, flushed, NULL);
  qemu_plugin_register_vcpu_resume_cb(state.id, resumed, NULL);
}

/* `info` is a qemu_info_t, of which nothing is needed. */
int qemu_plugin_install(plugin_id id, const void *info, int argc, char **argv) {
  (void)info;
  for (int i = 0; i < argc; i++) {
    if (strncmp(argv[i], "after=", 6) == 0) state.after_ms = 1000 * strtoll(argv[i] + 6, NULL, 10);
    else if (strncmp(argv[i], "unless=", 7) == 0) state.unless = strdup(argv[i] + 7);
  }
  if (state.after_ms <= 0) {
    fprintf(stderr, "kiln-qemu-idle: after=SECONDS is needed\n");
    return -1;
  }
  state.id = id;
  state.began_ms = read_ms(CLOCK_MONOTONIC);
  watch();
  return 0;
}
