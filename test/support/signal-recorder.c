/*
 * For test/e2e/signals.test.ts: two processes, "init" and its "child", each of which says every signal that it gets, as
 * "init 15". All signals but SIGKILL and SIGSTOP are blocked and fetched one by one; a blocked signal is not lost, even
 * where its default is to be ignored or the process is the first of its PID namespace. By raw system calls, because the
 * C library keeps signals 32 and 33 to itself.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <unistd.h>

int main(void)
{
	unsigned long all = ~0UL;
	siginfo_t info;
	if (syscall(SYS_rt_sigprocmask, SIG_SETMASK, &all, NULL, sizeof all) < 0)
		return 1;
	const char *who = fork() == 0 ? "child" : "init";
	dprintf(STDOUT_FILENO, "%s ready\n", who);
	for (;;) {
		long number = syscall(SYS_rt_sigtimedwait, &all, &info, NULL, sizeof all);
		if (number > 0)
			dprintf(STDOUT_FILENO, "%s %ld\n", who, number);
	}
}
