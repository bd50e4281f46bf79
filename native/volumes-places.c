/*
 * Linux's client keeps the fid of a name for as long as anybody in the guest uses the file: has it open, or below it a
 * working directory. It takes for granted meanwhile that the name still leads there, which is so only as long as the host
 * leaves it. So whenever such a fid is used, the server looks what is at its place now:
 *
 *   the same file         that is what the fid stands for
 *   another one           the fid stands for that from now on: what is opened next, and what stat(2) tells. Who has the old
 *                         one open has another fid, and keeps it
 *   another program (ELF) nothing changes: the guest may have pages of the old one in its memory, and half of one program
 *                         is worse than all of the old one
 *   none                  the name cannot be opened any more; what is open can still be asked for its attributes
 *
 * What the guest itself moves or removes is noted here, since it goes on to use the fids of that in its own way: then the
 * fid is the file that it is.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "volumes.h"

/* Of all places. */
static pthread_mutex_t places = PTHREAD_MUTEX_INITIALIZER;

static void free_place(struct place *place)
{
	if (place != NULL)
		drop_node(place->directory);
	free(place);
}

/* Without memory for it, the fid is the file that it is. */
static struct place *make_place(struct node *directory, const char *name)
{
	struct place *place = malloc(sizeof *place);
	if (place == NULL)
		return NULL;
	place->directory = keep_node(directory);
	strcpy(place->name, name);
	return place;
}

static void exchange(struct fid *fid, struct place *place)
{
	pthread_mutex_lock(&places);
	struct place *old = fid->place;
	fid->place = place;
	pthread_mutex_unlock(&places);
	free_place(old);
}

void set_place(struct fid *fid, struct node *directory, const char *name)
{
	exchange(fid, make_place(directory, name));
}

void forget_place(struct fid *fid)
{
	exchange(fid, NULL);
}

static struct place *copy_place(const struct fid *fid)
{
	pthread_mutex_lock(&places);
	struct place *copy = fid->place == NULL ? NULL : make_place(fid->place->directory, fid->place->name);
	pthread_mutex_unlock(&places);
	return copy;
}

static bool is_program(const struct node *node)
{
	char magic[4];
	struct node_path path = path_of(node);
	if (!S_ISREG(node->mode))
		return false;
	int fd = open(path.text, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
	if (fd < 0)
		return false;
	bool is = pread(fd, magic, sizeof magic, 0) == sizeof magic && memcmp(magic, "\177ELF", sizeof magic) == 0;
	close(fd);
	return is;
}

static bool is_same(const struct stat *one, const struct stat *other)
{
	return one->st_ino == other->st_ino && one->st_dev == other->st_dev;
}

/* Takes what was found. Where somebody is at work with the fid, the next one who uses it does this. */
static void exchange_node(struct fid *fid, const struct node *directory, int fd)
{
	struct stat stat;
	if (pthread_rwlock_trywrlock(&fid->lock) != 0) {
		close(fd);
		return;
	}
	struct node *node = make_node(directory, fd, &stat);
	if (node != NULL) {
		drop_node(fid->node);
		fid->node = node;
	}
	pthread_rwlock_unlock(&fid->lock);
}

static void look(struct fid *fid, const struct place *place)
{
	struct stat known, found;
	int fd = openat(place->directory->fd, place->name, O_PATH | O_NOFOLLOW | O_CLOEXEC);
	if (fd < 0) {
		fid->gone = errno == ENOENT;
		return;
	}
	pthread_rwlock_rdlock(&fid->lock);
	bool readable = fstat(fd, &found) == 0 && fstat(fid->node->fd, &known) == 0;
	bool stays = !readable || is_same(&found, &known) || is_program(fid->node);
	pthread_rwlock_unlock(&fid->lock);
	/* The client cannot have a file become a directory. */
	fid->gone = !stays && ((found.st_mode ^ known.st_mode) & S_IFMT) != 0;
	if (stays || fid->gone)
		close(fd);
	else
		exchange_node(fid, place->directory, fd);
}

void follow(struct fid *fid)
{
	/* Of most that are used: they are open. */
	if (fid->place == NULL)
		return;
	struct place *place = copy_place(fid);
	if (place != NULL)
		look(fid, place);
	free_place(place);
}

struct move {
	struct stat from;
	const char *old_name;
	struct stat to;
	struct node *directory; /* NULL: removed */
	const char *new_name;
};

static bool is_at(const struct place *place, const struct stat *directory, const char *name)
{
	struct stat stat;
	return strcmp(place->name, name) == 0 && fstat(place->directory->fd, &stat) == 0 && is_same(&stat, directory);
}

/* Of all fids, hardly one has. */
static bool has_name_of(const struct fid *fid, const struct move *move)
{
	pthread_mutex_lock(&places);
	const struct place *place = fid->place;
	bool has = place != NULL && (strcmp(place->name, move->old_name) == 0 ||
				     (move->new_name != NULL && strcmp(place->name, move->new_name) == 0));
	pthread_mutex_unlock(&places);
	return has;
}

static void move_one(struct fid *fid, const void *argument)
{
	const struct move *move = argument;
	struct place *place = has_name_of(fid, move) ? copy_place(fid) : NULL;
	if (place == NULL)
		return;
	/* A file of two names that is moved from one to the other stays where it is: no fid is lost by that. */
	if (is_at(place, &move->from, move->old_name)) {
		if (move->directory == NULL)
			forget_place(fid);
		else
			set_place(fid, move->directory, move->new_name);
	} else if (move->directory != NULL && is_at(place, &move->to, move->new_name)) {
		forget_place(fid);
	}
	free_place(place);
}

void note_move(const struct node *from, const char *old_name, const struct node *to, const char *new_name)
{
	struct move move = {.old_name = old_name, .directory = (struct node *)to, .new_name = new_name};
	if (fstat(from->fd, &move.from) == 0 && (to == NULL || fstat(to->fd, &move.to) == 0))
		for_each_fid(move_one, &move);
}
