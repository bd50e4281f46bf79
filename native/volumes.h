/*
 * What the parts of kiln-volumes share; see volumes.c for what it is.
 *
 *   volumes.c          the two commands, and how they tell what went wrong
 *   volumes-tree.c     the export tree: namespaces, root, mounts
 *   volumes-confine.c  capabilities, limits, system calls
 *   volumes-session.c  the connection: messages, threads, Tflush
 *   volumes-message.c  the fields of a 9P message
 *   volumes-fids.c     fids and the files that they stand for
 *   volumes-places.c   where fids were found, to see what the host puts there meanwhile
 *   volumes-walk.c     Tversion, Tattach, Twalk, Tclunk, Tstatfs, and how a request finds its function
 *   volumes-files.c    open, read, write, readdir, fsync
 *   volumes-names.c    everything that makes, moves and removes names
 *   volumes-attrs.c    getattr, setattr, xattrs
 *   volumes-locks.c    locks
 */
#pragma once
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/stat.h>
#include <sys/types.h>

#define NAME_SIZE 256 /* NAME_MAX and a NUL */

/* The largest message. The kernel's client takes no more over a socket (net/9p/trans_fd.c, MAX_SOCK_BUF). */
#define MAX_MESSAGE (1024 * 1024)

/* Of descriptors, since each file that the guest's kernel remembers is one here, and of fids, of which many can have one. */
#define MAX_FILES (512 * 1024)

/* size[4] type[1] tag[2] */
#define HEADER_SIZE 7

/* --- the program --- */

/* Tells kilnd (and the log) what went wrong, with errno's text, and ends the program. */
void __attribute__((noreturn)) fail(const char *what, const char *which);

/* --- the export tree --- */

struct volume {
	const char *index;
	const char *options;
	const char *source;
	int tree;	/* a clone of the source's mounts that is attached nowhere */
	bool directory; /* else a regular file */
};

void clone_source(struct volume *volume);
void enter_export_root(const char *directory, const struct volume *volumes, size_t count);
void add_to_export_root(int mount_namespace, const struct volume *volumes, size_t count);

void remove_from_export_root(int mount_namespace, char *const *indexes, size_t count);

/* --- confinement --- */

void allow_many_files(void);
void drop_privileges(void);
void allow_only_what_serving_needs(void);
/* What this thread does next is done as that user of the guest, whom the guest's kernel has let. */
void act_as(uid_t uid, gid_t gid);
void act_as_root(void);

/* --- messages --- */

struct request {
	const uint8_t *in; /* what follows the header */
	size_t left;
	uint8_t *out;  /* the whole reply */
	size_t length; /* of the reply as far as it is made */
	size_t limit;  /* of the reply */
	bool malformed;
	uint16_t tag;
	uint8_t type;
};

uint8_t get8(struct request *request);
uint16_t get16(struct request *request);
uint32_t get32(struct request *request);
uint64_t get64(struct request *request);
/* Of what is made. -1 stands for none (chown(2)), so the request is malformed then. */
gid_t get_gid(struct request *request);
/* A name of one file in a directory: 0, or EINVAL for one with a slash or NUL, "", "." and "..", ENAMETOOLONG. */
int get_name(struct request *request, char name[NAME_SIZE]);
/* Any text without a NUL that is shorter than size; 0, EINVAL or ENAMETOOLONG. */
int get_text(struct request *request, char *text, size_t size);
void put8(struct request *request, uint8_t value);
void put16(struct request *request, uint16_t value);
void put32(struct request *request, uint32_t value);
void put64(struct request *request, uint64_t value);
void put_bytes(struct request *request, const void *bytes, size_t size);
void put_text(struct request *request, const char *text);
void put_qid(struct request *request, const struct stat *stat);
struct statx;
struct stat stat_of(const struct statx *statx); /* type and mode, number, device, size, time of change */
/* So many more bytes fit into the reply. */
size_t room(const struct request *request);

/* --- fids --- */

/* A file, open with O_PATH: it stays the same file when it is renamed or removed. */
struct node {
	atomic_uint references;
	int fd;
	mode_t mode; /* its type, which never changes */
	bool root;   /* of the export tree */
	uint64_t mount; /* the number of the mount that it is seen through; of the root none */
	bool read_only; /* that mount is */
};

/* An extended attribute on its way: from the file (read once, at Txattrwalk) or to it (set at Tclunk). */
struct xattr {
	char name[NAME_SIZE];
	uint8_t *value;
	size_t size; /* which never changes */
	size_t filled;
	uint32_t flags;
	bool writing;
};

/* A name in a directory. */
struct place {
	struct node *directory;
	char name[NAME_SIZE];
};

struct fid {
	struct fid *next;
	uint32_t number;
	atomic_uint references;
	uid_t uid; /* who attached */
	/* Shared by who uses what is below, exclusive for who changes it. The kernel's client never has both at once. */
	pthread_rwlock_t lock;
	struct node *node;
	int file; /* open for reading or writing; -1 before Tlopen */
	int access;
	uint64_t position; /* of a directory */
	struct place *_Atomic place; /* where it was walked to; NULL: it is the file that it is. Changed under a lock of its own */
	atomic_bool gone;    /* the host has removed what was there */
	struct xattr *xattr;
};

/* Takes value, also when there are too many; NULL and errno then. */
struct xattr *make_xattr(uint8_t *value, size_t size);
/* Of what was opened in a directory, which is told of in `stat`. Takes fd; NULL and errno. */
struct node *make_node(const struct node *directory, int fd, struct stat *stat);
struct node *make_root_node(int fd); /* the same */
struct node *keep_node(struct node *node);
void drop_node(struct node *node);
/* NULL: there is none. Locked as asked for; let go of when the variable goes, if it is marked HELD. */
struct fid *share_fid(uint32_t number);
struct fid *own_fid(uint32_t number);
void let_go(struct fid **fid);
#define HELD __attribute__((cleanup(let_go)))
int add_fid(uint32_t number, uid_t uid, struct node *node, struct xattr *xattr); /* keeps node, takes xattr; 0 or errno */
struct fid *remove_fid(uint32_t number);
void drop_fid(struct fid *fid);
void for_each_fid(void (*action)(struct fid *fid, const void *argument), const void *argument);
void remove_all_fids(void);

/* --- places --- */

void set_place(struct fid *fid, struct node *directory, const char *name); /* keeps directory */
void forget_place(struct fid *fid);
/* Has the fid stand for what is at its place now. To be called without its lock. */
void follow(struct fid *fid);
/* The guest itself has moved the name, or with to NULL, has removed it: who has the file open keeps it. */
void note_move(const struct node *from, const char *old_name, const struct node *to, const char *new_name);

/* The file of a node as a path that libc functions without a directory descriptor take. */
struct node_path {
	char text[12];
};
struct node_path path_of(const struct node *node);

/* --- operations: each reads its fields, writes the reply's, and returns 0 or the errno of Rlerror --- */

typedef int operation(struct request *request);
operation handle_version, handle_attach, handle_walk, handle_clunk, handle_remove, handle_statfs, handle_flush;
operation handle_lopen, handle_lcreate, handle_read, handle_write, handle_readdir, handle_fsync;
operation handle_symlink, handle_mknod, handle_mkdir, handle_link, handle_renameat, handle_unlinkat, handle_readlink;
operation handle_getattr, handle_setattr, handle_xattrwalk, handle_xattrcreate;
operation handle_lock, handle_getlock;
void serve(int connection, const char *root);
void set_root(int fd);
void handle(struct request *request);
uint64_t device_bits(dev_t device);
void set_message_limit(uint32_t size);
uint32_t message_limit(void);
void flush_tag(uint16_t tag);
int set_xattr(const struct fid *fid);
void release_locks(const struct fid *fid);
