/*
 * subreaper PIDFILE RUNTIME ARGUMENT...: what conmon is to an OCI runtime. Runs the runtime, which leaves a process behind
 * and its pid in PIDFILE, and waits for that process, which must have become our child. Ends as it does: its exit code, or
 * 128 and its signal; with 126 where it is not our child; with the runtime's own code where that fails.
 */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

static int code_of(int status)
{
	return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

int main(int count, char **arguments)
{
	int status, pid = 0;
	if (count < 3 || prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) < 0)
		return 125;
	pid_t runtime = fork();
	if (runtime == 0) {
		execv(arguments[2], arguments + 2);
		_exit(127);
	}
	if (runtime < 0 || waitpid(runtime, &status, 0) < 0)
		return 125;
	if (code_of(status) != 0)
		return code_of(status);
	FILE *file = fopen(arguments[1], "r");
	if (file == NULL || fscanf(file, "%d", &pid) != 1)
		return 125;
	fclose(file);
	for (;;) {
		pid_t ended = waitpid(-1, &status, 0);
		if (ended == pid)
			return code_of(status);
		if (ended < 0 && errno != EINTR)
			return 126;
	}
}
