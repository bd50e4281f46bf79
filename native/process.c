/*
 * kiln-process: the process on the host that is, to whoever calls Kiln as an OCI runtime, a process of a container.
 *
 *   kiln-process fg|bg NETNS_PATH|-|= ROOT DIR SOCKET ID EXEC_ID none|own|CONSOLE_SOCKET    fd 3: a socket to the caller
 *
 * conmon, Docker's shim and their like start the runtime, and then have the pid that it names for their own child: they
 * wait for it, read its exit code, send it signals, and have given it its stdio. The real one is in a microVM. This one
 *   - is a child of the caller's subreaper ("bg": forked, and left by its parent), or of the caller ("fg");
 *   - carries its own stdio to and from three FIFOs in DIR (stdin, stdout, stderr), whose other ends are kilnd's;
 *     or a terminal: its own, or a new one whose master goes to CONSOLE_SOCKET (SCM_RIGHTS, as runc's);
 *   - sends every signal that it gets to the container (Kill), and its terminal's size (ResizePty);
 *   - ends when the container's has ended and its output is written, with the same exit status;
 *   - shows nothing of the host: network namespace, no capabilities, as kiln-standin (standin.c). "=" leaves the network
 *     namespace as it is: an exec has none of its own. Its root is the container's root filesystem, which is on the host
 *     too: who looks for files through /proc/PID/root, as `podman cp` does, finds them.
 * On fd 3 it says "ready PID\n" or "error: text", and waits for "go": then the process exists in kilnd, and is followed.
 * Without "go" it ends, because its caller has.
 */
#define _GNU_SOURCE
#include "process.h"
#include "standin.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <termios.h>
#include <unistd.h>

/* How long output may still come after the exit was told, in ms; kilnd has delivered it before. */
#define OUTPUT_LIMIT_MS 10000
/*
 * How long an output that has ended stays open for those who read it, in ms. A process's outputs end with it, and callers
 * take the one for the other: conmon's own would be told of the end of both at once.
 */
#define OUTPUT_LINGER_MS 1000
/* How long kilnd may take to forget an exec, in ms. */
#define DELETE_LIMIT_MS 2000

static struct stream in = {.from = -1, .to = -1}, out = {.from = -1, .to = -1}, err = {.from = -1, .to = -1};
static int stdin_reader = -1;
static struct task task = {.fd = -1, .next_stream = 1};
/* The end of a terminal that is ours, or -1; what it was like before, if somebody else uses it after us. */
static int terminal = -1;
static struct termios before;
static bool restore;

static void leave_terminal(void)
{
	if (restore)
		tcsetattr(terminal, TCSADRAIN, &before);
}

static int fifo(const char *directory, const char *name, int flags)
{
	char path[PATH_MAX];
	int length = snprintf(path, sizeof path, "%s/%s", directory, name);
	if (length < 0 || length >= (int)sizeof path) {
		errno = ENAMETOOLONG;
		fail("cannot make a FIFO in", directory);
	}
	if (mkfifo(path, 0600) < 0 && errno != EEXIST)
		fail("cannot make the FIFO", path);
	/* O_NONBLOCK: the other end is not there yet. */
	int fd = open(path, flags | O_NONBLOCK | O_CLOEXEC | O_NOFOLLOW);
	if (fd < 0)
		fail("cannot open the FIFO", path);
	return fd;
}

static int duplicate(int fd)
{
	int copy = fcntl(fd, F_DUPFD_CLOEXEC, STATUS_FD + 1);
	if (copy < 0)
		fail("cannot keep a", "descriptor");
	return copy;
}

/* The guest's terminal does what a terminal does; ours only carries the bytes. */
static void make_raw(int fd)
{
	struct termios raw;
	if (tcgetattr(fd, &before) < 0)
		fail("cannot use the", "terminal");
	raw = before;
	cfmakeraw(&raw);
	if (tcsetattr(fd, TCSANOW, &raw) < 0)
		fail("cannot set the", "terminal");
}

/* As runc's utils.SendFile: one message with the terminal's name, and its master. */
static void send_master(const char *path, int master, const char *name)
{
	struct iovec data = {.iov_base = (void *)name, .iov_len = strlen(name)};
	char control[CMSG_SPACE(sizeof master)] = {0};
	struct msghdr message = {
		.msg_iov = &data, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
	struct cmsghdr *head = CMSG_FIRSTHDR(&message);
	head->cmsg_level = SOL_SOCKET;
	head->cmsg_type = SCM_RIGHTS;
	head->cmsg_len = CMSG_LEN(sizeof master);
	memcpy(CMSG_DATA(head), &master, sizeof master);
	int fd = connect_task(path);
	if (fd < 0)
		fail("cannot connect to the console socket", path);
	if (sendmsg(fd, &message, MSG_NOSIGNAL) < 0)
		fail("cannot send the terminal to the console socket", path);
	close(fd);
}

static void open_terminal(const char *console)
{
	char name[64];
	unsigned number;
	int unlocked = 0;
	int master = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC);
	if (master < 0 || ioctl(master, TIOCSPTLCK, &unlocked) < 0 || ioctl(master, TIOCGPTN, &number) < 0)
		fail("cannot make a", "terminal");
	terminal = ioctl(master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
	if (terminal < 0)
		fail("cannot open the new", "terminal");
	make_raw(terminal);
	/* Its size and its hang-up come to us as signals. */
	if (ioctl(terminal, TIOCSCTTY, 0) < 0)
		fail("cannot make mine the new", "terminal");
	snprintf(name, sizeof name, "/dev/pts/%u", number);
	send_master(console, master, name);
	close(master);
}

static void open_stdio(const char *directory, const char *kind)
{
	/* Ours to the end: without a reader nobody could open it for writing, and kilnd comes only with the start. */
	stdin_reader = fifo(directory, "stdin", O_RDONLY);
	in.to = fifo(directory, "stdin", O_WRONLY);
	out.from = fifo(directory, "stdout", O_RDONLY);
	if (strcmp(kind, "none") == 0) {
		err.from = fifo(directory, "stderr", O_RDONLY);
		in.from = duplicate(STDIN_FILENO);
		out.to = duplicate(STDOUT_FILENO);
		err.to = duplicate(STDERR_FILENO);
		return;
	}
	err.ended = true;
	if (strcmp(kind, "own") == 0) {
		terminal = duplicate(STDIN_FILENO);
		make_raw(terminal);
		restore = true;
	} else
		open_terminal(kind);
	in.from = duplicate(terminal);
	out.to = restore ? duplicate(STDOUT_FILENO) : duplicate(terminal);
}

static void tell_size(void)
{
	struct winsize size;
	if (terminal >= 0 && ioctl(terminal, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 && size.ws_row > 0)
		send_resize(&task, size.ws_col, size.ws_row);
}

static void on_signal(int fd)
{
	struct signalfd_siginfo info;
	if (read(fd, &info, sizeof info) != (ssize_t)sizeof info)
		return;
	if (info.ssi_signo == SIGWINCH && terminal >= 0)
		tell_size();
	else
		send_kill(&task, info.ssi_signo);
}

/* Until the process in the guest has ended, and all that it wrote is written. */
static int follow(int signals)
{
	int status = 0;
	bool ended = false;
	send_wait(&task);
	tell_size();
	while (!ended || (out.to >= 0 && !is_done(&out)) || (err.to >= 0 && !is_done(&err))) {
		bool lingers = is_done(&out) || is_done(&err);
		int limit = ended ? OUTPUT_LIMIT_MS : lingers ? OUTPUT_LINGER_MS : -1;
		struct pollfd fds[] = {
			{.fd = ended ? -1 : signals, .events = POLLIN},
			{.fd = ended ? -1 : task.fd, .events = POLLIN},
			{.fd = reads_wanted(&in) && !ended ? in.from : -1, .events = POLLIN},
			{.fd = writes_wanted(&in) && !ended ? in.to : -1, .events = POLLOUT},
			{.fd = reads_wanted(&out) ? out.from : -1, .events = POLLIN},
			{.fd = writes_wanted(&out) ? out.to : -1, .events = POLLOUT},
			{.fd = reads_wanted(&err) ? err.from : -1, .events = POLLIN},
			{.fd = writes_wanted(&err) ? err.to : -1, .events = POLLOUT},
		};
		int count = poll(fds, sizeof fds / sizeof *fds, limit);
		if (count < 0 && errno == EINTR)
			continue;
		if (count <= 0 && ended)
			break;
		if (count <= 0) {
			/* It has closed them, and goes on. */
			if (is_done(&out))
				close_end(&out);
			if (is_done(&err))
				close_end(&err);
			continue;
		}
		if (fds[0].revents)
			on_signal(signals);
		if (fds[1].revents && read_exit(&task, &status))
			ended = true;
		carry(&in, fds[2].revents, fds[3].revents);
		if (is_done(&in)) {
			close_end(&in);
			send_stdin_end(&task);
		}
		carry(&out, fds[4].revents, fds[5].revents);
		carry(&err, fds[6].revents, fds[7].revents);
	}
	return status;
}

/* Nobody else would: the command that has started it is long gone. */
static void forget_exec(void)
{
	struct pollfd fds = {.fd = task.fd, .events = POLLIN};
	int status;
	send_delete(&task);
	while (poll(&fds, 1, DELETE_LIMIT_MS) > 0 && !read_exit(&task, &status))
		;
}

static int take_signals(void)
{
	sigset_t all;
	struct sigaction plain = {.sa_handler = SIG_DFL};
	for (int number = 1; number < NSIG; number++)
		sigaction(number, &plain, NULL);
	signal(SIGPIPE, SIG_IGN);
	signal(SIGCHLD, SIG_IGN);
	sigfillset(&all);
	/* What the kernel sends for a fault of ours, or stops us by, is not for the container. */
	const int ours[] = {SIGPIPE, SIGCHLD, SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT, SIGTTIN, SIGTTOU};
	for (size_t i = 0; i < sizeof ours / sizeof *ours; i++)
		sigdelset(&all, ours[i]);
	sigprocmask(SIG_SETMASK, &all, NULL);
	int fd = signalfd(-1, &all, SFD_CLOEXEC | SFD_NONBLOCK);
	if (fd < 0)
		fail("cannot take", "signals");
	return fd;
}

/* What the caller has open may be what others wait for the end of. */
static void close_others(int signals)
{
	const int kept[] = {signals, task.fd, terminal, stdin_reader, in.from, in.to,
			    out.from, out.to, err.from, err.to};
	int last = STATUS_FD;
	for (size_t i = 0; i < sizeof kept / sizeof *kept; i++)
		if (kept[i] > last)
			last = kept[i];
	for (int fd = 0; fd <= last; fd++) {
		bool keep = fd == STATUS_FD;
		for (size_t i = 0; i < sizeof kept / sizeof *kept; i++)
			keep = keep || kept[i] == fd;
		if (!keep)
			close(fd);
	}
	syscall(SYS_close_range, (unsigned)last + 1, ~0u, 0u);
}

static void wait_for_go(void)
{
	char text[32], go[3];
	size_t length = (size_t)snprintf(text, sizeof text, "ready %d\n", getpid());
	if (write(STATUS_FD, text, length) != (ssize_t)length)
		_exit(1);
	for (size_t got = 0; got < sizeof go;) {
		ssize_t count = read(STATUS_FD, go + got, sizeof go - got);
		if (count < 0 && errno == EINTR)
			continue;
		if (count <= 0) {
			leave_terminal();
			_exit(1);
		}
		got += (size_t)count;
	}
	close(STATUS_FD);
}

int main(int count, char **arguments)
{
	if (count != 9 || fcntl(STATUS_FD, F_GETFD) < 0) {
		static const char usage[] =
			"usage: kiln-process fg|bg NETNS_PATH|-|= ROOT DIR SOCKET ID EXEC_ID none|own|CONSOLE_SOCKET 3<>STATUS\n";
		(void)!write(STDERR_FILENO, usage, sizeof usage - 1);
		return 2;
	}
	const char *network = arguments[2], *root = arguments[3], *directory = arguments[4];
	bool background = strcmp(arguments[1], "bg") == 0;
	if (background) {
		pid_t child = fork();
		if (child < 0)
			fail("cannot make a", "process");
		if (child > 0)
			_exit(0);
		(void)setsid();
	}
	if (prctl(PR_SET_NAME, "kiln-process", 0, 0, 0) < 0)
		fail("cannot set the", "process name");
	task.id = arguments[6];
	task.exec_id = arguments[7];
	if (strlen(task.id) > 76 || strlen(task.exec_id) > 76) {
		errno = ENAMETOOLONG;
		fail("cannot follow", task.id);
	}
	int signals = take_signals();
	task.fd = connect_task(arguments[5]);
	if (task.fd < 0)
		fail("cannot connect to", arguments[5]);
	open_stdio(directory, arguments[8]);

	if (strcmp(network, "-") == 0)
		make_netns();
	else if (strcmp(network, "=") != 0)
		join_netns(network);
	enter_container_root(root);
	drop_privileges();
	close_others(signals);
	wait_for_go();
	int status = follow(signals);
	if (*task.exec_id)
		forget_exec();
	leave_terminal();
	return status;
}
