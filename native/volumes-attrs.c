/*
 * Attributes. Where libc has no function for a file that is held by O_PATH, its path is the number of its descriptor: the
 * working directory is /proc/self/fd (volumes-tree.c), whose links lead straight to the file, also to a symbolic link.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>
#include <unistd.h>

#include "volumes.h"

/* P9_STATS_BASIC | P9_STATS_BTIME of include/net/9p/9p.h. */
#define L_BASIC 0x7ffu
#define L_BTIME 0x800u

/* P9_ATTR_* of the same file. */
#define L_MODE 1u
#define L_UID 2u
#define L_GID 4u
#define L_SIZE 8u
#define L_ATIME 16u
#define L_MTIME 32u
#define L_CTIME 64u
#define L_ATIME_SET 128u
#define L_MTIME_SET 256u

/* linux/limits.h */
#define MAX_XATTR (64 * 1024)

static void put_time(struct request *request, const struct statx_timestamp *time)
{
	put64(request, (uint64_t)time->tv_sec);
	put64(request, time->tv_nsec);
}

/* new_encode_dev of the kernel, which its client takes it apart by. */
static uint64_t encoded(uint32_t major, uint32_t minor)
{
	return (minor & 0xff) | (uint64_t)major << 8 | (uint64_t)(minor & ~0xffu) << 12;
}

struct stat stat_of(const struct statx *statx)
{
	return (struct stat){
		.st_mode = statx->stx_mode,
		.st_ino = statx->stx_ino,
		.st_dev = makedev(statx->stx_dev_major, statx->stx_dev_minor),
		.st_size = (off_t)statx->stx_size,
		.st_mtim = {statx->stx_mtime.tv_sec, statx->stx_mtime.tv_nsec},
	};
}

int handle_getattr(struct request *request)
{
	struct statx statx_;
	struct fid *fid HELD = share_fid(get32(request));
	get64(request); /* what is asked for; all is told */
	if (fid == NULL)
		return EBADF;
	if (statx(fid->node->fd, "", AT_EMPTY_PATH, STATX_BASIC_STATS | STATX_BTIME, &statx_) < 0)
		return errno;
	bool born = (statx_.stx_mask & STATX_BTIME) != 0;
	struct stat stat = stat_of(&statx_);
	static const struct statx_timestamp never;
	put64(request, L_BASIC | (born ? L_BTIME : 0));
	put_qid(request, &stat);
	put32(request, statx_.stx_mode);
	put32(request, statx_.stx_uid);
	put32(request, statx_.stx_gid);
	put64(request, statx_.stx_nlink);
	put64(request, encoded(statx_.stx_rdev_major, statx_.stx_rdev_minor));
	put64(request, statx_.stx_size);
	put64(request, statx_.stx_blksize);
	put64(request, statx_.stx_blocks);
	put_time(request, &statx_.stx_atime);
	put_time(request, &statx_.stx_mtime);
	put_time(request, &statx_.stx_ctime);
	put_time(request, born ? &statx_.stx_btime : &never);
	put64(request, 0); /* generation */
	put64(request, 0); /* version of the data */
	return 0;
}

static int set_size(const struct fid *fid, uint64_t size)
{
	if (size > INT64_MAX)
		return EINVAL;
	if (!S_ISREG(fid->node->mode))
		return S_ISDIR(fid->node->mode) ? EISDIR : EINVAL;
	if (fid->file >= 0 && fid->access != O_RDONLY)
		return ftruncate(fid->file, (off_t)size) < 0 ? errno : 0;
	int file = open(path_of(fid->node).text, O_WRONLY | O_CLOEXEC | O_NONBLOCK);
	if (file < 0)
		return errno;
	int error = ftruncate(file, (off_t)size) < 0 ? errno : 0;
	close(file);
	return error;
}

static struct timespec time_of(uint32_t valid, uint32_t change, uint32_t set, uint64_t seconds, uint64_t nanoseconds)
{
	struct timespec time = {.tv_nsec = UTIME_OMIT};
	if ((valid & change) == 0)
		return time;
	if ((valid & set) == 0)
		time.tv_nsec = UTIME_NOW;
	else
		time = (struct timespec){(time_t)seconds, nanoseconds < 1000000000 ? (long)nanoseconds : 0};
	return time;
}

/*
 * As root: the guest's kernel has decided what is allowed and which bits fall. The owner first, since the kernel clears
 * setuid then, and the guest's has it in the mode that it sends along.
 */
int handle_setattr(struct request *request)
{
	struct fid *fid HELD = share_fid(get32(request));
	uint32_t valid = get32(request), mode = get32(request), uid = get32(request), gid = get32(request);
	uint64_t size = get64(request);
	uint64_t atime = get64(request), atime_ns = get64(request), mtime = get64(request), mtime_ns = get64(request);
	if (fid == NULL || fid->xattr != NULL)
		return EBADF;
	if (request->malformed)
		return EINVAL;
	if (fid->node->read_only)
		return EROFS;
	const struct timespec times[2] = {
		time_of(valid, L_ATIME, L_ATIME_SET, atime, atime_ns),
		time_of(valid, L_MTIME, L_MTIME_SET, mtime, mtime_ns),
	};
	struct node_path path = path_of(fid->node);
	bool owner = (valid & (L_UID | L_GID)) != 0;
	act_as_root();
	if (valid & L_SIZE) {
		int error = set_size(fid, size);
		if (error != 0)
			return error;
	}
	/* With nobody to change to, chown(2) still sets ctime. */
	if (owner || valid == L_CTIME) {
		uid_t new_uid = valid & L_UID ? uid : (uid_t)-1;
		gid_t new_gid = valid & L_GID ? gid : (gid_t)-1;
		if (fchownat(fid->node->fd, "", new_uid, new_gid, AT_EMPTY_PATH) < 0)
			return errno;
	}
	if ((valid & L_MODE) && fchmodat(AT_FDCWD, path.text, mode & 07777, 0) < 0)
		return errno;
	if ((valid & (L_ATIME | L_MTIME)) && utimensat(AT_FDCWD, path.text, times, 0) < 0)
		return errno;
	return 0;
}

/* Reads the value, or the names of all attributes where no name is given. NULL and errno. */
static struct xattr *read_value(const struct node *node, const char *name)
{
	struct node_path path = path_of(node);
	uint8_t *value = malloc(MAX_XATTR);
	ssize_t size = -1;
	if (value == NULL)
		errno = ENOMEM;
	else
		size = name[0] == '\0' ? listxattr(path.text, (char *)value, MAX_XATTR)
				       : getxattr(path.text, name, value, MAX_XATTR);
	if (size < 0) {
		int error = errno;
		free(value);
		errno = error;
		return NULL;
	}
	uint8_t *fitting = realloc(value, size == 0 ? 1 : (size_t)size);
	return make_xattr(fitting == NULL ? value : fitting, (size_t)size);
}

int handle_xattrwalk(struct request *request)
{
	char name[NAME_SIZE];
	struct fid *fid HELD = share_fid(get32(request));
	uint32_t new_number = get32(request);
	int error = get_text(request, name, sizeof name);
	if (fid == NULL || fid->xattr != NULL)
		return EBADF;
	if (request->malformed || error != 0)
		return error != 0 ? error : EINVAL;
	act_as_root();
	struct xattr *xattr = read_value(fid->node, name);
	if (xattr == NULL)
		return errno;
	put64(request, xattr->size);
	return add_fid(new_number, fid->uid, fid->node, xattr);
}

/* From now on the fid is what is written to the attribute. */
int handle_xattrcreate(struct request *request)
{
	char name[NAME_SIZE];
	struct fid *fid HELD = own_fid(get32(request));
	int error = get_text(request, name, sizeof name);
	uint64_t size = get64(request);
	uint32_t flags = get32(request);
	if (fid == NULL || fid->xattr != NULL || fid->file >= 0)
		return EBADF;
	if (request->malformed || error != 0)
		return error != 0 ? error : EINVAL;
	if (fid->node->read_only)
		return EROFS;
	if (size > MAX_XATTR)
		return E2BIG;
	if (flags & ~(uint32_t)(XATTR_CREATE | XATTR_REPLACE))
		return EINVAL;
	struct xattr *xattr = make_xattr(malloc(size == 0 ? 1 : size), size);
	if (xattr == NULL)
		return errno;
	xattr->flags = flags;
	xattr->writing = true;
	strcpy(xattr->name, name);
	fid->xattr = xattr;
	return 0;
}

/* Some of these the kernel would let us set: a label of SELinux's, where its policy allows that to who has started us. */
static bool is_of_host(const char *name)
{
	return strncmp(name, "security.", 9) == 0 || strncmp(name, "trusted.", 8) == 0;
}

/* removexattr(2) comes as the replacing of a value by none: fs/9p/xattr.c. */
int set_xattr(const struct fid *fid)
{
	const struct xattr *xattr = fid->xattr;
	struct node_path path = path_of(fid->node);
	act_as_root();
	if (xattr->filled != xattr->size)
		return EINVAL;
	bool removes = xattr->size == 0 && (xattr->flags & XATTR_REPLACE) != 0;
	/*
	 * Before it writes to a file, or changes its owner, the guest's kernel takes the file's capabilities away, and gives up
	 * with any other error than this (cap_inode_killpriv). The host's takes them away for itself then.
	 */
	if (removes && strcmp(xattr->name, "security.capability") == 0)
		return EOPNOTSUPP;
	if (is_of_host(xattr->name))
		return EPERM;
	if (removes)
		return removexattr(path.text, xattr->name) < 0 ? errno : 0;
	return setxattr(path.text, xattr->name, xattr->value, xattr->size, (int)xattr->flags) < 0 ? errno : 0;
}
