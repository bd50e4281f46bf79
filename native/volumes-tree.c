/*
 * The export tree: a mount namespace whose root is a small read-only tmpfs with one mount point per volume.
 *
 * The sources are cloned with open_tree(2) in the namespace of kilnd, where their paths mean what the user meant, and
 * carried over as descriptors. On the host no mount appears or changes.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "volumes.h"

static bool has_option(const struct volume *volume, const char *option)
{
	size_t length = strlen(option);
	for (const char *at = volume->options; at != NULL; at = strchr(at, ',')) {
		at += *at == ',';
		if (strncmp(at, option, length) == 0 && (at[length] == ',' || at[length] == '\0'))
			return true;
	}
	return false;
}

/*
 * The server never executes, opens no device, and follows no symbolic link: all that is the guest's. A clone of a
 * shared mount would be shared, too, and hand what is mounted in it back to the host; as a slave it only receives.
 */
void clone_source(struct volume *volume)
{
	struct stat stat;
	struct mount_attr attributes = {
		.attr_set = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC | MOUNT_ATTR_NOSYMFOLLOW,
		.propagation = has_option(volume, "slave") ? MS_SLAVE : MS_PRIVATE,
	};
	unsigned flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC;
	if (has_option(volume, "recursive"))
		flags |= AT_RECURSIVE;
	if (has_option(volume, "rro"))
		attributes.attr_set |= MOUNT_ATTR_RDONLY;
	volume->tree = open_tree(AT_FDCWD, volume->source, flags);
	if (volume->tree < 0)
		fail("cannot open the source", volume->source);
	if (fstat(volume->tree, &stat) < 0)
		fail("cannot look at the source", volume->source);
	volume->directory = S_ISDIR(stat.st_mode);
	if (!volume->directory && !S_ISREG(stat.st_mode)) {
		errno = ENOTSUP;
		fail("neither a directory nor a regular file is", volume->source);
	}
	if (mount_setattr(volume->tree, "", AT_EMPTY_PATH | AT_RECURSIVE, &attributes, sizeof attributes) < 0)
		fail("cannot set the mount options of", volume->source);
	/* What is mounted below keeps its own. */
	struct mount_attr read_only = {.attr_set = MOUNT_ATTR_RDONLY};
	if (has_option(volume, "ro") && mount_setattr(volume->tree, "", AT_EMPTY_PATH, &read_only, sizeof read_only) < 0)
		fail("cannot make read-only", volume->source);
}

static void attach(int root, const struct volume *volume)
{
	int made = volume->directory ? mkdirat(root, volume->index, 0555)
				     : mknodat(root, volume->index, S_IFREG | 0444, 0);
	if (made < 0)
		fail("cannot make the mount point of", volume->source);
	/* Beside the root, of which `root` may be a clone. */
	char path[16];
	snprintf(path, sizeof path, "/%s", volume->index);
	if (move_mount(volume->tree, "", AT_FDCWD, path, MOVE_MOUNT_F_EMPTY_PATH) < 0)
		fail("cannot mount", volume->source);
	close(volume->tree);
}

static void set_root_access(int root, uint64_t set, uint64_t clear)
{
	struct mount_attr attributes = {.attr_set = set, .attr_clr = clear};
	if (mount_setattr(root, "", AT_EMPTY_PATH, &attributes, sizeof attributes) < 0)
		fail("cannot set the mount options of the", "root");
}

/*
 * Afterwards the working directory is /proc/self/fd, cloned so that there is nothing above it: the only way to open,
 * by a path, a file that is held by descriptor. "/" is the export tree.
 */
void enter_export_root(const char *directory, const struct volume *volumes, size_t count)
{
	int descriptors = open_tree(AT_FDCWD, "/proc/self/fd", OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
	if (descriptors < 0)
		fail("cannot open", "/proc/self/fd");
	if (unshare(CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS) < 0)
		fail("cannot make", "namespaces");
	/* Before the mount, or the host would see it. */
	if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0)
		fail("cannot make private the mounts below", "/");
	if (mount("kiln-volumes", directory, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=0555,nr_inodes=4096,size=4k") < 0)
		fail("cannot mount the root on", directory);
	/* "." twice: the old root is stacked on the new one, and is what umount2 then finds (pivot_root(2)). */
	if (chdir(directory) < 0 || syscall(SYS_pivot_root, ".", ".") < 0 || umount2(".", MNT_DETACH) < 0 || chdir("/") < 0)
		fail("cannot change the root to", directory);
	int root = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
	if (root < 0)
		fail("cannot open the", "root");
	for (size_t i = 0; i < count; i++)
		attach(root, &volumes[i]);
	set_root_access(root, MOUNT_ATTR_RDONLY, 0);
	close(root);
	if (fchdir(descriptors) < 0)
		fail("cannot enter", "/proc/self/fd");
	close(descriptors);
}

/* The root stays read-only for the server: names are made through a clone that only we have. */
void add_to_export_root(int mount_namespace, const struct volume *volumes, size_t count)
{
	if (setns(mount_namespace, CLONE_NEWNS) < 0)
		fail("cannot enter the", "server's mount namespace");
	int root = open_tree(AT_FDCWD, "/", OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
	if (root < 0)
		fail("cannot clone the", "root");
	set_root_access(root, 0, MOUNT_ATTR_RDONLY);
	for (size_t i = 0; i < count; i++)
		attach(root, &volumes[i]);
}

/* What is not there any more is none of an error. Who has a file of it open keeps that. */
void remove_from_export_root(int mount_namespace, char *const *indexes, size_t count)
{
	if (setns(mount_namespace, CLONE_NEWNS) < 0)
		fail("cannot enter the", "server's mount namespace");
	int root = open_tree(AT_FDCWD, "/", OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
	if (root < 0)
		fail("cannot clone the", "root");
	set_root_access(root, 0, MOUNT_ATTR_RDONLY);
	for (size_t i = 0; i < count; i++) {
		char path[16];
		snprintf(path, sizeof path, "/%s", indexes[i]);
		if (umount2(path, MNT_DETACH | UMOUNT_NOFOLLOW) < 0 && errno != EINVAL && errno != ENOENT)
			fail("cannot unmount", path);
		if (unlinkat(root, indexes[i], 0) < 0 && errno == EISDIR)
			unlinkat(root, indexes[i], AT_REMOVEDIR);
	}
}
