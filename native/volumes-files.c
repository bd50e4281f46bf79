/*
 * Files that are open: what a fid is after Tlopen or Tlcreate.
 *
 * A file is opened anew from its node, so it is the one that was walked to, whatever its name is now. Only regular files
 * and directories are opened; FIFOs, sockets and devices are the guest's kernel's own affair.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "volumes.h"

/* The flags of the protocol (include/net/9p/9p.h, P9_DOTL_*), which are those of Linux on x86. */
#define L_ACCESS 3u
#define L_EXCL 0200u
#define L_TRUNC 01000u
#define L_APPEND 02000u
#define L_DSYNC 010000u
#define L_DIRECTORY 0200000u
#define L_SYNC 04000000u

static int open_flags(uint32_t flags)
{
	int result = (int)(flags & L_ACCESS) | O_CLOEXEC | O_NOCTTY | O_NOFOLLOW | O_NONBLOCK;
	if (flags & L_TRUNC)
		result |= O_TRUNC;
	if (flags & L_APPEND)
		result |= O_APPEND;
	if (flags & L_DSYNC)
		result |= O_DSYNC;
	if (flags & L_SYNC)
		result |= O_SYNC;
	return result;
}

static bool writes(uint32_t flags)
{
	return (flags & L_ACCESS) != O_RDONLY || (flags & L_TRUNC) != 0;
}

static void put_opened(struct request *request, const struct stat *stat)
{
	put_qid(request, stat);
	put32(request, 0); /* iounit: whatever fits into a message */
}

int handle_lopen(struct request *request)
{
	struct stat stat;
	struct fid *fid HELD = own_fid(get32(request));
	uint32_t flags = get32(request);
	if (fid == NULL || fid->file >= 0 || fid->xattr != NULL || (flags & L_ACCESS) == L_ACCESS)
		return EBADF;
	if (request->malformed)
		return EINVAL;
	bool directory = S_ISDIR(fid->node->mode);
	if (!directory && !S_ISREG(fid->node->mode))
		return S_ISLNK(fid->node->mode) ? ELOOP : EACCES;
	if (!directory && (flags & L_DIRECTORY))
		return ENOTDIR;
	if (directory && writes(flags))
		return EISDIR;
	if (fid->node->read_only && writes(flags))
		return EROFS;
	/* Of which the last is a symbolic link of /proc, and has to be followed. */
	int how = open_flags(flags) & ~O_NOFOLLOW;
	act_as(fid->uid, 0);
	int file = open(path_of(fid->node).text, directory ? O_RDONLY | O_DIRECTORY | O_CLOEXEC : how);
	if (file < 0)
		return errno;
	if (fstat(file, &stat) < 0) {
		close(file);
		return EIO;
	}
	fid->file = file;
	fid->access = how & O_ACCMODE;
	fid->position = 0;
	put_opened(request, &stat);
	return 0;
}

/* What is there already is looked at before it is opened: to open a FIFO or a device can be to do something. */
static int create(const struct node *directory, const char *name, int how, mode_t mode, bool exclusive)
{
	struct stat stat;
	int file = openat(directory->fd, name, how | O_CREAT | O_EXCL, mode);
	if (file >= 0 || exclusive || errno != EEXIST)
		return file;
	int found = openat(directory->fd, name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
	if (found < 0)
		return -1;
	struct node node = {.fd = found};
	int error = fstat(found, &stat) < 0 ? errno : S_ISREG(stat.st_mode) ? 0 : S_ISDIR(stat.st_mode) ? EISDIR
			: S_ISLNK(stat.st_mode) ? ELOOP : EACCES;
	if (error == 0) {
		file = open(path_of(&node).text, how & ~O_NOFOLLOW);
		error = errno;
	}
	close(found);
	errno = error;
	return file;
}

/* Also opens a file that somebody on the host has made meanwhile, unless the guest wants it to be new. */
int handle_lcreate(struct request *request)
{
	char name[NAME_SIZE];
	struct stat stat;
	struct fid *fid HELD = own_fid(get32(request));
	int error = get_name(request, name);
	uint32_t flags = get32(request), mode = get32(request);
	gid_t gid = get_gid(request);
	if (fid == NULL || fid->file >= 0 || fid->xattr != NULL || (flags & L_ACCESS) == L_ACCESS)
		return EBADF;
	if (request->malformed || error != 0)
		return error != 0 ? error : EINVAL;
	if (!S_ISDIR(fid->node->mode))
		return ENOTDIR;
	if (fid->node->read_only)
		return EROFS;
	int how = open_flags(flags);
	act_as(fid->uid, gid);
	int file = create(fid->node, name, how, mode & 07777, (flags & L_EXCL) != 0);
	if (file < 0)
		return errno;
	int fd = fcntl(file, F_DUPFD_CLOEXEC, 0);
	struct node *node = fd < 0 ? NULL : make_node(fid->node, fd, &stat);
	if (node == NULL) {
		error = errno;
		close(file);
		return error;
	}
	drop_node(fid->node);
	fid->node = node;
	fid->file = file;
	fid->access = how & O_ACCMODE;
	put_opened(request, &stat);
	return 0;
}

static int read_xattr(struct request *request, const struct xattr *xattr, uint64_t offset, size_t count)
{
	if (xattr->writing)
		return EBADF;
	if (offset > xattr->size)
		offset = xattr->size;
	if (count > xattr->size - offset)
		count = xattr->size - offset;
	put32(request, (uint32_t)count);
	put_bytes(request, xattr->value + offset, count);
	return 0;
}

int handle_read(struct request *request)
{
	struct fid *fid HELD = share_fid(get32(request));
	uint64_t offset = get64(request);
	size_t count = get32(request);
	if (fid == NULL || (fid->file < 0 && fid->xattr == NULL))
		return EBADF;
	if (count > room(request) - 4)
		count = room(request) - 4;
	if (fid->xattr != NULL)
		return read_xattr(request, fid->xattr, offset, count);
	if (offset > INT64_MAX)
		return EINVAL;
	size_t length = request->length;
	ssize_t got = pread(fid->file, request->out + length + 4, count, (off_t)offset);
	if (got < 0)
		return errno;
	put32(request, (uint32_t)got);
	request->length += (size_t)got;
	return 0;
}

static int write_xattr(struct xattr *xattr, const uint8_t *bytes, uint64_t offset, size_t count)
{
	if (!xattr->writing || offset != xattr->filled || count > xattr->size - xattr->filled)
		return EINVAL;
	memcpy(xattr->value + xattr->filled, bytes, count);
	xattr->filled += count;
	return 0;
}

/* As who opened it: a file that belongs to another loses its setuid bit when it is written to. */
int handle_write(struct request *request)
{
	uint32_t number = get32(request);
	uint64_t offset = get64(request);
	size_t count = get32(request);
	if (request->malformed || count > request->left)
		return EINVAL;
	struct fid *fid HELD = share_fid(number);
	if (fid == NULL || (fid->file < 0 && fid->xattr == NULL))
		return EBADF;
	if (fid->xattr != NULL) {
		/* One at a time, or two would both find room for what only one has. Once there, it stays as long as the fid. */
		pthread_rwlock_unlock(&fid->lock);
		pthread_rwlock_wrlock(&fid->lock);
		int error = write_xattr(fid->xattr, request->in, offset, count);
		put32(request, (uint32_t)count);
		return error;
	}
	if (offset > INT64_MAX)
		return EINVAL;
	act_as(fid->uid, 0);
	ssize_t wrote = pwrite(fid->file, request->in, count, (off_t)offset);
	if (wrote < 0)
		return errno;
	put32(request, (uint32_t)wrote);
	return 0;
}

/* As the protocol has it, and 4 bytes longer at most than struct linux_dirent64. */
#define ENTRY_SIZE(length) (13 + 8 + 1 + 2 + (length))

struct entry {
	uint64_t inode;
	int64_t next;
	uint16_t size;
	uint8_t type;
	char name[];
};

int handle_readdir(struct request *request)
{
	char entries[32 * 1024] __attribute__((aligned(8)));
	struct stat stat;
	struct fid *fid HELD = own_fid(get32(request));
	uint64_t offset = get64(request);
	size_t count = get32(request);
	if (fid == NULL || fid->file < 0)
		return EBADF;
	if (!S_ISDIR(fid->node->mode))
		return ENOTDIR;
	if (request->malformed || offset > INT64_MAX)
		return EINVAL;
	if (count > room(request) - 4)
		count = room(request) - 4;
	if (fstat(fid->file, &stat) < 0)
		return errno;
	if (offset != fid->position && lseek(fid->file, (off_t)offset, SEEK_SET) < 0)
		return errno;
	fid->position = offset;
	size_t start = request->length, used = 0;
	put32(request, 0);
	for (;;) {
		/* A name of 4 bytes makes 24 bytes of these and 28 of the protocol's; so all that is got will fit. */
		size_t wanted = (count - used) / 28 * 24;
		if (wanted > sizeof entries)
			wanted = sizeof entries;
		ssize_t got = wanted < 24 ? 0 : syscall(SYS_getdents64, fid->file, entries, wanted);
		/* EINVAL: the next one does not fit, but others are there already. */
		if (got < 0 && used == 0)
			return errno;
		if (got <= 0)
			break;
		for (ssize_t at = 0; at < got;) {
			const struct entry *entry = (const struct entry *)(entries + at);
			struct stat type = {.st_mode = DTTOIF(entry->type), .st_ino = entry->inode, .st_dev = stat.st_dev};
			put_qid(request, &type);
			put64(request, (uint64_t)entry->next);
			put8(request, entry->type);
			put_text(request, entry->name);
			used += ENTRY_SIZE(strlen(entry->name));
			fid->position = (uint64_t)entry->next;
			at += entry->size;
		}
	}
	size_t end = request->length;
	request->length = start;
	put32(request, (uint32_t)used);
	request->length = end;
	return 0;
}

int handle_fsync(struct request *request)
{
	struct fid *fid HELD = share_fid(get32(request));
	/* Clients older than the field leave it out. */
	bool data_only = request->left >= 4 && get32(request) != 0;
	if (fid == NULL || fid->file < 0)
		return EBADF;
	return (data_only ? fdatasync(fid->file) : fsync(fid->file)) < 0 ? errno : 0;
}
