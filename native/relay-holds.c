/*
 * FIFOs that stay open while kilnd is away. containerd's FIFOs end for their other side (EOF, EPIPE) when the last
 * descriptor of this side is closed; one that the relay holds open for reading and writing does not, whoever else comes
 * and goes. What is in a FIFO's buffer stays there for the next kilnd.
 */
#define _GNU_SOURCE
#include "relay.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* Three of a container and three of each exec: far beyond what runs in one container, far below fs.nr_open. */
#ifndef HOLD_LIMIT
#define HOLD_LIMIT 4096
#endif

struct hold {
	struct hold *next;
	int fd;
	dev_t device;
	ino_t inode;
	char path[];
};

static struct hold *holds;
static size_t hold_count;

static struct hold **find_hold(const char *path)
{
	struct hold **at = &holds;
	while (*at && strcmp((*at)->path, path) != 0)
		at = &(*at)->next;
	return at;
}

void release_fifo(const char *path)
{
	struct hold **at = find_hold(path), *hold = *at;
	if (hold == NULL)
		return;
	*at = hold->next;
	close(hold->fd);
	free(hold);
	hold_count--;
}

/* Looked at before it is opened: to open a device can do things. */
static int open_fifo(const char *path, struct stat *status)
{
	if (stat(path, status) < 0)
		return -1;
	if (S_ISFIFO(status->st_mode)) {
		int fd = open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC | O_NOCTTY);
		if (fd < 0 || (fstat(fd, status) == 0 && S_ISFIFO(status->st_mode)))
			return fd;
		close(fd);
	}
	errno = ENOSTR;
	return -1;
}

const char *hold_fifo(const char *path)
{
	struct stat status;
	struct hold *known = *find_hold(path);
	if (path[0] != '/')
		return "the path is not absolute";
	/* Another FIFO may have taken the path since. */
	if (known && stat(path, &status) == 0 && status.st_dev == known->device && status.st_ino == known->inode)
		return NULL;
	release_fifo(path);
	if (hold_count >= HOLD_LIMIT)
		return "too many FIFOs are held";
	int fd = open_fifo(path, &status);
	if (fd < 0)
		return errno == ENOSTR ? "it is not a FIFO" : strerror(errno);
	struct hold *hold = malloc(sizeof *hold + strlen(path) + 1);
	if (hold == NULL) {
		close(fd);
		return "out of memory";
	}
	*hold = (struct hold){.next = holds, .fd = fd, .device = status.st_dev, .inode = status.st_ino};
	strcpy(hold->path, path);
	holds = hold;
	hold_count++;
	return NULL;
}
