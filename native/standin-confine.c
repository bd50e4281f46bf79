/*
 * How a process that stands for one in a guest becomes a thing that has nothing to hand out; see standin.h.
 */
#define _GNU_SOURCE
#include "standin.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/securebits.h>
#include <net/if.h>
#include <sched.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

/* strerror and stdio are left out: they would double the private memory of every container's stand-in. */
void fail(const char *what, const char *which)
{
	const char *reason = strerrordesc_np(errno);
	const char *const parts[] = {"error: ", what, " ", which, ": ", reason ? reason : "unknown error"};
	char text[4096 + 256];
	size_t length = 0;
	for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
		size_t size = strnlen(parts[i], sizeof text - length);
		memcpy(text + length, parts[i], size);
		length += size;
	}
	(void)!write(STATUS_FD, text, length);
	_exit(1);
}

void make_netns(void)
{
	struct ifreq request = {.ifr_name = "lo"};
	if (unshare(CLONE_NEWNET) < 0)
		fail("cannot make a", "network namespace");
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (fd < 0)
		fail("cannot make a socket in the new", "network namespace");
	if (ioctl(fd, SIOCGIFFLAGS, &request) < 0)
		fail("cannot read the flags of", "lo");
	request.ifr_flags |= IFF_UP;
	if (ioctl(fd, SIOCSIFFLAGS, &request) < 0)
		fail("cannot bring up", "lo");
}

void join_netns(const char *path)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		fail("cannot open the network namespace", path);
	if (setns(fd, CLONE_NEWNET) < 0)
		fail("cannot join the network namespace", path);
}

static void enter_mount_namespace(void)
{
	if (unshare(CLONE_NEWNS) < 0)
		fail("cannot make a", "mount namespace");
	/* Before any mount, or the host would see it. */
	if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0)
		fail("cannot make private the mounts below", "/");
}

/* "." twice: the old root is stacked on the new one, and is what umount2 then finds (pivot_root(2)). */
static void change_root(const char *path)
{
	if (chdir(path) < 0 || syscall(SYS_pivot_root, ".", ".") < 0 || umount2(".", MNT_DETACH) < 0 || chdir("/") < 0)
		fail("cannot change the root to", path);
}

/*
 * Read-only, so that a copy into /proc/PID/root fails instead of going nowhere. All other mounts are left behind: kept,
 * they would hold the host's filesystems in use after the host has unmounted them.
 */
void enter_empty_root(const char *path)
{
	const unsigned long flags = MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC;
	enter_mount_namespace();
	if (mount("kiln-standin", path, "tmpfs", flags, "mode=0555,nr_inodes=1") < 0)
		fail("cannot mount the empty root on", path);
	change_root(path);
}

void enter_container_root(const char *path)
{
	const unsigned long flags = MS_BIND | MS_REMOUNT | MS_NOSUID | MS_NODEV | MS_NOEXEC;
	enter_mount_namespace();
	if (mount(path, path, NULL, MS_BIND | MS_REC, NULL) < 0 || mount(NULL, path, NULL, flags, NULL) < 0)
		fail("cannot mount the root filesystem", path);
	change_root(path);
}

void drop_privileges(void)
{
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct none[_LINUX_CAPABILITY_U32S_3] = {{0}};
	if (prctl(PR_SET_SECUREBITS, SECURE_ALL_BITS | SECURE_ALL_LOCKS, 0, 0, 0) < 0)
		fail("cannot lock the", "secure bits");
	for (unsigned long capability = 0; prctl(PR_CAPBSET_READ, capability, 0, 0, 0) >= 0; capability++)
		if (prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) < 0)
			fail("cannot drop the", "bounding set");
	if (syscall(SYS_capset, &header, none) < 0) /* empties the ambient set too, capabilities(7) */
		fail("cannot drop the", "capabilities");
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
		fail("cannot set", "no_new_privs");
}
