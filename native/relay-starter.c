/*
 * Starting kilnd from a relay, which must not wait and must not exit: a process aside goes the launcher's way
 * (connect_or_start), whose words on stdout, here a pipe, are why it failed. Any number of relays may do so at once.
 */
#define _GNU_SOURCE
#include "relay.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static pid_t starter;
static int words = -1; /* of the starter */
static char reason[1024] = "it does not answer";
static size_t reason_length;

int starter_fd(void)
{
	return words;
}

const char *why_no_kilnd(void)
{
	return reason;
}

void launch_starter(void)
{
	int ends[2];
	if (pipe2(ends, O_CLOEXEC) < 0)
		return;
	starter = fork();
	if (starter == 0) {
		/* containerd's connections must end with the relay, not with us. */
		if (dup2(ends[1], STDOUT_FILENO) < 0 || syscall(SYS_close_range, 3u, ~0u, 0u) < 0)
			_exit(1);
		start_time_limit();
		connect_or_start(true);
		_exit(0);
	}
	close(ends[1]);
	if (starter < 0) {
		close(ends[0]);
		return;
	}
	words = ends[0];
	reason_length = 0;
	snprintf(reason, sizeof reason, "it is still starting");
}

bool read_starter(void)
{
	char text[1024];
	ssize_t length = read(words, text, sizeof text);
	if (length < 0 && errno == EINTR)
		return false;
	if (length > 0) {
		size_t room = sizeof reason - 1 - reason_length;
		size_t taken = (size_t)length < room ? (size_t)length : room;
		memcpy(reason + reason_length, text, taken);
		reason_length += taken;
		reason[reason_length] = '\0';
		return false;
	}
	close(words);
	words = -1;
	while (waitpid(starter, NULL, 0) < 0 && errno == EINTR)
		;
	if (reason_length == 0)
		snprintf(reason, sizeof reason, "it was started and does not answer");
	return true;
}
