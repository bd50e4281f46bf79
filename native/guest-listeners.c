/* Tells which TCP ports have listeners at a Kiln guest's loopback addresses.
 *
 *   kiln-listeners [CGROUP]
 *
 * Writes a line with all of them at once, and again whenever they have changed: "4:80 6:80 4:8080", sorted by port, "4" for
 * 127.0.0.1 and "6" for ::1; an empty line for none. Ends when nobody reads any more.
 *
 * The kernel tells of a listener's beginning and end only to BPF: a program that is attached to a cgroup (CGROUP, the root of
 * version 2's) is called for each socket of the cgroups below it, by listen(2) with BPF_SOCK_OPS_TCP_LISTEN_CB, and, where it
 * asks for that, by changes of the socket's state (linux/bpf.h, enum bpf_sock_ops). Ours puts a word into a ring buffer for both.
 * That is only the sign to look; who listens is in /proc/net/tcp and tcp6 (proc(5)). So nothing happens here while nothing
 * changes. Without CGROUP, or where the kernel has no such BPF, it looks once a second.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <poll.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

/* More are not told: a table of a container's that has gone mad must not fill anybody's memory. */
#define MAX_LISTENERS 1024

/* A listener is told of a little before it is gone, and whoever makes one often makes several. In microseconds. */
#define SETTLE_US 3000

/* The least time between two looks, so that a program that listens and stops without end costs little. In microseconds. */
#define PAUSE_US 20000

#define POLL_MS 1000

/* TCP_LISTEN of net/tcp_states.h, as /proc/net/tcp writes it. */
#define STATE_LISTEN "0A"

struct listener {
  uint16_t port;
  char family; /* '4' or '6' */
};

struct listeners {
  struct listener all[MAX_LISTENERS];
  size_t count;
};

/* A ring buffer of BPF's in memory: Documentation/bpf/ringbuf.rst. */
struct ring {
  int fd;
  unsigned long *consumed;
  const unsigned long *produced;
};

static int bpf(int command, union bpf_attr *attributes) {
  return (int)syscall(SYS_bpf, command, attributes, sizeof(*attributes));
}

static int make_ring(struct ring *ring) {
  long page = sysconf(_SC_PAGESIZE);
  union bpf_attr attributes = {.map_type = BPF_MAP_TYPE_RINGBUF, .max_entries = (uint32_t)page};
  ring->fd = bpf(BPF_MAP_CREATE, &attributes);
  if (ring->fd < 0) return -1;
  ring->consumed = mmap(NULL, (size_t)page, PROT_READ | PROT_WRITE, MAP_SHARED, ring->fd, 0);
  ring->produced = mmap(NULL, (size_t)page, PROT_READ, MAP_SHARED, ring->fd, page);
  return ring->consumed == MAP_FAILED || ring->produced == MAP_FAILED ? -1 : 0;
}

/* Forgets what it holds: one sign is as good as many. */
static void drain(struct ring *ring) {
  __atomic_store_n(ring->consumed, __atomic_load_n(ring->produced, __ATOMIC_ACQUIRE), __ATOMIC_RELEASE);
}

#define INSN(c, d, s, o, i) ((struct bpf_insn){.code = (c), .dst_reg = (d), .src_reg = (s), .off = (o), .imm = (i)})
#define MOV_REG(d, s) INSN(BPF_ALU64 | BPF_MOV | BPF_X, d, s, 0, 0)
#define MOV_IMM(d, i) INSN(BPF_ALU64 | BPF_MOV | BPF_K, d, 0, 0, i)
#define LOAD_FIELD(d, field) INSN(BPF_LDX | BPF_MEM | BPF_W, d, BPF_REG_6, offsetof(struct bpf_sock_ops, field), 0)
#define JUMP_IF_NOT(d, i, o) INSN(BPF_JMP | BPF_JNE | BPF_K, d, 0, o, i)
#define CALL(function) INSN(BPF_JMP | BPF_CALL, 0, 0, 0, function)

static int load_program(int ring_fd) {
  const struct bpf_insn program[] = {
      MOV_REG(BPF_REG_6, BPF_REG_1),
      LOAD_FIELD(BPF_REG_2, op),
      JUMP_IF_NOT(BPF_REG_2, BPF_SOCK_OPS_TCP_LISTEN_CB, 4),
      /* A new one: its end is to be told, too. */
      MOV_REG(BPF_REG_1, BPF_REG_6),
      MOV_IMM(BPF_REG_2, BPF_SOCK_OPS_STATE_CB_FLAG),
      CALL(BPF_FUNC_sock_ops_cb_flags_set),
      INSN(BPF_JMP | BPF_JA, 0, 0, 3, 0),
      JUMP_IF_NOT(BPF_REG_2, BPF_SOCK_OPS_STATE_CB, 10),
      LOAD_FIELD(BPF_REG_3, args[0]),
      JUMP_IF_NOT(BPF_REG_3, BPF_TCP_LISTEN, 8),
      INSN(BPF_ST | BPF_MEM | BPF_DW, BPF_REG_10, 0, -8, 0),
      INSN(BPF_LD | BPF_IMM | BPF_DW, BPF_REG_1, BPF_PSEUDO_MAP_FD, 0, ring_fd),
      INSN(0, 0, 0, 0, 0), /* the second half of the one before */
      MOV_REG(BPF_REG_2, BPF_REG_10),
      INSN(BPF_ALU64 | BPF_ADD | BPF_K, BPF_REG_2, 0, 0, -8),
      MOV_IMM(BPF_REG_3, 8),
      MOV_IMM(BPF_REG_4, 0),
      CALL(BPF_FUNC_ringbuf_output),
      MOV_IMM(BPF_REG_0, 1),
      INSN(BPF_JMP | BPF_EXIT, 0, 0, 0, 0),
  };
  union bpf_attr attributes = {
      .prog_type = BPF_PROG_TYPE_SOCK_OPS,
      .insn_cnt = sizeof(program) / sizeof(*program),
      .insns = (uintptr_t)program,
      .license = (uintptr_t) "Apache-2.0",
      .expected_attach_type = BPF_CGROUP_SOCK_OPS,
  };
  return bpf(BPF_PROG_LOAD, &attributes);
}

/* The program stays attached until the cgroup goes: there is one such process in a guest, and it lives as long. */
static bool be_told(const char *cgroup, struct ring *ring) {
  if (make_ring(ring) < 0) return false;
  int program = load_program(ring->fd);
  int directory = open(cgroup, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (program < 0 || directory < 0) return false;
  union bpf_attr attributes = {
      .target_fd = (uint32_t)directory,
      .attach_bpf_fd = (uint32_t)program,
      .attach_type = BPF_CGROUP_SOCK_OPS,
      .attach_flags = BPF_F_ALLOW_MULTI,
  };
  int attached = bpf(BPF_PROG_ATTACH, &attributes);
  close(directory);
  close(program);
  return attached == 0;
}

static void add(struct listeners *listeners, char family, unsigned port) {
  if (listeners->count == MAX_LISTENERS) return;
  listeners->all[listeners->count++] = (struct listener){.port = (uint16_t)port, .family = family};
}

/* The address as /proc/net writes it: 32-bit words in the machine's order, in hexadecimal digits. */
static void parse_address(const char *digits, size_t words, uint32_t *address) {
  for (size_t word = 0; word < words; word++) {
    char one[9] = {0};
    memcpy(one, digits + 8 * word, 8);
    address[word] = (uint32_t)strtoul(one, NULL, 16);
  }
}

static void add_ipv4(struct listeners *listeners, uint32_t address, unsigned port) {
  if (address == htonl(INADDR_ANY) || address == htonl(INADDR_LOOPBACK)) add(listeners, '4', port);
}

/* One at :: has IPv4's connections, too, unless it wants IPv6 only, which is not told here. */
static void add_ipv6(struct listeners *listeners, const uint32_t *address, unsigned port) {
  if (address[0] != 0 || address[1] != 0) return;
  if (address[2] == htonl(0xffff)) {
    add_ipv4(listeners, address[3], port);
  } else if (address[2] == 0 && (address[3] == 0 || address[3] == htonl(1))) {
    add(listeners, '6', port);
    if (address[3] == 0) add(listeners, '4', port);
  }
}

/* Listeners come first in the table: what comes after them, which may be much, is not read. */
static void read_table(const char *path, size_t words, struct listeners *listeners) {
  FILE *table = fopen(path, "re");
  if (table == NULL) return;
  char line[256];
  if (fgets(line, sizeof(line), table) != NULL) { /* the heading */
    while (fgets(line, sizeof(line), table) != NULL) {
      char digits[33];
      char state[3];
      unsigned port;
      if (sscanf(line, " %*d: %32[0-9A-F]:%4X %*[0-9A-F:] %2[0-9A-F]", digits, &port, state) != 3) break;
      if (strcmp(state, STATE_LISTEN) != 0) break;
      uint32_t address[4];
      if (strlen(digits) != 8 * words) break;
      parse_address(digits, words, address);
      if (words == 1) add_ipv4(listeners, address[0], port);
      else add_ipv6(listeners, address, port);
    }
  }
  fclose(table);
}

static int by_port(const void *left, const void *right) {
  const struct listener *one = left;
  const struct listener *other = right;
  return one->port != other->port ? one->port - other->port : one->family - other->family;
}

static void look(struct listeners *listeners) {
  listeners->count = 0;
  read_table("/proc/net/tcp", 1, listeners);
  read_table("/proc/net/tcp6", 4, listeners);
  qsort(listeners->all, listeners->count, sizeof(struct listener), by_port);
  size_t kept = 0;
  for (size_t i = 0; i < listeners->count; i++) {
    if (kept > 0 && by_port(&listeners->all[kept - 1], &listeners->all[i]) == 0) continue;
    listeners->all[kept++] = listeners->all[i];
  }
  listeners->count = kept;
}

static void say(const struct listeners *listeners) {
  static char line[MAX_LISTENERS * 8 + 2];
  size_t length = 0;
  for (size_t i = 0; i < listeners->count; i++) {
    const struct listener *each = &listeners->all[i];
    length += (size_t)sprintf(line + length, "%s%c:%u", i == 0 ? "" : " ", each->family, each->port);
  }
  line[length++] = '\n';
  for (size_t written = 0; written < length;) {
    ssize_t count = write(STDOUT_FILENO, line + written, length - written);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) _exit(0);
    written += (size_t)count;
  }
}

/* Until there is a sign, or it is time; ends the process when nobody reads its output any more. */
static void await_change(struct ring *ring, bool told) {
  struct pollfd fds[] = {{.fd = STDOUT_FILENO}, {.fd = ring->fd, .events = POLLIN}};
  (void)poll(fds, told ? 2 : 1, told ? -1 : POLL_MS);
  if ((fds[0].revents & (POLLERR | POLLHUP)) != 0) _exit(0);
  if (!told) return;
  usleep(SETTLE_US);
  drain(ring);
}

int main(int count, char **arguments) {
  static struct listeners known;
  static struct listeners now;
  struct ring ring = {.fd = -1};
  bool told = count > 1 && be_told(arguments[1], &ring);
  look(&known);
  say(&known);
  for (;;) {
    await_change(&ring, told);
    look(&now);
    bool same = now.count == known.count && memcmp(now.all, known.all, now.count * sizeof(*now.all)) == 0;
    if (!same) {
      memcpy(&known, &now, sizeof(known));
      say(&known);
    }
    usleep(PAUSE_US);
  }
}
