/*
 * kiln-standin: the host process whose pid containerd gets for a container that runs in a microVM.
 *
 *   kiln-standin NETNS_PATH|- ROOT_DIR ID        fd 3: a pipe or socket for the status
 *
 * People and tools do things to a container's pid: enter /proc/PID/ns/net, look through /proc/PID/root, send it
 * signal 0, read its cgroup and oom_score. The VMM's pid would hand them the host's file system; this process has
 * nothing to hand out. It joins the network namespace ("-": makes one, with lo up), makes an empty read-only filesystem
 * its root, drops every capability and every descriptor, says "ready\n" on fd 3 (or "error: text", and exits 1), and
 * sleeps until it is killed by SIGTERM or SIGKILL. It does not end with a killed kilnd; the next one takes it over, or ends it.
 * ROOT_DIR is any directory: the root is mounted there, in a mount namespace that nobody else sees, so nothing on the
 * host changes. ID is not used: it is there to be seen in ps.
 */
#define _GNU_SOURCE
#include "standin.h"

#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

static void reset_signals(void)
{
	sigset_t none;
	for (int number = 1; number < NSIG; number++)
		signal(number, SIG_DFL);
	signal(SIGHUP, SIG_IGN);
	signal(SIGINT, SIG_IGN);
	signal(SIGPIPE, SIG_IGN);
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
}

int main(int count, char **arguments)
{
	/* Without a descriptor 3 the first file we opened would take its number and get our status. */
	if (count != 4 || fcntl(STATUS_FD, F_GETFD) < 0) {
		static const char usage[] = "usage: kiln-standin NETNS_PATH|- ROOT_DIR ID 3>STATUS\n";
		(void)!write(STDERR_FILENO, usage, sizeof usage - 1);
		return 2;
	}
	reset_signals();
	(void)setsid(); /* fails only where the one who started us has already done it */
	if (prctl(PR_SET_NAME, "kiln-standin", 0, 0, 0) < 0)
		fail("cannot set the", "process name");

	if (strcmp(arguments[1], "-") == 0)
		make_netns();
	else
		join_netns(arguments[1]);
	enter_empty_root(arguments[2]);
	drop_privileges();

	if (syscall(SYS_close_range, 0u, (unsigned)STATUS_FD - 1, 0u) < 0 ||
	    syscall(SYS_close_range, (unsigned)STATUS_FD + 1, ~0u, 0u) < 0)
		fail("cannot close the", "descriptors");
	/* Nobody at the other end: kilnd died while it started us, so nobody would ever end us. */
	if (write(STATUS_FD, "ready\n", 6) != 6)
		return 1;
	close(STATUS_FD);
	for (;;)
		pause();
}
