/* Has what a Kiln guest's programs send to port 53 of an address arrive elsewhere in the guest.
 *
 *   kiln-nameservers CGROUP ADDRESS OWN PORT
 *
 * What the programs below CGROUP (version 2's) send to ADDRESS, by UDP or TCP, arrives at PORT of OWN, an address of the same
 * family; to them it comes from ADDRESS. That holds for this program's network namespace, and until the cgroup goes; the
 * program itself ends at once, with 0 or with a message.
 *
 * A program of BPF's that is attached to a cgroup may change the addresses that system calls of the cgroup's processes name
 * (BPF_PROG_TYPE_CGROUP_SOCK_ADDR, linux/bpf.h): here those of connect(2) and sendmsg(2) on the way out, and of recvmsg(2) and
 * getpeername(2) on the way back. No packet is changed, and nobody has port 53: a container's own name server can listen at
 * it. What a name server listens at in the guest is left to it, except at 127.0.0.11, which is Docker's alone: there Docker, too,
 * takes the queries whoever listens. A socket of IPv6 can name an address of IPv4 (::ffff:127.0.0.11), so there are programs for
 * both.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <netinet/in.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef SO_NETNS_COOKIE
#define SO_NETNS_COOKIE 71
#endif

#define DOMAIN_PORT 53
#define MAX_INSNS 128

/* An address as struct bpf_sock_addr has it, in network order: one word or four. */
struct address {
  uint32_t words[4];
  int count;
};

struct redirect {
  struct address from;
  struct address to;
  uint16_t port; /* in network order, as all ports here */
  uint64_t netns;
  bool always;
};

struct code {
  struct bpf_insn insns[MAX_INSNS];
  int count;
};

#define INSN(c, d, s, o, i) ((struct bpf_insn){.code = (c), .dst_reg = (d), .src_reg = (s), .off = (o), .imm = (int32_t)(i)})
#define MOV_REG(d, s) INSN(BPF_ALU64 | BPF_MOV | BPF_X, d, s, 0, 0)
#define MOV_IMM(d, i) INSN(BPF_ALU64 | BPF_MOV | BPF_K, d, 0, 0, i)
#define MOV32_IMM(d, i) INSN(BPF_ALU | BPF_MOV | BPF_K, d, 0, 0, i)
#define LOAD(d, offset) INSN(BPF_LDX | BPF_MEM | BPF_W, d, BPF_REG_6, offset, 0)
#define STORE(s, offset) INSN(BPF_STX | BPF_MEM | BPF_W, BPF_REG_6, s, offset, 0)
#define CALL(function) INSN(BPF_JMP | BPF_CALL, 0, 0, 0, function)
/* To be patched: on to the end, where the call goes on as it is. */
#define TO_END 0x7fff
#define LEAVE_IF_NOT32(d, i) INSN(BPF_JMP32 | BPF_JNE | BPF_K, d, 0, TO_END, i)

#define PORT_FIELD offsetof(struct bpf_sock_addr, user_port)

static void emit(struct code *code, struct bpf_insn insn) {
  code->insns[code->count++] = insn;
}

static int address_field(const struct address *address, int word) {
  size_t field = address->count == 1 ? offsetof(struct bpf_sock_addr, user_ip4) : offsetof(struct bpf_sock_addr, user_ip6);
  return (int)field + 4 * word;
}

/* Leaves what is not about this address and port, or is in another network namespace. */
static void emit_match(struct code *code, const struct address *address, uint16_t port, uint64_t netns) {
  emit(code, MOV_REG(BPF_REG_6, BPF_REG_1));
  emit(code, LOAD(BPF_REG_2, PORT_FIELD));
  emit(code, LEAVE_IF_NOT32(BPF_REG_2, port));
  for (int word = 0; word < address->count; word++) {
    emit(code, LOAD(BPF_REG_2, address_field(address, word)));
    emit(code, LEAVE_IF_NOT32(BPF_REG_2, address->words[word]));
  }
  emit(code, MOV_REG(BPF_REG_1, BPF_REG_6));
  emit(code, CALL(BPF_FUNC_get_netns_cookie));
  emit(code, INSN(BPF_LD | BPF_IMM | BPF_DW, BPF_REG_1, 0, 0, netns));
  emit(code, INSN(0, 0, 0, 0, netns >> 32)); /* the second half of the one before */
  emit(code, INSN(BPF_JMP | BPF_JNE | BPF_X, BPF_REG_0, BPF_REG_1, TO_END, 0));
}

/* Leaves what has a listener where it goes: what is looked up is a struct bpf_sock_tuple on the stack. */
static void emit_unless_served(struct code *code, const struct address *address, uint16_t port) {
  bool four = address->count == 1 || address->words[2] == htonl(0xffff);
  const uint32_t *words = address->count == 1 ? address->words : &address->words[four ? 3 : 0];
  int count = four ? 1 : 4;
  int size = 4 * 2 * count + 4; /* two addresses and two ports */
  int tuple = -40;
  for (int at = tuple; at < 0; at += 8) emit(code, INSN(BPF_ST | BPF_MEM | BPF_DW, BPF_REG_10, 0, at, 0));
  for (int word = 0; word < count; word++) {
    emit(code, INSN(BPF_ST | BPF_MEM | BPF_W, BPF_REG_10, 0, tuple + 4 * (count + word), words[word]));
  }
  emit(code, INSN(BPF_ST | BPF_MEM | BPF_H, BPF_REG_10, 0, tuple + size - 2, port));
  emit(code, LOAD(BPF_REG_7, offsetof(struct bpf_sock_addr, protocol)));
  emit(code, MOV_REG(BPF_REG_1, BPF_REG_6));
  emit(code, MOV_REG(BPF_REG_2, BPF_REG_10));
  emit(code, INSN(BPF_ALU64 | BPF_ADD | BPF_K, BPF_REG_2, 0, 0, tuple));
  emit(code, MOV_IMM(BPF_REG_3, size));
  emit(code, MOV_IMM(BPF_REG_4, -1)); /* BPF_F_CURRENT_NETNS */
  emit(code, MOV_IMM(BPF_REG_5, 0));
  emit(code, INSN(BPF_JMP | BPF_JEQ | BPF_K, BPF_REG_7, 0, 2, IPPROTO_TCP));
  emit(code, CALL(BPF_FUNC_sk_lookup_udp));
  emit(code, INSN(BPF_JMP | BPF_JA, 0, 0, 1, 0));
  emit(code, CALL(BPF_FUNC_sk_lookup_tcp));
  emit(code, INSN(BPF_JMP | BPF_JEQ | BPF_K, BPF_REG_0, 0, 3, 0));
  emit(code, MOV_REG(BPF_REG_1, BPF_REG_0));
  emit(code, CALL(BPF_FUNC_sk_release));
  emit(code, INSN(BPF_JMP | BPF_JA, 0, 0, TO_END, 0));
}

static void emit_set(struct code *code, const struct address *address, uint16_t port) {
  for (int word = 0; word < address->count; word++) {
    emit(code, MOV32_IMM(BPF_REG_2, address->words[word]));
    emit(code, STORE(BPF_REG_2, address_field(address, word)));
  }
  emit(code, MOV32_IMM(BPF_REG_2, port));
  emit(code, STORE(BPF_REG_2, PORT_FIELD));
}

static void emit_end(struct code *code) {
  for (int at = 0; at < code->count; at++) {
    if (code->insns[at].off == TO_END) code->insns[at].off = (int16_t)(code->count - at - 1);
  }
  emit(code, MOV_IMM(BPF_REG_0, 1));
  emit(code, INSN(BPF_JMP | BPF_EXIT, 0, 0, 0, 0));
}

static struct code way_out(const struct redirect *redirect) {
  struct code code = {.count = 0};
  emit_match(&code, &redirect->from, htons(DOMAIN_PORT), redirect->netns);
  if (!redirect->always) emit_unless_served(&code, &redirect->from, htons(DOMAIN_PORT));
  emit_set(&code, &redirect->to, redirect->port);
  emit_end(&code);
  return code;
}

static struct code way_back(const struct redirect *redirect) {
  struct code code = {.count = 0};
  emit_match(&code, &redirect->to, redirect->port, redirect->netns);
  emit_set(&code, &redirect->from, htons(DOMAIN_PORT));
  emit_end(&code);
  return code;
}

static void fail(const char *what) {
  fprintf(stderr, "%s: %s\n", what, strerror(errno));
  exit(1);
}

static int bpf(int command, union bpf_attr *attributes) {
  return (int)syscall(SYS_bpf, command, attributes, sizeof(*attributes));
}

static void attach(int cgroup, enum bpf_attach_type type, const struct code *code) {
  union bpf_attr program = {
      .prog_type = BPF_PROG_TYPE_CGROUP_SOCK_ADDR,
      .insn_cnt = (uint32_t)code->count,
      .insns = (uintptr_t)code->insns,
      .license = (uintptr_t) "Apache-2.0",
      .expected_attach_type = type,
  };
  int fd = bpf(BPF_PROG_LOAD, &program);
  if (fd < 0) fail("this kernel does not load the program (CONFIG_CGROUP_BPF)");
  union bpf_attr place = {
      .target_fd = (uint32_t)cgroup,
      .attach_bpf_fd = (uint32_t)fd,
      .attach_type = type,
      .attach_flags = BPF_F_ALLOW_MULTI,
  };
  if (bpf(BPF_PROG_ATTACH, &place) < 0) fail("cannot attach the program to the cgroup");
  close(fd);
}

static void attach_four(int cgroup, const struct redirect *redirect) {
  struct code out = way_out(redirect);
  struct code back = way_back(redirect);
  attach(cgroup, BPF_CGROUP_UDP4_RECVMSG, &back);
  attach(cgroup, BPF_CGROUP_INET4_GETPEERNAME, &back);
  attach(cgroup, BPF_CGROUP_INET4_CONNECT, &out);
  attach(cgroup, BPF_CGROUP_UDP4_SENDMSG, &out);
}

static void attach_six(int cgroup, const struct redirect *redirect) {
  struct code out = way_out(redirect);
  struct code back = way_back(redirect);
  attach(cgroup, BPF_CGROUP_UDP6_RECVMSG, &back);
  attach(cgroup, BPF_CGROUP_INET6_GETPEERNAME, &back);
  attach(cgroup, BPF_CGROUP_INET6_CONNECT, &out);
  attach(cgroup, BPF_CGROUP_UDP6_SENDMSG, &out);
}

/* What a socket of IPv6 calls an address of IPv4. */
static struct address mapped(const struct address *address) {
  return (struct address){.words = {0, 0, htonl(0xffff), address->words[0]}, .count = 4};
}

static struct address parse(const char *text) {
  struct address address = {.count = 1};
  if (inet_pton(AF_INET, text, address.words) == 1) return address;
  address.count = 4;
  if (inet_pton(AF_INET6, text, address.words) == 1) return address;
  fprintf(stderr, "%s is no IP address\n", text);
  exit(1);
}

/* As bpf_get_netns_cookie of the programs has it; socket(7). */
static uint64_t own_netns(void) {
  uint64_t cookie = 0;
  socklen_t size = sizeof(cookie);
  int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  if (fd < 0 || getsockopt(fd, SOL_SOCKET, SO_NETNS_COOKIE, &cookie, &size) < 0) fail("SO_NETNS_COOKIE");
  close(fd);
  return cookie;
}

int main(int count, char **arguments) {
  if (count != 5) {
    fprintf(stderr, "usage: kiln-nameservers CGROUP ADDRESS OWN PORT\n");
    return 1;
  }
  int cgroup = open(arguments[1], O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (cgroup < 0) fail(arguments[1]);
  struct redirect redirect = {
      .from = parse(arguments[2]),
      .to = parse(arguments[3]),
      .port = htons((uint16_t)atoi(arguments[4])),
      .netns = own_netns(),
      .always = strcmp(arguments[2], "127.0.0.11") == 0,
  };
  if (redirect.from.count != redirect.to.count) {
    fprintf(stderr, "%s and %s are of different families\n", arguments[2], arguments[3]);
    return 1;
  }
  if (redirect.from.count == 1) {
    attach_four(cgroup, &redirect);
    redirect.from = mapped(&redirect.from);
    redirect.to = mapped(&redirect.to);
  }
  attach_six(cgroup, &redirect);
  return 0;
}
