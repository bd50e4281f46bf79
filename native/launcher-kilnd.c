/*
 * Finding the kilnd of this state folder, or starting it: the half of containerd-shim-kiln-v2 that is about processes.
 *
 * <state>/kilnd.sock    kilnd listens here; a refused or missing socket means that there is none
 * <state>/launch.lock   flock(2) held by the one launcher that starts kilnd; the others wait for it, then connect
 * <state>/kilnd.stderr  what kilnd, or node before it, says on stderr: a crash is not lost
 * kilnd starts with cwd /, stdin and stdout on /dev/null, a session of its own, no descriptor above 3, the few
 * environment variables named below, and oom_score_adj -999 where that is permitted. KILN_READY_FD=3 is a pipe on
 * which it writes "ready\n" once it accepts connections, or "error: text"; then it closes it.
 */
#define _GNU_SOURCE
#include "launcher.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#define SOCKET_PATH_LIMIT 107       /* sun_path without its NUL, unix(7) */
#define STDERR_FILE_LIMIT (1 << 20) /* bytes; a larger kilnd.stderr is moved aside before the next start */

char binary_dir[PATH_MAX];
static char state_dir[PATH_MAX], socket_path[PATH_MAX], stderr_path[PATH_MAX];

void find_paths(void)
{
	char self[PATH_MAX];
	ssize_t length = readlink("/proc/self/exe", self, sizeof self - 1); /* already free of symlinks */
	if (length < 0)
		fail("kiln: cannot read /proc/self/exe: %s", strerror(errno));
	self[length] = '\0';
	make_path(binary_dir, "%s", dirname(self));

	const char *from_environment = getenv("KILN_STATE_DIR");
	make_path(state_dir, "%s", from_environment && *from_environment ? from_environment : "/run/kiln");
	if (state_dir[0] != '/')
		fail("kiln: KILN_STATE_DIR is \"%s\", but must be an absolute path", state_dir);
	for (size_t end = strlen(state_dir); end > 1 && state_dir[end - 1] == '/'; end--)
		state_dir[end - 1] = '\0';
	make_path(socket_path, "%s/kilnd.sock", state_dir);
	make_path(stderr_path, "%s/kilnd.stderr", state_dir);
	if (strlen(socket_path) > SOCKET_PATH_LIMIT)
		fail("kiln: the socket path %s has %zu bytes, the system's limit is %d: choose a shorter KILN_STATE_DIR",
		     socket_path, strlen(socket_path), SOCKET_PATH_LIMIT);
}

void state_path(char *path, const char *name)
{
	make_path(path, "%s/%s", state_dir, name);
}

int lock_folder_of(const char *path)
{
	char folder[PATH_MAX];
	make_path(folder, "%s", path);
	int fd = open(dirname(folder), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (fd < 0)
		return -1;
	while (flock(fd, LOCK_EX) < 0)
		if (errno != EINTR) {
			close(fd);
			return -1;
		}
	return fd;
}

/* mkdir -p, and refuses a folder in which somebody else could put a socket of his own. */
static void make_state_dir(void)
{
	char path[PATH_MAX];
	struct stat status;
	make_path(path, "%s", state_dir);
	for (char *slash = strchr(path + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
		*slash = '\0';
		if (mkdir(path, 0755) < 0 && errno != EEXIST)
			fail("kiln: cannot make the folder %s: %s", path, strerror(errno));
		*slash = '/';
	}
	if (mkdir(state_dir, 0711) < 0 && errno != EEXIST)
		fail("kiln: cannot make the state folder %s: %s", state_dir, strerror(errno));
	if (lstat(state_dir, &status) < 0)
		fail("kiln: cannot look at the state folder %s: %s", state_dir, strerror(errno));
	if (!S_ISDIR(status.st_mode))
		fail("kiln: the state folder %s is not a folder", state_dir);
	if (status.st_uid != geteuid() || (status.st_mode & 022) != 0)
		fail("kiln: the state folder %s must belong to uid %u and be writable by nobody else (it has uid %u, mode %04o)",
		     state_dir, geteuid(), status.st_uid, status.st_mode & 07777);
}

/* Starting kilnd. */

static void __attribute__((noreturn)) fail_to_parent(int ready_fd, const char *what, const char *path)
{
	char text[PATH_MAX + 256];
	int length = snprintf(text, sizeof text, "error: kiln: %s %s: %s", what, path, strerror(errno));
	if (length > 0)
		write_all(ready_fd, text, (size_t)length < sizeof text ? (size_t)length : sizeof text - 1);
	_exit(127);
}

/* Only what kilnd is meant to hear: containerd's NODE_OPTIONS, proxies, TTRPC_ADDRESS … would bend it for ever. */
static char **kilnd_environment(void)
{
	static const char *const passed[] = {"PATH=", "HOME=", "LANG=", "TZ=", "KILN_"};
	static char state_variable[PATH_MAX + 16];
	size_t count = 0, kept = 0;
	while (environ[count])
		count++;
	char **result = calloc(count + 4, sizeof *result);
	if (result == NULL)
		fail("kiln: out of memory for the environment");
	for (size_t i = 0; i < count; i++) {
		if (strncmp(environ[i], "KILN_STATE_DIR=", 15) == 0 || strncmp(environ[i], "KILN_READY_FD=", 14) == 0)
			continue;
		for (size_t k = 0; k < sizeof passed / sizeof *passed; k++)
			if (strncmp(environ[i], passed[k], strlen(passed[k])) == 0)
				result[kept++] = environ[i];
	}
	if (getenv("PATH") == NULL)
		result[kept++] = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
	/* Set even when it is the default: both must mean the same folder, whatever kilnd's config file says. */
	snprintf(state_variable, sizeof state_variable, "KILN_STATE_DIR=%s", state_dir);
	result[kept++] = state_variable;
	result[kept] = "KILN_READY_FD=3";
	return result;
}

static void __attribute__((noreturn)) become_kilnd(int ready_fd, int stderr_fd, const char *path, char **environment)
{
	sigset_t none;
	for (int number = 1; number < NSIG; number++)
		signal(number, SIG_DFL);
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);

	/* kilnd serves every container of the host: the kernel should look for another victim. May be forbidden. */
	int score = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
	if (score >= 0)
		(void)!write(score, "-999", 4);

	int null = open("/dev/null", O_RDWR | O_CLOEXEC);
	if (null < 0)
		fail_to_parent(ready_fd, "cannot open", "/dev/null");
	if (chdir("/") < 0 || dup2(null, STDIN_FILENO) < 0 || dup2(null, STDOUT_FILENO) < 0 ||
	    dup2(stderr_fd >= 0 ? stderr_fd : null, STDERR_FILENO) < 0)
		fail_to_parent(ready_fd, "cannot set up", path);
	if (ready_fd == 3 ? fcntl(3, F_SETFD, 0) < 0 : dup2(ready_fd, 3) < 0)
		fail_to_parent(ready_fd, "cannot set up", path);
	if (syscall(SYS_close_range, 4u, ~0u, 0u) < 0) /* not left to O_CLOEXEC: others' descriptors may lack it */
		fail_to_parent(3, "cannot close the descriptors before", path);
	execve(path, (char *[]){(char *)path, NULL}, environment);
	fail_to_parent(3, "cannot run", path);
}

off_t stderr_size(void)
{
	struct stat status;
	return stat(stderr_path, &status) == 0 ? status.st_size : 0;
}

/* The end of what kilnd (or node itself) wrote to stderr since `from`, beginning at a whole UTF-8 character. */
void read_stderr_tail(char *tail, off_t from)
{
	ssize_t length = 0, skip = 0;
	int fd = open(stderr_path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
	if (fd >= 0) {
		off_t end = lseek(fd, 0, SEEK_END);
		if (from > end) /* moved aside since */
			from = 0;
		off_t start = end - from > STDERR_TAIL ? end - STDERR_TAIL : from;
		length = pread(fd, tail, STDERR_TAIL, start);
		close(fd);
	}
	if (length < 0)
		length = 0;
	while (length > 0 && strchr(" \n", tail[length - 1]))
		length--;
	while (skip < length && (tail[skip] & 0xc0) == 0x80)
		skip++;
	memmove(tail, tail + skip, (size_t)(length - skip));
	tail[length - skip] = '\0';
}

int dial(const char *path, int flags)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	struct ucred peer;
	socklen_t size = sizeof peer;
	if (strlen(path) > SOCKET_PATH_LIMIT) {
		errno = ENAMETOOLONG;
		return -1;
	}
	strcpy(address.sun_path, path);
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | flags, 0);
	if (fd < 0)
		return -1;
	bool connected = connect(fd, (struct sockaddr *)&address, sizeof address) == 0;
	if (connected && getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) == 0) {
		if (peer.uid == 0 || peer.uid == geteuid())
			return fd;
		errno = EPERM;
	}
	int problem = errno;
	close(fd);
	errno = problem;
	return -1;
}

/* A connected socket, or -1 when no kilnd listens. */
static int try_connect(void)
{
	int fd = dial(socket_path, 0);
	if (fd < 0 && errno == EPERM)
		fail("kiln: %s is served by a process of another user", socket_path);
	if (fd < 0 && errno != ENOENT && errno != ECONNREFUSED)
		fail("kiln: cannot connect to %s: %s", socket_path, strerror(errno));
	return fd;
}

/* A socket connected to a kilnd that has said "ready". Call with the launch lock held. */
static int start_kilnd(void)
{
	char path[PATH_MAX], aside[PATH_MAX];
	int ready[2];
	make_path(path, "%s/kilnd", binary_dir);
	make_path(aside, "%s.old", stderr_path);
	if (stderr_size() > STDERR_FILE_LIMIT)
		rename(stderr_path, aside);
	int stderr_fd = open(stderr_path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NOFOLLOW, 0600);
	off_t stderr_start = stderr_fd >= 0 ? lseek(stderr_fd, 0, SEEK_END) : 0;
	char **environment = kilnd_environment();
	if (pipe2(ready, O_CLOEXEC) < 0)
		fail("kiln: cannot make a pipe: %s", strerror(errno));

	/* Twice, so that kilnd is nobody's child here, leads no session and shares no group with what containerd kills. */
	pid_t child = fork();
	if (child == 0) {
		setsid();
		pid_t grandchild = fork();
		if (grandchild == 0)
			become_kilnd(ready[1], stderr_fd, path, environment);
		if (grandchild < 0)
			fail_to_parent(ready[1], "cannot make a process for", path);
		_exit(0);
	}
	if (child < 0)
		fail("kiln: cannot make a process for %s: %s", path, strerror(errno));
	close(ready[1]);
	if (stderr_fd >= 0)
		close(stderr_fd);
	while (waitpid(child, NULL, 0) < 0 && errno == EINTR)
		;

	static char answer[64 << 10];
	size_t length = 0;
	waiting_for = "kilnd to be ready (it is still starting; see kilnd.stderr and kilnd.log in the state folder)";
	while (length < sizeof answer - 1) {
		ssize_t count = read(ready[0], answer + length, sizeof answer - 1 - length);
		if (count < 0 && errno == EINTR)
			continue;
		if (count <= 0)
			break;
		length += (size_t)count;
		if (length >= 6 && memcmp(answer, "ready\n", 6) == 0)
			break;
	}
	close(ready[0]);
	/* Also after an error: it may be that a kilnd that systemd or a person started at the same time was first. */
	int fd = try_connect();
	if (fd >= 0)
		return fd;
	while (length > 0 && answer[length - 1] == '\n')
		length--;
	answer[length] = '\0';
	if (strcmp(answer, "ready") == 0)
		fail("kiln: kilnd said that it is ready but does not listen on %s", socket_path);
	if (strncmp(answer, "error: ", 7) == 0)
		fail("%s", answer + 7);
	char tail[STDERR_TAIL + 1];
	read_stderr_tail(tail, stderr_start);
	fail("kiln: %s ended during its start without saying why%s%s", path, *tail ? "; its last words: " : "", tail);
}

/* Sockets, directories and records of containers are gone, or never were; a folder that cannot be read may have some. */
static bool no_container_is_known(void)
{
	static const char *const names[] = {"s", "c", "t"}; /* as in src/daemon/daemon.ts */
	for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
		char path[PATH_MAX];
		state_path(path, names[i]);
		DIR *folder = opendir(path);
		if (folder == NULL && errno == ENOENT)
			continue;
		if (folder == NULL)
			return false;
		struct dirent *entry;
		do {
			errno = 0;
			entry = readdir(folder);
		} while (entry && (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0));
		bool empty = entry == NULL && errno == 0;
		closedir(folder);
		if (!empty)
			return false;
	}
	return true;
}

int connect_or_start(bool needed)
{
	char lock_path[PATH_MAX];
	waiting_for = "kilnd to accept a connection";
	int fd = try_connect();
	if (fd >= 0)
		return fd;
	if (!needed && no_container_is_known())
		return -1;
	make_state_dir();
	make_path(lock_path, "%s/launch.lock", state_dir);
	int lock = open(lock_path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
	if (lock < 0)
		fail("kiln: cannot open %s: %s", lock_path, strerror(errno));
	waiting_for = "another launcher that is starting kilnd";
	while (flock(lock, LOCK_EX) < 0)
		if (errno != EINTR)
			fail("kiln: cannot lock %s: %s", lock_path, strerror(errno));
	fd = try_connect(); /* whoever held the lock has most likely started it */
	if (fd < 0)
		fd = start_kilnd();
	close(lock);
	return fd;
}
