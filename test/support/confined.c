/*
 * What the file server could do to others if a guest had taken it over: makes its system-call filter its own, tries, and
 * prints a line for each: what, and the error's name or "done".
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "../../native/volumes.h"

void fail(const char *what, const char *which)
{
	dprintf(STDERR_FILENO, "%s %s\n", what, which);
	_exit(1);
}

static void tell(const char *what, long result)
{
	dprintf(STDOUT_FILENO, "%s: %s\n", what, result < 0 ? strerrorname_np(errno) : "done");
}

int main(void)
{
	pid_t parent = getppid();
	allow_only_what_serving_needs();
	tell("signal itself", syscall(SYS_tgkill, getpid(), gettid(), 0));
	tell("signal another", syscall(SYS_tgkill, parent, parent, 0));
	tell("kill another", kill(parent, 0));
	tell("have another signalled", fcntl(STDIN_FILENO, F_SETOWN, parent));
	tell("choose the signal", fcntl(STDIN_FILENO, F_SETSIG, SIGKILL));
	tell("take a lease", fcntl(STDIN_FILENO, F_SETLEASE, F_RDLCK));
	tell("duplicate a descriptor", fcntl(STDIN_FILENO, F_DUPFD_CLOEXEC, 0));
	tell("start a process", fork());
	_exit(0);
}
