/*
 * A process in a guest that makes its agent and crun fail when the host asks for it: for test/e2e/faults.test.ts. It is
 * the first program of a test's initrd, leaves a child behind, and becomes the real one, /init.real. The child lives
 * outside of every container and every control group of Kiln's, and listens on a vsock port. One line a connection:
 *
 *   SIGNAL number comm argument seconds   waits for a process with this name ("-": any) and this argument, and sends it
 *                                         the signal; SIGCONT follows after so many seconds, where they are not 0;
 *                                         the number 0 only waits, kill(2)
 *   FILL                                  leaves no space in /run
 *   FREE                                  undoes that
 *
 * The answer is "hit" when the signal was sent or the space is gone, then "done".
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/vm_sockets.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <unistd.h>

#define PORT 5000
#define PROC "/saboteur.proc"
#define AGENT "/usr/lib/kiln/agent.cjs"

static size_t read_file(const char *path, char *text, size_t size)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t length = fd < 0 ? 0 : read(fd, text, size - 1);
	if (fd >= 0)
		close(fd);
	if (length < 0)
		length = 0;
	text[length] = '\0';
	return (size_t)length;
}

static int matches(const char *pid, const char *comm, const char *argument)
{
	char path[64], text[4096];
	snprintf(path, sizeof path, PROC "/%.12s/comm", pid);
	size_t length = read_file(path, text, sizeof text);
	if (length > 0)
		text[length - 1] = '\0';
	if (strcmp(comm, "-") != 0 && strcmp(comm, text) != 0)
		return 0;
	snprintf(path, sizeof path, PROC "/%.12s/cmdline", pid);
	length = read_file(path, text, sizeof text);
	for (size_t at = 0; at < length; at += strlen(text + at) + 1)
		if (strcmp(text + at, argument) == 0)
			return 1;
	return 0;
}

/* Signals all from this pid on that match now; returns their number. PID 1 names the agent, too, and is none. */
static int signal_all(int number, const char *comm, const char *argument, int from)
{
	int found = 0;
	DIR *proc = opendir(PROC);
	for (struct dirent *entry; proc != NULL && (entry = readdir(proc)) != NULL;) {
		int pid = atoi(entry->d_name);
		if (pid >= from && matches(entry->d_name, comm, argument) && kill(pid, number) == 0)
			found++;
	}
	if (proc != NULL)
		closedir(proc);
	return found;
}

static int agent_pid(void)
{
	int found = -1;
	DIR *proc = opendir(PROC);
	for (struct dirent *entry; proc != NULL && (entry = readdir(proc)) != NULL;)
		if (atoi(entry->d_name) > 1 && matches(entry->d_name, "-", AGENT))
			found = atoi(entry->d_name);
	if (proc != NULL)
		closedir(proc);
	return found;
}

/* In a child, which sees what the agent sees. */
static void change_space(int fill)
{
	char root[64], size[64], block[4096] = {0};
	struct statfs space;
	snprintf(root, sizeof root, PROC "/%d/root", agent_pid());
	if (chroot(root) != 0 || chdir("/") != 0)
		_exit(1);
	if (!fill) {
		unlink("/run/saboteur");
		_exit(mount(NULL, "/run", NULL, MS_REMOUNT, "size=50%") != 0);
	}
	if (statfs("/run", &space) != 0)
		_exit(1);
	unsigned long used = (unsigned long)(space.f_blocks - space.f_bfree) * (unsigned long)space.f_bsize;
	snprintf(size, sizeof size, "size=%lu", used + 16 * sizeof block);
	if (mount(NULL, "/run", NULL, MS_REMOUNT, size) != 0)
		_exit(1);
	int fd = open("/run/saboteur", O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
	while (fd >= 0 && write(fd, block, sizeof block) > 0)
		;
	_exit(errno != ENOSPC);
}

static void serve(int connection)
{
	char line[256], comm[64], argument[128];
	int number, seconds, status;
	ssize_t length = read(connection, line, sizeof line - 1);
	line[length < 0 ? 0 : length] = '\0';
	if (sscanf(line, "SIGNAL %d %63s %127s %d", &number, comm, argument, &seconds) == 4) {
		/* crun is there for moments, and whatever it is that waits must not be late. Kernel threads are no candidates. */
		struct sched_param first = {.sched_priority = 1};
		sched_setscheduler(0, SCHED_FIFO, &first);
		int from = strcmp(comm, "-") == 0 ? 2 : agent_pid() + 1;
		while (signal_all(number, comm, argument, from) == 0)
			usleep(1000);
		dprintf(connection, "hit\n");
		if (seconds > 0) {
			sleep((unsigned)seconds);
			signal_all(SIGCONT, comm, argument, from);
		}
	} else if (strncmp(line, "FILL", 4) == 0 || strncmp(line, "FREE", 4) == 0) {
		pid_t child = fork();
		if (child == 0)
			change_space(line[1] == 'I');
		waitpid(child, &status, 0);
		dprintf(connection, "%s\n", status == 0 ? "hit" : "failed");
	}
	dprintf(connection, "done\n");
}

static void sabotage(void)
{
	struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_port = PORT, .svm_cid = VMADDR_CID_ANY};
	int listener;
	mkdir(PROC, 0755);
	if (mount("proc", PROC, "proc", 0, NULL) != 0)
		_exit(1);
	signal(SIGPIPE, SIG_IGN);
	/* The driver is loaded by the program that goes on beside us. */
	while ((listener = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0)) < 0 ||
	       bind(listener, (struct sockaddr *)&address, sizeof address) != 0) {
		if (listener >= 0)
			close(listener);
		usleep(20000);
	}
	if (listen(listener, 8) != 0)
		_exit(1);
	for (;;) {
		int connection = accept(listener, NULL, NULL);
		if (connection < 0)
			continue;
		if (fork() == 0) {
			serve(connection);
			_exit(0);
		}
		close(connection);
		while (waitpid(-1, NULL, WNOHANG) > 0)
			;
	}
}

int main(int count, char **arguments)
{
	(void)count;
	if (fork() == 0)
		sabotage();
	execv("/init.real", arguments);
	return 1;
}
