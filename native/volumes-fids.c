/*
 * Fids: the numbers by which the guest names what it has found. Any number of threads work on them at once. Whoever has
 * found one holds a reference, so that it stays when another thread removes it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "volumes.h"

static struct {
	pthread_mutex_t lock;
	struct fid **buckets;
	size_t size; /* of buckets, a power of two */
	size_t count;
} table = {.lock = PTHREAD_MUTEX_INITIALIZER};

static struct node *keep(struct node like)
{
	struct node *node = malloc(sizeof *node);
	if (node == NULL) {
		close(like.fd);
		errno = ENOMEM;
		return NULL;
	}
	*node = like;
	node->references = 1;
	return node;
}

struct node *make_root_node(int fd)
{
	return keep((struct node){.fd = fd, .mode = S_IFDIR, .root = true});
}

/*
 * A mount that is read-only says nothing of those below it, as on the host. So wherever a step leads into another one,
 * also one that has come later, that one's flags count.
 */
struct node *make_node(const struct node *directory, int fd, struct stat *stat)
{
	struct statx statx_;
	struct statvfs mount;
	struct node node = {.fd = fd, .read_only = directory->read_only};
	if (statx(fd, "", AT_EMPTY_PATH, STATX_BASIC_STATS | STATX_MNT_ID, &statx_) < 0)
		goto failed;
	*stat = stat_of(&statx_);
	node.mode = stat->st_mode & S_IFMT;
	node.mount = statx_.stx_mnt_id;
	if (node.mount != directory->mount) {
		if (fstatvfs(fd, &mount) < 0)
			goto failed;
		node.read_only = (mount.f_flag & ST_RDONLY) != 0;
	}
	return keep(node);
failed:
	close(fd);
	return NULL;
}

struct node *keep_node(struct node *node)
{
	atomic_fetch_add(&node->references, 1);
	return node;
}

void drop_node(struct node *node)
{
	if (node == NULL || atomic_fetch_sub(&node->references, 1) > 1)
		return;
	close(node->fd);
	free(node);
}

struct node_path path_of(const struct node *node)
{
	struct node_path path;
	snprintf(path.text, sizeof path.text, "%d", node->fd);
	return path;
}

static struct fid **place_of(uint32_t number)
{
	struct fid **place = &table.buckets[(number * 2654435761u >> 8) & (table.size - 1)];
	while (*place != NULL && (*place)->number != number)
		place = &(*place)->next;
	return place;
}

static bool grow(void)
{
	struct fid **old = table.buckets;
	size_t old_size = table.size, size = old_size == 0 ? 64 : old_size * 2;
	struct fid **buckets = calloc(size, sizeof *buckets);
	if (buckets == NULL)
		return false;
	table.buckets = buckets;
	table.size = size;
	for (size_t i = 0; i < old_size; i++) {
		for (struct fid *fid = old[i], *next; fid != NULL; fid = next) {
			next = fid->next;
			fid->next = NULL;
			*place_of(fid->number) = fid;
		}
	}
	free(old);
	return true;
}

static struct fid *find_fid(uint32_t number)
{
	struct fid *fid = NULL;
	pthread_mutex_lock(&table.lock);
	if (table.size > 0)
		fid = *place_of(number);
	if (fid != NULL)
		atomic_fetch_add(&fid->references, 1);
	pthread_mutex_unlock(&table.lock);
	return fid;
}

struct fid *share_fid(uint32_t number)
{
	struct fid *fid = find_fid(number);
	if (fid != NULL) {
		follow(fid);
		pthread_rwlock_rdlock(&fid->lock);
	}
	return fid;
}

struct fid *own_fid(uint32_t number)
{
	struct fid *fid = find_fid(number);
	if (fid != NULL)
		pthread_rwlock_wrlock(&fid->lock);
	return fid;
}

void let_go(struct fid **fid)
{
	if (*fid == NULL)
		return;
	pthread_rwlock_unlock(&(*fid)->lock);
	drop_fid(*fid);
}

/* Bytes of all that the guest has on their way. No fid of these needs a descriptor, so that is no limit to them. */
#define MAX_XATTRS (16 * 1024 * 1024)
static atomic_size_t xattrs;

struct xattr *make_xattr(uint8_t *value, size_t size)
{
	size_t needed = sizeof(struct xattr) + size;
	bool fits = atomic_fetch_add(&xattrs, needed) + needed <= MAX_XATTRS;
	struct xattr *xattr = value != NULL && fits ? calloc(1, sizeof *xattr) : NULL;
	if (xattr == NULL) {
		atomic_fetch_sub(&xattrs, needed);
		free(value);
		errno = ENOMEM;
		return NULL;
	}
	xattr->value = value;
	xattr->size = size;
	return xattr;
}

static void free_xattr(struct xattr *xattr)
{
	if (xattr == NULL)
		return;
	atomic_fetch_sub(&xattrs, sizeof *xattr + xattr->size);
	free(xattr->value);
	free(xattr);
}

int add_fid(uint32_t number, uid_t uid, struct node *node, struct xattr *xattr)
{
	struct fid *fid = malloc(sizeof *fid);
	int error = fid == NULL ? ENOMEM : 0;
	if (error == 0) {
		*fid = (struct fid){.number = number, .references = 1, .uid = uid, .file = -1, .xattr = xattr};
		pthread_rwlock_init(&fid->lock, NULL);
	}
	pthread_mutex_lock(&table.lock);
	if (error == 0 && table.count >= MAX_FILES)
		error = EMFILE;
	if (error == 0 && table.count >= table.size && !grow())
		error = ENOMEM;
	if (error == 0) {
		struct fid **place = place_of(number);
		if (*place != NULL) {
			error = EBADF; /* in use */
		} else {
			fid->node = keep_node(node);
			*place = fid;
			table.count++;
		}
	}
	pthread_mutex_unlock(&table.lock);
	if (error != 0) {
		free_xattr(xattr);
		free(fid);
	}
	return error;
}

/* The caller has the table's reference then, and drops it. */
struct fid *remove_fid(uint32_t number)
{
	struct fid *fid = NULL;
	pthread_mutex_lock(&table.lock);
	if (table.size > 0) {
		struct fid **place = place_of(number);
		fid = *place;
		if (fid != NULL) {
			*place = fid->next;
			table.count--;
		}
	}
	pthread_mutex_unlock(&table.lock);
	return fid;
}

void drop_fid(struct fid *fid)
{
	if (fid == NULL || atomic_fetch_sub(&fid->references, 1) > 1)
		return;
	release_locks(fid);
	if (fid->file >= 0)
		close(fid->file);
	forget_place(fid);
	drop_node(fid->node);
	free_xattr(fid->xattr);
	pthread_rwlock_destroy(&fid->lock);
	free(fid);
}

void for_each_fid(void (*action)(struct fid *fid, const void *argument), const void *argument)
{
	pthread_mutex_lock(&table.lock);
	for (size_t i = 0; i < table.size; i++)
		for (struct fid *fid = table.buckets[i]; fid != NULL; fid = fid->next)
			action(fid, argument);
	pthread_mutex_unlock(&table.lock);
}

void remove_all_fids(void)
{
	pthread_mutex_lock(&table.lock);
	for (size_t i = 0; i < table.size; i++) {
		for (struct fid *fid = table.buckets[i], *next; fid != NULL; fid = next) {
			next = fid->next;
			drop_fid(fid);
		}
		table.buckets[i] = NULL;
	}
	table.count = 0;
	pthread_mutex_unlock(&table.lock);
}
