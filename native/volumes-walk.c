/*
 * The frame of a session: how a request finds its function, and the requests that make fids and end them.
 *
 * 9P2000.L, as the Linux client speaks it: include/net/9p/9p.h and net/9p/client.c. A fid is attached to the root, and
 * walked by names to any file below. ".." is refused: the client never asks for it, and a volume has nothing above it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/statfs.h>
#include <unistd.h>

#include "volumes.h"

#define RLERROR 7
#define MAX_NAMES 16 /* P9_MAXWELEM */
#define NO_UNAME UINT32_MAX
#define NO_TAG UINT16_MAX
/* Room for any reply but data. */
#define MIN_MESSAGE 8192

static operation *const operations[128] = {
	[8] = handle_statfs,	   [12] = handle_lopen,	   [14] = handle_lcreate, [16] = handle_symlink,
	[18] = handle_mknod,	   [22] = handle_readlink, [24] = handle_getattr, [26] = handle_setattr,
	[30] = handle_xattrwalk,   [32] = handle_xattrcreate, [40] = handle_readdir, [50] = handle_fsync,
	[52] = handle_lock,	   [54] = handle_getlock,  [70] = handle_link,	  [72] = handle_mkdir,
	[74] = handle_renameat,	   [76] = handle_unlinkat, [100] = handle_version, [104] = handle_attach,
	[108] = handle_flush,	   [110] = handle_walk,	   [116] = handle_read,	  [118] = handle_write,
	[120] = handle_clunk,	   [122] = handle_remove,
};

static void put_header(struct request *request, uint8_t type)
{
	size_t length = request->length;
	request->length = 0;
	put32(request, (uint32_t)length);
	put8(request, type);
	put16(request, request->tag);
	request->length = length;
}

/* Does the request and makes its reply. One that we do not know is EOPNOTSUPP, by which the client tries another way. */
void handle(struct request *request)
{
	operation *operation = request->type < 128 ? operations[request->type] : NULL;
	request->length = HEADER_SIZE;
	int error = operation == NULL ? EOPNOTSUPP : operation(request);
	if (request->malformed)
		error = EINVAL;
	if (error != 0) {
		request->length = HEADER_SIZE;
		request->malformed = false;
		put32(request, (uint32_t)error);
		put_header(request, RLERROR);
		return;
	}
	put_header(request, request->type + 1);
}

static struct node *root;

void set_root(int fd)
{
	if (fd < 0)
		fail("cannot open the", "root");
	root = make_root_node(fd);
	if (root == NULL)
		fail("cannot keep the", "root");
}

/*
 * What makes inode numbers of several devices differ: each device that is seen gets a number of its own, in bits that
 * hardly any file system uses. The first device's stay as they are.
 */
uint64_t device_bits(dev_t device)
{
	static struct {
		pthread_mutex_t lock;
		dev_t devices[255];
		atomic_uint count;
	} seen = {.lock = PTHREAD_MUTEX_INITIALIZER};
	const unsigned most = sizeof seen.devices / sizeof *seen.devices;
	unsigned count = atomic_load(&seen.count), i;
	for (i = 0; i < count; i++)
		if (seen.devices[i] == device)
			return (uint64_t)i << 56;
	pthread_mutex_lock(&seen.lock);
	count = atomic_load(&seen.count);
	for (i = 0; i < count && seen.devices[i] != device; i++)
		;
	if (i == count && count < most) {
		seen.devices[i] = device;
		atomic_store(&seen.count, count + 1);
	}
	pthread_mutex_unlock(&seen.lock);
	return (uint64_t)i << 56;
}

/* A new session on the connection: all fids are forgotten. */
int handle_version(struct request *request)
{
	char version[32];
	uint32_t size = get32(request);
	if (get_text(request, version, sizeof version) != 0 || size < MIN_MESSAGE)
		return EINVAL;
	bool known = strcmp(version, "9P2000.L") == 0;
	remove_all_fids();
	set_message_limit(size < MAX_MESSAGE ? size : MAX_MESSAGE);
	put32(request, message_limit());
	put_text(request, known ? "9P2000.L" : "unknown");
	return 0;
}

/* The one export is the whole tree. afid and uname are not looked at: the guest's kernel knows its users. */
int handle_attach(struct request *request)
{
	char uname[NAME_SIZE], aname[NAME_SIZE];
	struct stat stat;
	uint32_t number = get32(request);
	get32(request);
	int error = get_text(request, uname, sizeof uname);
	if (error == 0)
		error = get_text(request, aname, sizeof aname);
	uint32_t uid = get32(request);
	if (error != 0 || request->malformed)
		return EINVAL;
	if (aname[0] != '\0' && strcmp(aname, "/") != 0)
		return ENOENT;
	/* So the client attaches when it mounts; whoever uses the mount gets an attach of their own. */
	if (uid == NO_UNAME)
		uid = 0;
	if (fstat(root->fd, &stat) < 0)
		return errno;
	error = add_fid(number, uid, root, NULL);
	put_qid(request, &stat);
	return error;
}

static struct node *step(const struct node *from, const char *name, struct stat *stat)
{
	if (!S_ISDIR(from->mode)) {
		errno = ENOTDIR;
		return NULL;
	}
	int fd = openat(from->fd, name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
	return fd < 0 ? NULL : make_node(from, fd, stat);
}

/*
 * Walks to the file, or as far as it goes: then the reply has fewer qids than names were asked for, and no fid is made.
 * Keeps the last directory, and its name for the file.
 */
static int walk(struct request *request, struct node **node, uint16_t count, bool *complete, struct place *last)
{
	char *name = last->name;
	struct stat stat;
	uint16_t walked = 0;
	int error = 0;
	put16(request, count);
	while (walked < count && error == 0) {
		error = get_name(request, name);
		if (error != 0)
			break;
		struct node *next = step(*node, name, &stat);
		if (next == NULL) {
			error = errno;
			break;
		}
		drop_node(last->directory);
		last->directory = *node;
		*node = next;
		put_qid(request, &stat);
		walked++;
	}
	*complete = walked == count;
	request->out[HEADER_SIZE] = (uint8_t)walked;
	return walked == 0 ? error : 0;
}

/* A volume itself is always the file that it is, whatever the host does with its source's name. */
static void remember(uint32_t number, const struct place *place)
{
	if (place->directory == NULL || place->directory->root)
		return;
	struct fid *fid HELD = share_fid(number); /* whose place has a lock of its own */
	if (fid != NULL)
		set_place(fid, place->directory, place->name);
}

int handle_walk(struct request *request)
{
	uint32_t number = get32(request), new_number = get32(request);
	uint16_t count = get16(request);
	bool in_place = number == new_number, complete;
	struct fid *fid HELD = in_place ? own_fid(number) : share_fid(number);
	if (fid == NULL)
		return EBADF;
	if (count > MAX_NAMES || fid->xattr != NULL || (in_place && fid->file >= 0))
		return EINVAL;
	struct node *node = keep_node(fid->node);
	struct place last = {.directory = NULL};
	int error = walk(request, &node, count, &complete, &last);
	if (error == 0 && fid->gone)
		error = ENOENT;
	if (error == 0 && complete && !request->malformed) {
		if (in_place) {
			drop_node(fid->node);
			fid->node = keep_node(node);
			forget_place(fid);
		} else {
			error = add_fid(new_number, fid->uid, node, NULL);
			if (error == 0)
				remember(new_number, &last);
		}
	}
	drop_node(last.directory);
	drop_node(node);
	return error;
}

/* Where an attribute was being set, it is set now, and this tells whether it could be. */
int handle_clunk(struct request *request)
{
	uint32_t number = get32(request);
	struct fid *fid = request->malformed ? NULL : remove_fid(number);
	if (fid == NULL)
		return EBADF;
	/* Other threads may still be at work with it. */
	pthread_rwlock_rdlock(&fid->lock);
	int error = fid->xattr != NULL && fid->xattr->writing ? set_xattr(fid) : 0;
	pthread_rwlock_unlock(&fid->lock);
	drop_fid(fid);
	return error;
}

/* By fid, so without the name to remove. The client does it with Tunlinkat; the fid ends in any case. */
int handle_remove(struct request *request)
{
	uint32_t number = get32(request);
	struct fid *fid = request->malformed ? NULL : remove_fid(number);
	if (fid == NULL)
		return EBADF;
	drop_fid(fid);
	return EOPNOTSUPP;
}

int handle_statfs(struct request *request)
{
	struct statfs statfs;
	struct fid *fid HELD = share_fid(get32(request));
	if (fid == NULL)
		return EBADF;
	if (fstatfs(fid->node->fd, &statfs) < 0)
		return errno;
	uint64_t id;
	memcpy(&id, &statfs.f_fsid, sizeof id);
	put32(request, (uint32_t)statfs.f_type);
	put32(request, (uint32_t)statfs.f_bsize);
	put64(request, statfs.f_blocks);
	put64(request, statfs.f_bfree);
	put64(request, statfs.f_bavail);
	put64(request, statfs.f_files);
	put64(request, statfs.f_ffree);
	put64(request, id);
	put32(request, (uint32_t)statfs.f_namelen);
	return 0;
}

int handle_flush(struct request *request)
{
	uint16_t tag = get16(request);
	if (tag != NO_TAG && !request->malformed)
		flush_tag(tag);
	return 0;
}
