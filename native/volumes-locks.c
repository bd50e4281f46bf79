/*
 * Locks. Those of one guest are kept apart by its own kernel; here they are made known to the host and to other guests.
 *
 * A lock belongs to a process of the guest and a file, not to the fid that it came by: so for each such pair the file is
 * opened once more, and locked with open file description locks, which can be any ranges (fcntl(2), F_OFD_SETLK).
 * The protocol does not tell flock(2) from a lock of the whole file by fcntl(2). One of the whole file is taken both
 * ways, so that it is seen by whoever on the host uses either.
 * All that was locked by way of a fid is let go with it, as the closing of a file does.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

#include "volumes.h"

/* P9_LOCK_* of include/net/9p/9p.h. */
enum { READ_LOCK = 0, WRITE_LOCK = 1, UNLOCK = 2 };
enum { SUCCESS = 0, BLOCKED = 1, FAILED = 2 };
#define WAIT 1u

/* Each holds a thread. Beyond these the client is told to ask again. */
#define MAX_WAITING 32

struct owner {
	struct owner *next;
	dev_t device;
	ino_t inode;
	uint32_t process;
	char client[NAME_SIZE];
	const struct fid *by; /* by which it came; NULL once that is gone */
	unsigned users;	      /* threads at work with it */
	int file;
};

static struct {
	pthread_mutex_t lock;
	struct owner *first;
	unsigned waiting;
} owners = {.lock = PTHREAD_MUTEX_INITIALIZER};

struct wish {
	uint8_t type;
	uint32_t flags;
	uint64_t start, length; /* 0: to the end */
	uint32_t process;
	char client[NAME_SIZE];
};

static struct flock range_of(const struct wish *wish)
{
	return (struct flock){
		.l_type = wish->type == READ_LOCK ? F_RDLCK : wish->type == WRITE_LOCK ? F_WRLCK : F_UNLCK,
		.l_whence = SEEK_SET,
		.l_start = (off_t)wish->start,
		.l_len = (off_t)wish->length,
	};
}

static bool is_whole(const struct wish *wish)
{
	return wish->start == 0 && wish->length == 0;
}

static struct owner *find_owner(const struct stat *stat, const struct wish *wish)
{
	for (struct owner *owner = owners.first; owner != NULL; owner = owner->next)
		if (owner->by != NULL && owner->inode == stat->st_ino && owner->device == stat->st_dev &&
		    owner->process == wish->process && strcmp(owner->client, wish->client) == 0)
			return owner;
	return NULL;
}

static void remove_if_unused(struct owner *owner)
{
	struct owner **place = &owners.first;
	if (owner->by != NULL || owner->users > 0)
		return;
	while (*place != owner)
		place = &(*place)->next;
	*place = owner->next;
	close(owner->file);
	free(owner);
}

/* A file that cannot be written to can have flock(2)'s locks of both kinds, but no write lock of a range. */
static int open_for_locks(const struct node *node)
{
	struct node_path path = path_of(node);
	int file = node->read_only ? -1 : open(path.text, O_RDWR | O_CLOEXEC | O_NONBLOCK);
	return file >= 0 ? file : open(path.text, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
}

/* NULL and errno. With `make` there is one afterwards. */
static struct owner *use_owner(const struct fid *fid, const struct wish *wish, bool make)
{
	struct stat stat;
	if (fstat(fid->node->fd, &stat) < 0)
		return NULL;
	errno = 0;
	pthread_mutex_lock(&owners.lock);
	struct owner *owner = find_owner(&stat, wish);
	if (owner == NULL && make) {
		owner = malloc(sizeof *owner);
		if (owner != NULL) {
			*owner = (struct owner){owners.first, stat.st_dev, stat.st_ino, wish->process, "", fid, 0, -1};
			strcpy(owner->client, wish->client);
			owner->file = open_for_locks(fid->node);
			if (owner->file < 0) {
				free(owner);
				owner = NULL;
			} else {
				owners.first = owner;
			}
		}
	}
	if (owner != NULL)
		owner->users++;
	pthread_mutex_unlock(&owners.lock);
	return owner;
}

static void end_use(struct owner *owner, bool has_none)
{
	pthread_mutex_lock(&owners.lock);
	owner->users--;
	if (has_none)
		owner->by = NULL;
	remove_if_unused(owner);
	pthread_mutex_unlock(&owners.lock);
}

void release_locks(const struct fid *fid)
{
	if (fid->file < 0)
		return;
	pthread_mutex_lock(&owners.lock);
	for (struct owner *owner = owners.first, *next; owner != NULL; owner = next) {
		next = owner->next;
		if (owner->by != fid)
			continue;
		owner->by = NULL;
		remove_if_unused(owner);
	}
	pthread_mutex_unlock(&owners.lock);
}

static bool begin_waiting(void)
{
	pthread_mutex_lock(&owners.lock);
	bool allowed = owners.waiting < MAX_WAITING;
	if (allowed)
		owners.waiting++;
	pthread_mutex_unlock(&owners.lock);
	return allowed;
}

static void end_waiting(void)
{
	pthread_mutex_lock(&owners.lock);
	owners.waiting--;
	pthread_mutex_unlock(&owners.lock);
}

/* 0 or errno. */
static int take(const struct owner *owner, const struct wish *wish, bool wait)
{
	struct flock range = range_of(wish);
	bool whole = is_whole(wish);
	int kind = wish->type == WRITE_LOCK ? LOCK_EX : LOCK_SH;
	if (whole && flock(owner->file, kind | (wait ? 0 : LOCK_NB)) < 0)
		return errno;
	if (fcntl(owner->file, wait ? F_OFD_SETLKW : F_OFD_SETLK, &range) == 0)
		return 0;
	int error = errno;
	if (whole && error == EBADF)
		return 0;
	if (whole)
		flock(owner->file, LOCK_UN);
	return error;
}

static int release(const struct owner *owner, const struct wish *wish)
{
	struct flock range = range_of(wish);
	if (is_whole(wish))
		flock(owner->file, LOCK_UN);
	return fcntl(owner->file, F_OFD_SETLK, &range) < 0 ? errno : 0;
}

static int get_wish(struct request *request, struct wish *wish, bool with_flags)
{
	wish->type = get8(request);
	wish->flags = with_flags ? get32(request) : 0;
	wish->start = get64(request);
	wish->length = get64(request);
	wish->process = get32(request);
	int error = get_text(request, wish->client, sizeof wish->client);
	if (error != 0 || request->malformed || wish->type > UNLOCK)
		return EINVAL;
	return wish->start > INT64_MAX || wish->length > INT64_MAX - wish->start ? EINVAL : 0;
}

int handle_lock(struct request *request)
{
	struct wish wish;
	struct fid *fid HELD = share_fid(get32(request));
	int error = get_wish(request, &wish, true);
	if (error != 0)
		return error;
	if (fid == NULL || fid->file < 0)
		return EBADF;
	act_as_root();
	struct owner *owner = use_owner(fid, &wish, wish.type != UNLOCK);
	if (owner == NULL) {
		put8(request, wish.type == UNLOCK ? SUCCESS : FAILED);
		return errno == 0 ? 0 : errno;
	}
	if (wish.type == UNLOCK) {
		error = release(owner, &wish);
		end_use(owner, is_whole(&wish));
	} else {
		bool wait = (wish.flags & WAIT) != 0 && begin_waiting();
		error = take(owner, &wish, wait);
		if (wait)
			end_waiting();
		end_use(owner, false);
	}
	if (error == EINTR)
		return EINTR;
	put8(request, error == 0 ? SUCCESS : error == EWOULDBLOCK || error == EACCES ? BLOCKED : FAILED);
	return 0;
}

int handle_getlock(struct request *request)
{
	struct wish wish;
	struct fid *fid HELD = share_fid(get32(request));
	int error = get_wish(request, &wish, false);
	if (error != 0)
		return error;
	if (fid == NULL || fid->file < 0)
		return EBADF;
	/* Linux's client asks without saying for which lock (fs/9p/vfs_file.c): only what is in the way of both is told. */
	bool for_any = wish.type == UNLOCK;
	if (for_any)
		wish.type = WRITE_LOCK;
	struct flock range = range_of(&wish);
	struct owner *owner = use_owner(fid, &wish, false);
	error = fcntl(owner == NULL ? fid->file : owner->file, F_OFD_GETLK, &range) < 0 ? errno : 0;
	if (owner != NULL)
		end_use(owner, false);
	if (error != 0)
		return error;
	bool is_free = range.l_type == F_UNLCK || (for_any && range.l_type == F_RDLCK);
	put8(request, is_free ? UNLOCK : range.l_type == F_RDLCK ? READ_LOCK : WRITE_LOCK);
	put64(request, is_free ? wish.start : (uint64_t)range.l_start);
	put64(request, is_free ? wish.length : (uint64_t)range.l_len);
	put32(request, is_free ? wish.process : 0); /* whoever it is, no process of this guest */
	put_text(request, wish.client);
	return 0;
}
