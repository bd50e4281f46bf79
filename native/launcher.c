/*
 * containerd-shim-kiln-v2: what containerd executes. Finds or starts kilnd, hands it one request, prints its answer.
 *
 * containerd runs this program two or three times per container and waits for it, so it is C, static, and holds no
 * policy: every decision is kilnd's. Three rules of containerd's contract shape it (containerd core/runtime/v2):
 *   1. stdout and stderr are read as one text (the address, or the error), so nothing is ever written to stderr;
 *   2. containerd waits for EOF on that pipe, so kilnd, which lives on, must not hold it;
 *   3. the printed socket must already accept, so we listen on it ourselves, and a relay that we fork goes on with it
 *      (relay.c): containerd's connections must outlive kilnd.
 *
 * Control protocol (the other end: src/shim/control/request.ts), one request per connection to <state>/kilnd.sock:
 *   request = *( key "=" value NUL ) NUL payload, then shutdown(SHUT_WR)
 *             keys: protocol (2), action (start|delete), namespace, id, bundle, address, ttrpc_address,
 *                   publish_binary, debug (0|1), max_shim_version (MAX_SHIM_VERSION, or nothing),
 *                   launcher_started_ns (CLOCK_REALTIME at the start of main)
 *             payload: the bytes of our stdin for start (containerd's options), empty otherwise; 8 MiB in all
 *   reply   = one byte exit code, the path of the socket that a relay shall listen on (or nothing) NUL,
 *             then the bytes for our stdout until EOF
 *   EOF before the first reply byte: that kilnd was stopping; the request goes to a fresh one, at most 3 times.
 *   delete without a kilnd, and without anything in the state folder that one could know of: answered here.
 * Start of kilnd: KILN_READY_FD=3 names a pipe on which it writes "ready\n", or "error: text", and which it closes.
 */
#define _GNU_SOURCE
#include "relay.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#ifndef KILN_VERSION
#define KILN_VERSION "0.0.0-dev"
#endif
#define NAME "containerd-shim-kiln-v2"
#define MESSAGE_LIMIT (8u << 20) /* bytes of a request or a reply; the same number stands in request.ts */
#ifndef TIME_LIMIT_S
#define TIME_LIMIT_S 60 /* for everything before we print; containerd's own limits are shorter */
#endif
#define TEXT_OF(number) #number
#define TEXT(macro) TEXT_OF(macro)
#define RETRIES 3

struct options {
	const char *namespace, *address, *publish_binary, *id, *bundle, *socket, *debug_socket;
	bool debug, info, version, help;
	const char *action;
};

const char *volatile waiting_for = "";

bool write_all(int fd, const char *data, size_t length)
{
	while (length > 0) {
		ssize_t written = write(fd, data, length);
		if (written < 0 && errno == EINTR)
			continue;
		if (written <= 0)
			return false;
		data += written;
		length -= (size_t)written;
	}
	return true;
}

/* No newline unless a person looks: containerd puts the text in the middle of a sentence of its own. */
void fail(const char *format, ...)
{
	static char text[96 << 10];
	va_list arguments;
	va_start(arguments, format);
	int length = vsnprintf(text, sizeof text, format, arguments);
	va_end(arguments);
	alarm(0);
	if (length > 0)
		write_all(STDOUT_FILENO, text, (size_t)length < sizeof text ? (size_t)length : sizeof text - 1);
	if (isatty(STDOUT_FILENO))
		write_all(STDOUT_FILENO, "\n", 1);
	_exit(1);
}

static void on_time_limit(int signal_number)
{
	(void)signal_number;
	static const char text[] = "kiln: gave up after " TEXT(TIME_LIMIT_S) " s of waiting for ";
	const char *what = waiting_for;
	write_all(STDOUT_FILENO, text, sizeof text - 1);
	write_all(STDOUT_FILENO, what, strlen(what));
	_exit(1);
}

void start_time_limit(void)
{
	sigset_t alarms;
	sigemptyset(&alarms);
	sigaddset(&alarms, SIGALRM);
	sigprocmask(SIG_UNBLOCK, &alarms, NULL);
	signal(SIGALRM, on_time_limit);
	alarm(TIME_LIMIT_S);
}

static void append(struct bytes *bytes, const void *data, size_t length, const char *what)
{
	if (length > MESSAGE_LIMIT - bytes->length)
		fail("kiln: %s is larger than %u bytes", what, MESSAGE_LIMIT);
	if (bytes->length + length > bytes->capacity) {
		bytes->capacity = 2 * (bytes->length + length) + 4096;
		bytes->data = realloc(bytes->data, bytes->capacity);
		if (bytes->data == NULL)
			fail("kiln: out of memory for %s", what);
	}
	memcpy(bytes->data + bytes->length, data, length);
	bytes->length += length;
}

/* Reads to EOF. Returns false, with errno set, when reading fails. */
static bool append_all_of(struct bytes *bytes, int fd, const char *what)
{
	static char chunk[64 << 10];
	for (;;) {
		ssize_t count = read(fd, chunk, sizeof chunk);
		if (count < 0 && errno == EINTR)
			continue;
		if (count <= 0)
			return count == 0;
		append(bytes, chunk, (size_t)count, what);
	}
}

static void append_field(struct bytes *request, const char *key, const char *value)
{
	append(request, key, strlen(key), "the request");
	append(request, "=", 1, "the request");
	append(request, value, strlen(value) + 1, "the request");
}

void make_path(char *path, const char *format, ...)
{
	va_list arguments;
	va_start(arguments, format);
	int length = vsnprintf(path, PATH_MAX, format, arguments);
	va_end(arguments);
	if (length < 0 || length >= PATH_MAX)
		fail("kiln: a path that begins with %.60s is longer than %d bytes", path, PATH_MAX - 1);
}

/* The command line, by the rules of Go's flag package: -x v, -x=v, --x; flags end at the first other word or "--". */

static bool parse_bool(const char *name, const char *text)
{
	static const char *const yes[] = {"1", "t", "T", "true", "TRUE", "True"};
	static const char *const no[] = {"0", "f", "F", "false", "FALSE", "False"};
	for (size_t i = 0; i < sizeof yes / sizeof *yes; i++) {
		if (strcmp(text, yes[i]) == 0)
			return true;
		if (strcmp(text, no[i]) == 0)
			return false;
	}
	fail("kiln: flag -%s takes true or false, not \"%s\"", name, text);
}

static struct options parse_arguments(int count, char **arguments)
{
	struct options options = {.namespace = "", .address = "", .publish_binary = "", .id = "", .bundle = "",
				  .socket = "", .debug_socket = "", .action = ""};
	const struct {
		const char *name;
		const char **text;
		bool *truth;
	} flags[] = {
		{"namespace", &options.namespace, NULL},
		{"address", &options.address, NULL},
		{"publish-binary", &options.publish_binary, NULL},
		{"id", &options.id, NULL},
		{"bundle", &options.bundle, NULL},
		{"socket", &options.socket, NULL}, /* this and the next: part of the contract, of no use to us */
		{"debug-socket", &options.debug_socket, NULL},
		{"debug", NULL, &options.debug},
		{"info", NULL, &options.info},
		{"v", NULL, &options.version},
		{"version", NULL, &options.version},
		{"h", NULL, &options.help},
		{"help", NULL, &options.help},
	};
	const size_t flag_count = sizeof flags / sizeof *flags;
	int next = 1;

	for (; next < count && arguments[next][0] == '-' && arguments[next][1] != '\0'; next++) {
		if (strcmp(arguments[next], "--") == 0) {
			next++;
			break;
		}
		const char *name = arguments[next] + (arguments[next][1] == '-' ? 2 : 1);
		const char *equals = strchr(name, '=');
		size_t length = equals ? (size_t)(equals - name) : strlen(name), i = 0;
		while (i < flag_count && (strlen(flags[i].name) != length || memcmp(flags[i].name, name, length) != 0))
			i++;
		if (i == flag_count)
			fail("kiln: unknown flag %s; see %s -help", arguments[next], NAME);
		if (flags[i].truth)
			*flags[i].truth = equals ? parse_bool(flags[i].name, equals + 1) : true;
		else if (equals)
			*flags[i].text = equals + 1;
		else if (++next < count)
			*flags[i].text = arguments[next];
		else
			fail("kiln: flag -%s needs a value", flags[i].name);
	}
	if (next < count)
		options.action = arguments[next++];
	if (next < count)
		fail("kiln: unexpected argument \"%s\" after \"%s\"", arguments[next], options.action);
	return options;
}

/* Talking to kilnd. */

/* False when the connection ended before a whole reply: that kilnd was stopping. */
static bool exchange(int fd, const struct bytes *request, struct bytes *reply)
{
	for (size_t sent = 0; sent < request->length;) {
		ssize_t count = send(fd, request->data + sent, request->length - sent, MSG_NOSIGNAL);
		if (count < 0 && errno == EINTR)
			continue;
		if (count < 0)
			break; /* a reply may be there all the same: kilnd refuses what it need not read to its end */
		sent += (size_t)count;
	}
	shutdown(fd, SHUT_WR);
	waiting_for = "kilnd's answer";
	reply->length = 0;
	bool whole = append_all_of(reply, fd, "kilnd's reply");
	close(fd);
	return whole && reply->length > 0;
}

/* Does what kilnd's reply says, and exits. */
static void __attribute__((noreturn)) obey(struct bytes *reply, struct relay *relay)
{
	const char *path = reply->data + 1;
	const char *end = memchr(path, '\0', reply->length - 1);
	if (end == NULL)
		fail("kiln: kilnd's answer has no end of the socket path: launcher and kilnd are of different versions");
	if (*path) {
		relay->socket_path = path;
		ensure_relay(relay);
	}
	alarm(0);
	const char *text = end + 1;
	bool printed = write_all(STDOUT_FILENO, text, reply->length - (size_t)(text - reply->data));
	_exit(printed ? (unsigned char)reply->data[0] : 1);
}

/* A containerd.task.v2.DeleteResponse: what kilnd, too, answers of a container that it does not know (task-service.ts). */
static void __attribute__((noreturn)) answer_unknown(void)
{
	struct timespec now;
	unsigned char text[16] = {0x10, 137, 1 /* exit_status: 137 */, 0x1a, 0 /* exited_at, its length */, 0x08};
	size_t length = 6;
	clock_gettime(CLOCK_REALTIME, &now);
	unsigned long long seconds = (unsigned long long)now.tv_sec;
	for (; seconds > 0x7f && length < sizeof text - 1; seconds >>= 7)
		text[length++] = (unsigned char)(seconds | 0x80);
	text[length++] = (unsigned char)seconds;
	text[4] = (unsigned char)(length - 5);
	_exit(write_all(STDOUT_FILENO, (const char *)text, length) ? 0 : 1);
}

static void __attribute__((noreturn)) run(const struct options *options, const char *started_ns, char *title,
					  size_t title_room)
{
	bool start = strcmp(options->action, "start") == 0;
	struct bytes context = {0}, request = {0}, reply = {0};
	char cwd[PATH_MAX] = "", bundle[PATH_MAX];
	if (!*options->namespace)
		fail("kiln: -namespace is missing");
	if (!*options->id)
		fail("kiln: -id is missing");
	find_paths();
	if ((start || options->bundle[0] != '/') && getcwd(cwd, sizeof cwd) == NULL)
		fail("kiln: cannot tell the working directory: %s", strerror(errno));
	if (start || !*options->bundle)
		make_path(bundle, "%s", cwd);
	else
		make_path(bundle, "%s%s%s", cwd, *cwd ? "/" : "", options->bundle);

	append_field(&context, "namespace", options->namespace);
	append_field(&context, "id", options->id);
	append_field(&context, "bundle", bundle);
	append_field(&context, "address", options->address);
	append_field(&context, "ttrpc_address", getenv("TTRPC_ADDRESS") ?: "");
	append_field(&context, "publish_binary", options->publish_binary);
	append_field(&context, "debug", options->debug ? "1" : "0");
	append_field(&context, "max_shim_version", getenv("MAX_SHIM_VERSION") ?: "");
	append_field(&context, "launcher_started_ns", started_ns);
	struct relay relay = {.bundle = bundle,
			      .context = context,
			      .title = title,
			      .title_room = title_room,
			      .namespace = strdup(options->namespace),
			      .id = strdup(options->id)};
	append_field(&request, "protocol", PROTOCOL);
	append_field(&request, "action", options->action);
	append(&request, context.data, context.length, "the request");
	append(&request, "", 1, "the request");
	waiting_for = "the end of standard input";
	/* Read before the first attempt: a pipe can be read only once, the request may have to be sent again. */
	if (start && !isatty(STDIN_FILENO) && !append_all_of(&request, STDIN_FILENO, "standard input"))
		fail("kiln: cannot read standard input: %s", strerror(errno));

	for (int attempt = 0; attempt <= RETRIES; attempt++) {
		off_t from = stderr_size();
		int fd = connect_or_start(start);
		if (fd < 0)
			answer_unknown();
		if (exchange(fd, &request, &reply)) {
			free(request.data);
			obey(&reply, &relay);
		}
		if (attempt == RETRIES) {
			char tail[STDERR_TAIL + 1];
			read_stderr_tail(tail, from);
			fail("kiln: kilnd ended %d times in a row before it answered%s%s", RETRIES + 1,
			     *tail ? "; its last words: " : "", tail);
		}
	}
	fail("kiln: unreachable");
}

static void __attribute__((noreturn)) print_info(void)
{
	char path[PATH_MAX];
	struct bytes info = {0};
	find_paths();
	make_path(path, "%s/../share/runtime-info.bin", binary_dir);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0 || !append_all_of(&info, fd, path))
		fail("kiln: cannot read %s: %s", path, strerror(errno));
	_exit(write_all(STDOUT_FILENO, info.data, info.length) ? 0 : 1);
}

int main(int count, char **arguments)
{
	struct timespec now;
	char started_ns[32];
	/* The arguments lie one after the other (proc(5), cmdline); taken now, since the parser moves on in them. */
	const char *last = count > 0 ? arguments[count - 1] : NULL;
	size_t room = last ? (size_t)(last + strlen(last) + 1 - arguments[0]) : 0;
	clock_gettime(CLOCK_REALTIME, &now);
	snprintf(started_ns, sizeof started_ns, "%lld", (long long)now.tv_sec * 1000000000LL + now.tv_nsec);

	/* With 0, 1 or 2 closed, the next descriptor we open would take its place and be written to. */
	for (int fd; (fd = open("/dev/null", O_RDWR)) >= 0;)
		if (fd > STDERR_FILENO) {
			close(fd);
			break;
		}
	umask(022);
	struct options options = parse_arguments(count, arguments);
	if (options.help) {
		static const char usage[] =
			"usage: " NAME " -namespace NS -id ID [-address SOCKET] [-publish-binary PATH]\n"
			"         [-bundle DIR] [-debug] start|delete\n"
			"       " NAME " -info | -v\n"
			"Run by containerd, not by hand. KILN_STATE_DIR (default /run/kiln) says which kilnd is meant.\n";
		return write_all(STDOUT_FILENO, usage, sizeof usage - 1) ? 0 : 1;
	}
	if (options.version) {
		static const char version[] = NAME " " KILN_VERSION "\n";
		return write_all(STDOUT_FILENO, version, sizeof version - 1) ? 0 : 1;
	}
	if (options.info)
		print_info();
	if (strcmp(options.action, "start") != 0 && strcmp(options.action, "delete") != 0)
		fail("kiln: the action must be start or delete, not \"%s\"", options.action);
	start_time_limit();
	run(&options, started_ns, arguments[0], room);
}
