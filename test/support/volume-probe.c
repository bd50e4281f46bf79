/*
 * What a program can do with files, tried out one by one in a directory. Prints a line for each: what, and the result.
 * The same lines must come from a local directory and from a volume.
 *
 *   volume-probe DIRECTORY      as root
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/fs.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <unistd.h>

static void say(const char *format, ...) __attribute__((format(printf, 1, 2)));
static void say(const char *format, ...)
{
	va_list arguments;
	va_start(arguments, format);
	vprintf(format, arguments);
	va_end(arguments);
	putchar('\n');
	fflush(stdout);
}

static void tell(const char *what, long result)
{
	if (result < 0)
		say("%s: %s", what, strerrorname_np(errno));
	else
		say("%s: %ld", what, result);
}

#define TRY(expression) tell(#expression, (long)(expression))

static int make(const char *name, const char *content, mode_t mode)
{
	int fd = open(name, O_RDWR | O_CREAT | O_EXCL, mode);
	if (fd >= 0 && write(fd, content, strlen(content)) < 0)
		say("%s: cannot be written: %m", name);
	return fd;
}

static void show(const char *name)
{
	char content[64] = "";
	int fd = open(name, O_RDONLY);
	if (fd < 0) {
		tell(name, -1);
		return;
	}
	ssize_t length = read(fd, content, sizeof(content) - 1);
	say("%s holds \"%.*s\"", name, (int)length, content);
	close(fd);
}

static void show_owner(const char *name)
{
	struct stat s;
	if (lstat(name, &s) < 0)
		tell(name, -1);
	else
		say("%s has mode %o, owner %u:%u, %lu links", name, s.st_mode, s.st_uid, s.st_gid, (unsigned long)s.st_nlink);
}

static void names(void)
{
	close(make("a", "one", 0644));
	TRY(rename("a", "b"));
	TRY(open("a", O_RDONLY));
	close(make("c", "two", 0644));
	TRY(rename("c", "b"));
	show("b");
	TRY(link("b", "hard"));
	show_owner("b");
	TRY(symlink("b", "soft"));
	show("soft");
	TRY(symlink("loop", "loop"));
	TRY(open("loop", O_RDONLY));
	TRY(mkdir("dir", 0750));
	show_owner("dir");
	TRY(unlink("dir"));
	TRY(rmdir("b"));
	close(make("dir/inside", "", 0600));
	TRY(rmdir("dir"));
	TRY(rename("dir", "moved"));
	TRY(rename("moved", "moved/below"));
	TRY(unlink("moved/inside"));
	TRY(rmdir("moved"));
	TRY(open("b", O_CREAT | O_EXCL | O_RDWR, 0600));
	TRY(renameat2(AT_FDCWD, "hard", AT_FDCWD, "b", RENAME_NOREPLACE));
	char longest[257];
	memset(longest, 'n', 255);
	longest[255] = '\0';
	TRY(close(make(longest, "", 0600)));
	TRY(unlink(longest));
	memset(longest, 'n', 256);
	longest[256] = '\0';
	TRY(open(longest, O_CREAT | O_RDWR, 0600));
}

static void unlinked(void)
{
	struct stat s;
	char content[8] = "";
	int fd = make("gone", "content", 0644);
	TRY(unlink("gone"));
	TRY(open("gone", O_RDONLY));
	TRY(pread(fd, content, 7, 0));
	TRY(pwrite(fd, "more", 4, 7));
	TRY(fstat(fd, &s));
	say("size %ld", (long)s.st_size);
	TRY(fchmod(fd, 0600));
	TRY(ftruncate(fd, 3));
	TRY(fsync(fd));
	TRY(lseek(fd, 0, SEEK_END));
	close(fd);
	close(make("replaced", "old", 0644));
	int old = open("replaced", O_RDWR);
	close(make("new", "new", 0644));
	TRY(rename("new", "replaced"));
	TRY(pread(old, content, 3, 0));
	say("the open one still has \"%.3s\"", content);
	show("replaced");
	close(old);
}

static int lock(int fd, int command, short type)
{
	struct flock l = {.l_type = type, .l_whence = SEEK_SET};
	return fcntl(fd, command, &l);
}

/* What another process gets. */
static int in_child(int (*action)(int fd), const char *name)
{
	int status = 0;
	pid_t pid = fork();
	if (pid == 0) {
		int fd = open(name, O_RDWR);
		_exit(action(fd) == 0 ? 0 : errno);
	}
	waitpid(pid, &status, 0);
	errno = WEXITSTATUS(status);
	return errno == 0 ? 0 : -1;
}

static int flock_it(int fd) { return flock(fd, LOCK_EX | LOCK_NB); }
static int share_it(int fd) { return flock(fd, LOCK_SH | LOCK_NB); }
static int record_lock_it(int fd) { return lock(fd, F_SETLK, F_WRLCK); }

static void locks(void)
{
	int fd = make("locked", "x", 0666);
	TRY(flock(fd, LOCK_EX));
	TRY(in_child(flock_it, "locked"));
	TRY(flock(fd, LOCK_SH));
	TRY(in_child(share_it, "locked"));
	TRY(flock(fd, LOCK_UN));
	TRY(in_child(flock_it, "locked"));
	TRY(lock(fd, F_SETLK, F_WRLCK));
	TRY(in_child(record_lock_it, "locked"));
	TRY(lock(fd, F_SETLK, F_UNLCK));
	TRY(in_child(record_lock_it, "locked"));
	TRY(lock(fd, F_OFD_SETLK, F_WRLCK));
	TRY(in_child(record_lock_it, "locked"));
	close(fd);
	TRY(in_child(record_lock_it, "locked"));
}

static void attributes(void)
{
	char value[16] = "";
	close(make("attr", "x", 0644));
	TRY(setxattr("attr", "user.kiln", "warm", 4, 0));
	TRY(setxattr("attr", "user.kiln", "hot", 3, XATTR_CREATE));
	TRY(setxattr("attr", "user.empty", "", 0, 0));
	TRY(getxattr("attr", "user.kiln", value, sizeof(value)));
	say("user.kiln is \"%s\"", value);
	TRY(getxattr("attr", "user.kiln", value, 2));
	TRY(removexattr("attr", "user.empty"));
	TRY(getxattr("attr", "user.empty", value, sizeof(value)));
	TRY(chmod("attr", 06751));
	TRY(chown("attr", 1234, 4321));
	show_owner("attr");
	struct timespec times[2] = {{.tv_sec = 1, .tv_nsec = 234567890}, {.tv_sec = 2000000000, .tv_nsec = 987654321}};
	TRY(utimensat(AT_FDCWD, "attr", times, 0));
	struct stat s;
	TRY(stat("attr", &s));
	say("times %ld.%09ld %ld.%09ld", s.st_atim.tv_sec, s.st_atim.tv_nsec, s.st_mtim.tv_sec, s.st_mtim.tv_nsec);
}

static void contents(void)
{
	struct stat s;
	int fd = make("sparse", "begin", 0644);
	TRY(ftruncate(fd, 1L << 32));
	TRY(pwrite(fd, "end", 3, (1L << 32) - 3));
	TRY(fsync(fd));
	TRY(fdatasync(fd));
	TRY(fstat(fd, &s));
	say("%ld bytes, %s", (long)s.st_size, s.st_blocks < 1000 ? "with holes" : "without holes");
	TRY(ftruncate(fd, 5));
	close(fd);
	show("sparse");
	int one = open("log", O_WRONLY | O_CREAT | O_APPEND, 0644);
	int two = open("log", O_WRONLY | O_APPEND);
	TRY(write(one, "a", 1));
	TRY(write(two, "b", 1));
	TRY(write(one, "c", 1));
	show("log");
	TRY(close(open("log", O_WRONLY | O_TRUNC)));
	show("log");
	int from = open("sparse", O_RDONLY), to = open("log", O_WRONLY);
	TRY(copy_file_range(from, NULL, to, NULL, 5, 0));
	show("log");
	char *large = malloc(3000001);
	memset(large, 'l', 3000001);
	int big = make("large", "", 0644);
	TRY(write(big, large, 3000001));
	memset(large, 0, 3000001);
	TRY(pread(big, large, 3000001, 0));
	say("it is %s", large[0] == 'l' && large[1500000] == 'l' && large[3000000] == 'l' ? "the same" : "another");
	close(big);
	free(large);
	TRY(truncate("large", 0));
}

static void mappings(void)
{
	int fd = make("mapped", "0123456789", 0644);
	TRY(ftruncate(fd, 3 * 4096));
	char *map = mmap(NULL, 3 * 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	TRY(map == MAP_FAILED ? -1 : 0);
	if (map == MAP_FAILED)
		return;
	map[0] = 'M';
	map[2 * 4096] = 'N';
	TRY(msync(map, 3 * 4096, MS_SYNC));
	show("mapped");
	TRY(pwrite(fd, "xy", 2, 1));
	say("the mapping has \"%.10s\"", map);
	pid_t pid = fork();
	if (pid == 0) {
		map[1] = 'C';
		_exit(0);
	}
	waitpid(pid, NULL, 0);
	say("the mapping has \"%.10s\"", map);
	TRY(munmap(map, 3 * 4096));
	show("mapped");
	close(fd);
}

static void special(void)
{
	TRY(mkfifo("fifo", 0600));
	pid_t pid = fork();
	if (pid == 0) {
		int out = open("fifo", O_WRONLY);
		_exit(write(out, "through", 7) == 7 ? 0 : 1);
	}
	show("fifo");
	waitpid(pid, NULL, 0);
	struct sockaddr_un address = {.sun_family = AF_UNIX, .sun_path = "socket"};
	int server = socket(AF_UNIX, SOCK_STREAM, 0), client = socket(AF_UNIX, SOCK_STREAM, 0);
	TRY(bind(server, (struct sockaddr *)&address, sizeof(address)));
	TRY(listen(server, 1));
	TRY(connect(client, (struct sockaddr *)&address, sizeof(address)));
}

static void odd_names(void)
{
	const char *odd[] = {"with space", "new\nline", "\xc3\xbc-\xe5\x90\x8d-\xf0\x9f\x94\xa5", "\xff\xfe", "back\\slash\"'", "-dash", "...", "*?["};
	TRY(mkdir("odd", 0755));
	for (size_t i = 0; i < sizeof(odd) / sizeof(*odd); i++) {
		char path[64];
		snprintf(path, sizeof(path), "odd/%s", odd[i]);
		close(make(path, odd[i], 0644));
	}
	unsigned long sum = 0, count = 0;
	DIR *dir = opendir("odd");
	for (struct dirent *entry; (entry = readdir(dir)) != NULL; count++)
		for (const char *c = entry->d_name; *c != '\0'; c++)
			sum += (unsigned char)*c;
	closedir(dir);
	say("%lu odd names, sum %lu", count, sum);
}

static void as_user(void)
{
	close(make("roots", "secret", 0600));
	close(make("groups", "shared", 0640));
	TRY(chown("groups", 0, 2000));
	TRY(mkdir("open", 0777));
	TRY(chmod("open", 01777));
	TRY(mkdir("setgid", 0777));
	TRY(chown("setgid", 0, 3000));
	TRY(chmod("setgid", 02777));
	close(make("open/roots", "", 0666));
	pid_t pid = fork();
	if (pid == 0) {
		const gid_t groups[] = {2000};
		if (setgroups(1, groups) != 0 || setresgid(1000, 1000, 1000) != 0 || setresuid(1000, 1000, 1000) != 0)
			say("cannot become another user: %m");
		show("roots");
		show("groups");
		TRY(open("groups", O_RDWR));
		TRY(open("mine", O_CREAT | O_RDWR, 0600));
		TRY(close(make("open/mine", "x", 0600)));
		show_owner("open/mine");
		TRY(mkdir("open/dir", 0700));
		show_owner("open/dir");
		TRY(symlink("x", "open/link"));
		show_owner("open/link");
		TRY(close(make("setgid/mine", "x", 0600)));
		show_owner("setgid/mine");
		TRY(unlink("open/roots"));
		TRY(chmod("groups", 0777));
		TRY(chown("open/mine", 0, 0));
		TRY(chown("open/mine", 1000, 2000));
		TRY(close(open("open/none", O_CREAT | O_RDWR, 0000)));
		TRY(open("open/none", O_RDONLY));
		TRY(rename("open/mine", "open/mine2"));
		TRY(unlink("open/mine2"));
		_exit(0);
	}
	waitpid(pid, NULL, 0);
}

static void many(void)
{
	TRY(mkdir("many", 0755));
	char path[64];
	long errors = 0;
	for (int i = 0; i < 2000; i++) {
		snprintf(path, sizeof(path), "many/%d", i);
		int fd = make(path, path, 0644);
		if (fd < 0 || close(fd) < 0)
			errors++;
	}
	long count = 0;
	DIR *dir = opendir("many");
	while (readdir(dir) != NULL)
		count++;
	closedir(dir);
	say("%ld errors, %ld names", errors, count);
	/* Removing while reading. */
	dir = opendir("many");
	for (struct dirent *entry; (entry = readdir(dir)) != NULL;) {
		snprintf(path, sizeof(path), "many/%.40s", entry->d_name);
		if (entry->d_name[0] != '.' && unlink(path) < 0)
			errors++;
	}
	closedir(dir);
	say("%ld errors", errors);
	TRY(rmdir("many"));
}

int main(int count, char **arguments)
{
	setvbuf(stdout, NULL, _IONBF, 0);
	if (count < 2 || chdir(arguments[1]) != 0) {
		perror("volume-probe");
		return 1;
	}
	umask(0);
	void (*all[])(void) = {names, unlinked, locks, attributes, contents, mappings, special, odd_names, as_user, many};
	for (size_t i = 0; i < sizeof(all) / sizeof(*all); i++)
		all[i]();
	return 0;
}
