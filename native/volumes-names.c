/*
 * What makes, moves and removes names. Each name is one step below a directory that is held by descriptor. What is made
 * belongs to the user of the guest who makes it, and to the group that the guest's kernel says.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

#include "volumes.h"

/* P9_DOTL_AT_REMOVEDIR of include/net/9p/9p.h. */
#define L_REMOVEDIR 0x200u

/* Why nothing can be changed in this directory; 0 when it can. */
static int changeable(const struct request *request, const struct fid *directory)
{
	if (directory == NULL || directory->xattr != NULL)
		return EBADF;
	if (request->malformed)
		return EINVAL;
	if (!S_ISDIR(directory->node->mode))
		return ENOTDIR;
	return directory->node->read_only ? EROFS : 0;
}

static int put_made(struct request *request, const struct fid *directory, const char *name)
{
	struct stat stat;
	if (fstatat(directory->node->fd, name, &stat, AT_SYMLINK_NOFOLLOW) < 0)
		return errno;
	put_qid(request, &stat);
	return 0;
}

int handle_symlink(struct request *request)
{
	char name[NAME_SIZE], target[PATH_MAX];
	struct fid *directory HELD = share_fid(get32(request));
	int bad_name = get_name(request, name), bad_target = get_text(request, target, sizeof target);
	gid_t gid = get_gid(request);
	int error = changeable(request, directory);
	if (error != 0 || bad_name != 0 || bad_target != 0)
		return error != 0 ? error : bad_name != 0 ? bad_name : bad_target;
	act_as(directory->uid, gid);
	if (symlinkat(target, directory->node->fd, name) < 0)
		return errno;
	return put_made(request, directory, name);
}

/* The capability to make devices is gone, so those are EPERM, as they are for a container without it. */
int handle_mknod(struct request *request)
{
	char name[NAME_SIZE];
	struct fid *directory HELD = share_fid(get32(request));
	int bad_name = get_name(request, name);
	mode_t mode = get32(request);
	get32(request); /* major */
	get32(request); /* minor */
	gid_t gid = get_gid(request);
	int error = changeable(request, directory);
	if (error != 0 || bad_name != 0)
		return error != 0 ? error : bad_name;
	if (!S_ISREG(mode) && !S_ISFIFO(mode) && !S_ISSOCK(mode))
		return EPERM;
	act_as(directory->uid, gid);
	if (mknodat(directory->node->fd, name, mode, 0) < 0)
		return errno;
	return put_made(request, directory, name);
}

int handle_mkdir(struct request *request)
{
	char name[NAME_SIZE];
	struct fid *directory HELD = share_fid(get32(request));
	int bad_name = get_name(request, name);
	mode_t mode = get32(request);
	gid_t gid = get_gid(request);
	int error = changeable(request, directory);
	if (error != 0 || bad_name != 0)
		return error != 0 ? error : bad_name;
	act_as(directory->uid, gid);
	if (mkdirat(directory->node->fd, name, mode & 07777) < 0)
		return errno;
	return put_made(request, directory, name);
}

int handle_link(struct request *request)
{
	char name[NAME_SIZE];
	struct fid *directory HELD = share_fid(get32(request));
	struct fid *target HELD = share_fid(get32(request));
	int bad_name = get_name(request, name);
	int error = changeable(request, directory);
	if (error != 0 || bad_name != 0)
		return error != 0 ? error : bad_name;
	if (target == NULL || target->xattr != NULL)
		return EBADF;
	act_as_root();
	return linkat(target->node->fd, "", directory->node->fd, name, AT_EMPTY_PATH) < 0 ? errno : 0;
}

/* Between two volumes this is EXDEV, also where both are of one file system: they are two mounts. */
int handle_renameat(struct request *request)
{
	char old_name[NAME_SIZE], new_name[NAME_SIZE];
	struct fid *from HELD = share_fid(get32(request));
	int bad_old = get_name(request, old_name);
	struct fid *to HELD = share_fid(get32(request));
	int bad_new = get_name(request, new_name);
	int error = changeable(request, from);
	if (error == 0)
		error = changeable(request, to);
	if (error != 0 || bad_old != 0 || bad_new != 0)
		return error != 0 ? error : bad_old != 0 ? bad_old : bad_new;
	act_as_root();
	if (renameat(from->node->fd, old_name, to->node->fd, new_name) < 0)
		return errno;
	note_move(from->node, old_name, to->node, new_name);
	return 0;
}

int handle_unlinkat(struct request *request)
{
	char name[NAME_SIZE];
	struct fid *directory HELD = share_fid(get32(request));
	int bad_name = get_name(request, name);
	uint32_t flags = get32(request);
	int error = changeable(request, directory);
	if (error != 0 || bad_name != 0)
		return error != 0 ? error : bad_name;
	act_as_root();
	if (unlinkat(directory->node->fd, name, flags & L_REMOVEDIR ? AT_REMOVEDIR : 0) < 0)
		return errno;
	note_move(directory->node, name, NULL, NULL);
	return 0;
}

int handle_readlink(struct request *request)
{
	char target[PATH_MAX];
	struct fid *fid HELD = share_fid(get32(request));
	if (fid == NULL)
		return EBADF;
	if (!S_ISLNK(fid->node->mode))
		return EINVAL;
	ssize_t length = readlinkat(fid->node->fd, "", target, sizeof target - 1);
	if (length < 0)
		return errno;
	target[length] = '\0';
	put_text(request, target);
	return 0;
}
