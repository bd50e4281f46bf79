/*
 * The socket file of a relay, which the launcher makes and a relay removes. Both, and kilnd when it clears dead sockets
 * (src/daemon/dead-sockets.ts), hold the lock of the folder meanwhile: between looking at a file and acting on it, another
 * could put its own there.
 */
#define _GNU_SOURCE
#include "relay.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define BACKLOG 128 /* connections that wait; a containerd makes one or two */

static const char *path;
static struct stat ours;

static bool is_served(void)
{
	int fd = dial(path, SOCK_NONBLOCK);
	if (fd < 0)
		return errno == EAGAIN; /* more wait there than it can take at once */
	close(fd);
	return true;
}

int listen_unless_served(const char *socket_path, int *lock)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	path = socket_path;
	if (strlen(path) >= sizeof address.sun_path)
		fail("kiln: the socket path %s is too long", path);
	strcpy(address.sun_path, path);
	waiting_for = "another launcher that makes a socket";
	*lock = lock_folder_of(path);
	if (*lock < 0)
		fail("kiln: cannot lock the folder of %s: %s", path, strerror(errno));
	if (is_served())
		return -1;
	unlink(path);
	int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	mode_t mask = umask(0177);
	if (listener < 0 || bind(listener, (struct sockaddr *)&address, sizeof address) < 0 || stat(path, &ours) < 0 ||
	    listen(listener, BACKLOG) < 0)
		fail("kiln: cannot listen on %s: %s", path, strerror(errno));
	umask(mask);
	return listener;
}

/* By its inode, which nobody else gets while our socket is open. */
bool socket_is_ours(void)
{
	struct stat status;
	return stat(path, &status) == 0 && status.st_dev == ours.st_dev && status.st_ino == ours.st_ino;
}

void remove_socket(int listener)
{
	if (listener < 0)
		return;
	int lock = lock_folder_of(path);
	if (socket_is_ours()) /* after a delete the path may already be another relay's */
		unlink(path);
	if (lock >= 0)
		close(lock);
	close(listener);
}
