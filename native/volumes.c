/*
 * kiln-volumes: the file server of one sandbox. It speaks 9P2000.L with the guest's kernel over one connection, and
 * sees the sandbox's volumes and nothing else.
 *
 *   kiln-volumes serve ROOT_DIR [INDEX OPTIONS SOURCE]...    fd 3: status, fd 4: the connection
 *   kiln-volumes add [INDEX OPTIONS SOURCE]...               fd 3: status, fd 4: the server's mount namespace
 *   kiln-volumes remove [INDEX]...                           the same
 *
 * Each says "ready\n" on fd 3 when it is done with what follows, or "error: text", and exits 1. OPTIONS is "-" or some
 * of ro (the source, and not what is mounted below), rro (both), recursive, slave, with commas.
 *
 * serve clones the mounts of each SOURCE, makes itself namespaces in which they are all that there is (/INDEX each, in
 * a root that is read-only), drops every privilege that serving files does not need, and serves until the connection
 * ends. ROOT_DIR is any directory: the root is mounted there, in a mount namespace that nobody else sees.
 * add puts more volumes into the namespace of a server that runs, remove takes some out.
 *
 * What the guest has found is held by descriptor, and each name is one step from a directory that is held so: no path
 * is ever gone anew, no symbolic link followed. Who may do what is decided by the guest's kernel, which knows its users
 * and groups; the server does what it is asked to on the volumes, as the user that asks, whose number new files get.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "volumes.h"

#define STATUS_FD 3
#define OTHER_FD 4

void fail(const char *what, const char *which)
{
	dprintf(STATUS_FD, "error: %s %s: %s", what, which, strerror(errno));
	_exit(1);
}

static void __attribute__((noreturn)) usage(void)
{
	static const char text[] = "usage: kiln-volumes serve ROOT_DIR [INDEX OPTIONS SOURCE]... 3>STATUS 4<>CONNECTION\n"
				   "       kiln-volumes add [INDEX OPTIONS SOURCE]... 3>STATUS 4<MOUNT_NAMESPACE\n"
				   "       kiln-volumes remove [INDEX]... 3>STATUS 4<MOUNT_NAMESPACE\n";
	(void)!write(STDERR_FILENO, text, sizeof text - 1);
	_exit(2);
}

/* Nobody at the other end: kilnd died while it started us, so nobody would ever end us. */
static void say_ready(void)
{
	if (write(STATUS_FD, "ready\n", 6) != 6)
		_exit(1);
	close(STATUS_FD);
}

static struct volume *read_volumes(char **arguments, size_t count)
{
	struct volume *volumes = calloc(count / 3 + 1, sizeof *volumes);
	if (count % 3 != 0)
		usage();
	if (volumes == NULL)
		fail("cannot keep the", "volumes");
	for (size_t i = 0; i < count / 3; i++) {
		volumes[i] = (struct volume){arguments[3 * i], arguments[3 * i + 1], arguments[3 * i + 2], -1, false};
		clone_source(&volumes[i]);
	}
	return volumes;
}

static void set_signals(void)
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
	/* Without these descriptors the first files we opened would take their numbers. */
	if (count < 2 || fcntl(STATUS_FD, F_GETFD) < 0 || fcntl(OTHER_FD, F_GETFD) < 0)
		usage();
	if (close_range(OTHER_FD + 1, ~0u, 0) < 0)
		fail("cannot close the other", "descriptors");
	set_signals();
	umask(0); /* the guest's kernel has applied its own */

	if (strcmp(arguments[1], "add") == 0) {
		size_t words = (size_t)count - 2;
		add_to_export_root(OTHER_FD, read_volumes(arguments + 2, words), words / 3);
		say_ready();
		return 0;
	}
	if (strcmp(arguments[1], "remove") == 0) {
		remove_from_export_root(OTHER_FD, arguments + 2, (size_t)count - 2);
		say_ready();
		return 0;
	}
	if (strcmp(arguments[1], "serve") != 0 || count < 3)
		usage();
	size_t words = (size_t)count - 3;
	prctl(PR_SET_NAME, "kiln-volumes", 0, 0, 0);
	mallopt(M_ARENA_MAX, 1); /* one heap for all threads */
	allow_many_files();
	enter_export_root(arguments[2], read_volumes(arguments + 3, words), words / 3);
	drop_privileges();
	say_ready();
	serve(OTHER_FD, "/");
	return 0;
}
