/*
 * What the server may do: the file operations of any user, on what it sees, and nothing else. Were its memory taken over
 * by a guest, the attacker would have the guest's own volumes, which the guest has anyway.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/audit.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <linux/securebits.h>
#include <sched.h>
#include <stddef.h>
#include <string.h>
#include <sys/fsuid.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "volumes.h"

#define BIT(capability) (1u << (capability))
/* DAC_READ_SEARCH is for linkat(2) by descriptor. */
#define KEPT \
	(BIT(CAP_CHOWN) | BIT(CAP_DAC_OVERRIDE) | BIT(CAP_DAC_READ_SEARCH) | BIT(CAP_FOWNER) | BIT(CAP_FSETID) | \
	 BIT(CAP_SETUID) | BIT(CAP_SETGID))

void allow_many_files(void)
{
	struct rlimit files = {MAX_FILES, MAX_FILES}, none = {0, 0};
	if (setrlimit(RLIMIT_NOFILE, &files) < 0 && getrlimit(RLIMIT_NOFILE, &files) == 0) {
		files.rlim_cur = files.rlim_max;
		setrlimit(RLIMIT_NOFILE, &files);
	}
	setrlimit(RLIMIT_CORE, &none);
}

static int set_capabilities(unsigned permitted, unsigned effective)
{
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct data[_LINUX_CAPABILITY_U32S_3] = {
		{.permitted = permitted, .effective = effective},
	};
	return (int)syscall(SYS_capset, &header, data);
}

void drop_privileges(void)
{
	/* Who acts as another user keeps the capabilities: whether that user may was decided in the guest. */
	const unsigned long bits = SECURE_ALL_BITS & ~(1ul << SECURE_KEEP_CAPS);
	if (setgroups(0, NULL) < 0)
		fail("cannot leave the", "groups");
	if (prctl(PR_SET_SECUREBITS, bits | SECURE_ALL_LOCKS, 0, 0, 0) < 0)
		fail("cannot lock the", "secure bits");
	for (unsigned long capability = 0; prctl(PR_CAPBSET_READ, capability, 0, 0, 0) >= 0; capability++)
		if (prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) < 0)
			fail("cannot drop the", "bounding set");
	if (set_capabilities(KEPT, KEPT) < 0)
		fail("cannot drop the", "capabilities");
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0 || prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) < 0)
		fail("cannot set", "no_new_privs");
}

/* Of this thread, as they are all when it starts: start_thread sees to that. */
static __thread uid_t current_uid;
static __thread gid_t current_gid;
static __thread bool current_is_other;

/*
 * The capability to leave setuid bits alone is root's: on the host's file systems they fall when somebody else writes.
 * When the kernel does not let us be that user, no file is made as another's.
 */
void act_as(uid_t uid, gid_t gid)
{
	bool other = uid != 0;
	if (uid != current_uid) {
		setfsuid(uid);
		if ((uid_t)setfsuid((uid_t)-1) != uid)
			_exit(1);
	}
	if (gid != current_gid) {
		setfsgid(gid);
		if ((gid_t)setfsgid((gid_t)-1) != gid)
			_exit(1);
	}
	if (other != current_is_other && set_capabilities(KEPT, other ? KEPT & ~BIT(CAP_FSETID) : KEPT) < 0)
		_exit(1);
	current_uid = uid;
	current_gid = gid;
	current_is_other = other;
}

void act_as_root(void)
{
	act_as(0, 0);
}

static const unsigned short allowed[] = {
	/* files */
	SYS_read, SYS_write, SYS_pread64, SYS_pwrite64, SYS_openat, SYS_close, SYS_fstat, SYS_newfstatat, SYS_statx,
	SYS_fstatfs, SYS_lseek, SYS_getdents64, SYS_flock, SYS_fsync, SYS_fdatasync, SYS_ftruncate, SYS_mkdirat,
	SYS_mknodat, SYS_symlinkat, SYS_linkat, SYS_unlinkat, SYS_renameat, SYS_renameat2, SYS_readlinkat, SYS_fchmodat,
	SYS_fchownat, SYS_utimensat, SYS_getxattr, SYS_setxattr, SYS_listxattr, SYS_removexattr,
	/* users */
	SYS_setfsuid, SYS_setfsgid, SYS_capset,
	/* memory, threads, the end */
	SYS_mmap, SYS_munmap, SYS_mprotect, SYS_mremap, SYS_madvise, SYS_brk, SYS_futex, SYS_set_robust_list, SYS_rseq,
	SYS_rt_sigprocmask, SYS_rt_sigreturn, SYS_getpid, SYS_gettid, SYS_clock_gettime, SYS_sched_yield,
	SYS_restart_syscall, SYS_pause, SYS_exit, SYS_exit_group,
};

#define COUNT (sizeof allowed / sizeof *allowed)
#define STATEMENT(code, value) ((struct sock_filter)BPF_STMT(code, value))
#define JUMP(code, value, yes, no) ((struct sock_filter)BPF_JUMP(code, value, yes, no))

/* Lets a call through whose argument is one of these. Returns how many statements there are then. */
static unsigned short allow_with(struct sock_filter *filter, unsigned short n, unsigned call, size_t argument,
				 const unsigned *values, unsigned char count)
{
	filter[n++] = JUMP(BPF_JMP | BPF_JEQ | BPF_K, call, 0, 2 * count + 2);
	filter[n++] = STATEMENT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args) + argument * sizeof(uint64_t));
	for (unsigned char i = 0; i < count; i++) {
		filter[n++] = JUMP(BPF_JMP | BPF_JEQ | BPF_K, values[i], 0, 1);
		filter[n++] = STATEMENT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
	}
	filter[n++] = STATEMENT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOSYS);
	return n;
}

/*
 * seccomp(2). Anything else does not exist for us. clone3 is among that, whose flags a filter cannot see; libc then uses
 * clone, which is for threads alone. Signals, which root may send to any process without a capability, go to us alone:
 * fcntl could have them sent, too (F_SETOWN, F_SETSIG).
 */
void allow_only_what_serving_needs(void)
{
	const unsigned commands[] = {F_DUPFD_CLOEXEC, F_GETFL, F_OFD_GETLK, F_OFD_SETLK, F_OFD_SETLKW};
	const unsigned own[] = {(unsigned)getpid()};
	struct sock_filter filter[COUNT * 2 + 32];
	unsigned short n = 0;
	filter[n++] = STATEMENT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch));
	filter[n++] = JUMP(BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH_X86_64, 1, 0);
	filter[n++] = STATEMENT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS);
	filter[n++] = STATEMENT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
	for (size_t i = 0; i < COUNT; i++) {
		filter[n++] = JUMP(BPF_JMP | BPF_JEQ | BPF_K, allowed[i], 0, 1);
		filter[n++] = STATEMENT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
	}
	n = allow_with(filter, n, SYS_fcntl, 1, commands, sizeof commands / sizeof *commands);
	n = allow_with(filter, n, SYS_tgkill, 0, own, 1);
	filter[n++] = JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_clone, 0, 3);
	filter[n++] = STATEMENT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[0]));
	filter[n++] = JUMP(BPF_JMP | BPF_JSET | BPF_K, CLONE_THREAD, 0, 1);
	filter[n++] = STATEMENT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
	filter[n++] = STATEMENT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOSYS);
	struct sock_fprog program = {.len = n, .filter = filter};
	if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) < 0)
		_exit(1);
}
