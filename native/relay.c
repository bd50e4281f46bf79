/*
 * kiln-relay: owns the socket that containerd dials, and outlives kilnd.
 *
 * containerd takes a closed connection for a dead shim and deletes the container at once. So neither the socket of an
 * endpoint nor containerd's connections to it may be kilnd's own: each endpoint has one of these, forked by the
 * launcher's `start`, and kilnd may end and come back behind it.
 *
 *   containerd ──▶ <state>/s/<key> ── relay ──▶ <state>/relay.sock (kilnd)
 *                                       one session per connection of containerd, and one keeper
 *
 * Protocol with kilnd (the other end: src/shim/relay/). Each connection begins with a header, in the form of the control
 * protocol: *( key "=" value NUL ) NUL. Keys: protocol, role (keeper|session), socket (the path we listen on), relay_pid,
 * client (its number here; 0 for the keeper), replayed, and all that the launcher was started with (launcher.c). Then:
 *   session: ttrpc frames, both ways. The first `replayed` requests were given to an earlier kilnd, which did not answer.
 *   keeper:  messages, each ended by NUL. From kilnd:
 *              "welcome"        this endpoint is served; sessions come only after it
 *              "hold " PATH     keep this FIFO open     } each answered, in order, with "ok" or "error " and the reason
 *              "release " PATH  close it                }
 *              "end"            the endpoint is over: listen no more, close each client when its session has ended, exit
 * When the keeper connection ends without "end", kilnd has died: it is started, as the launcher does it. Requests wait
 * for it; after ten seconds they are answered Unavailable, but for Wait, which waits for ever.
 */
#define _GNU_SOURCE
#include "relay.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#ifndef UNAVAILABLE_AFTER_MS
#define UNAVAILABLE_AFTER_MS 10000
#endif
#define PAUSE_LIMIT_MS 5000 /* between attempts to start kilnd */
#define FIRST_PAUSE_MS 100  /* after the second attempt; it doubles */
#define GOOD_LIFE_MS 5000   /* a kilnd that lived so long makes the next attempt a first one */
#define RETRY_MS 20	    /* where a connection cannot be made just now, of which there is no event */
#define LAST_WORDS_MS 1000  /* for clients, when kilnd dies while the endpoint ends */
#define MESSAGE_ROOM (PATH_MAX + 32)

static struct relay *self;
static int listener;
static char relay_socket[PATH_MAX];

static int keeper = -1;
static bool welcomed, ending;
static char message[MESSAGE_ROOM]; /* from kilnd, arriving */
static size_t message_length;
static char answers[MESSAGE_ROOM]; /* to kilnd; it is not read from until it has taken them */
static size_t answers_length;

static int64_t lost_at;	  /* when kilnd was lost; it is not here since */
static bool gave_up;	  /* requests are answered Unavailable */
static int64_t retry_at;  /* for the next connection */
static int64_t start_at;  /* for the next start, not before */
static int64_t pause_ms;
static int64_t refused_ms = RETRY_MS; /* the pause after a kilnd that did not say welcome */
static int64_t end_by;	  /* 0: no limit yet */
static int64_t welcomed_at;

int64_t now_ms(void)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static int64_t doubled(int64_t pause)
{
	return 2 * pause < PAUSE_LIMIT_MS ? 2 * pause : PAUSE_LIMIT_MS;
}

/* The end. */

static void __attribute__((noreturn)) end_now(void)
{
	remove_socket(listener);
	_exit(0);
}

/* Nobody can reach us, and there is nothing to keep: the bundle has gone with its container, or our socket has. */
static bool is_abandoned(void)
{
	struct stat status;
	return client_count() == 0 && ((stat(self->bundle, &status) < 0 && errno == ENOENT) || !socket_is_ours());
}

/* Starting kilnd. */

static void start_kilnd_aside(void)
{
	if (is_abandoned())
		end_now();
	start_at = now_ms() + pause_ms;
	pause_ms = pause_ms ? doubled(pause_ms) : FIRST_PAUSE_MS;
	launch_starter();
}

static void hear_starter(void)
{
	if (!read_starter())
		return;
	if (gave_up)
		answer_unavailable(why_no_kilnd());
	retry_at = 0;
}

/* Connections to kilnd. */

/* A socket on which the header has been sent, or -1 with errno. */
static int open_connection(const char *role, unsigned client, size_t replayed)
{
	char start[320];
	int length = snprintf(start, sizeof start,
			      "protocol=%s%crole=%s%csocket=%s%crelay_pid=%d%cclient=%u%creplayed=%zu%c", PROTOCOL, 0, role,
			      0, self->socket_path, 0, (int)getpid(), 0, client, 0, replayed, 0);
	int fd = dial(relay_socket, SOCK_NONBLOCK);
	if (fd < 0)
		return -1;
	struct iovec parts[] = {{start, (size_t)length}, {self->context.data, self->context.length}, {(char *)"", 1}};
	struct msghdr header = {.msg_iov = parts, .msg_iovlen = 3};
	/* A new socket takes it whole: its buffer is larger than the limits of what is in it. */
	if (sendmsg(fd, &header, MSG_NOSIGNAL) == length + (ssize_t)self->context.length + 1)
		return fd;
	close(fd);
	errno = EAGAIN;
	return -1;
}

static int open_session(unsigned client, size_t replayed)
{
	return open_connection("session", client, replayed);
}

static void lose_keeper(void)
{
	int64_t now = now_ms();
	close(keeper);
	keeper = -1;
	message_length = answers_length = 0;
	if (ending) {
		end_by = now + LAST_WORDS_MS;
		return;
	}
	if (welcomed && now - welcomed_at >= GOOD_LIFE_MS)
		pause_ms = 0;
	if (lost_at == 0)
		lost_at = now;
	/* One that lets us in and never says welcome is asked less and less often. */
	retry_at = welcomed ? 0 : now + refused_ms;
	refused_ms = welcomed ? RETRY_MS : doubled(refused_ms);
	welcomed = false;
}

static void find_kilnd(void)
{
	keeper = open_connection("keeper", 0, 0);
	if (keeper >= 0)
		return;
	if (errno != ENOENT && errno != ECONNREFUSED)
		retry_at = now_ms() + RETRY_MS;
	else if (now_ms() < start_at)
		retry_at = start_at;
	else
		start_kilnd_aside();
	if (starter_fd() < 0 && retry_at < now_ms())
		retry_at = now_ms() + RETRY_MS;
}

/* What kilnd says. */

static void flush_answers(void)
{
	ssize_t sent = send(keeper, answers, answers_length, MSG_NOSIGNAL | MSG_DONTWAIT);
	if (sent < 0 && errno != EAGAIN && errno != EINTR)
		answers_length = 0; /* kilnd is gone; reading tells when */
	if (sent <= 0)
		return;
	memmove(answers, answers + sent, answers_length - (size_t)sent);
	answers_length -= (size_t)sent;
}

static void answer(const char *problem)
{
	int length = snprintf(answers + answers_length, sizeof answers - answers_length, problem ? "error %s" : "ok",
			      problem);
	answers_length += (size_t)length + 1;
}

static void obey(const char *text)
{
	if (strcmp(text, "welcome") == 0) {
		welcomed = true;
		welcomed_at = now_ms();
		lost_at = 0;
		gave_up = false;
		answer_unavailable(NULL);
	} else if (strcmp(text, "end") == 0) {
		ending = true;
		remove_socket(listener);
		listener = -1;
		end_clients();
	} else if (strncmp(text, "hold ", 5) == 0) {
		answer(hold_fifo(text + 5));
	} else if (strncmp(text, "release ", 8) == 0) {
		release_fifo(text + 8);
		answer(NULL);
	} else {
		answer("unknown message");
	}
}

/* As long as there is room for an answer; kilnd that does not take them is not heard. */
static void obey_all(void)
{
	size_t start = 0;
	char *end;
	while (answers_length < sizeof answers - 512 &&
	       (end = memchr(message + start, '\0', message_length - start)) != NULL) {
		obey(message + start);
		start = (size_t)(end - message) + 1;
	}
	memmove(message, message + start, message_length - start);
	message_length -= start;
	if (answers_length > 0)
		flush_answers();
}

static void hear_kilnd(void)
{
	ssize_t length = recv(keeper, message + message_length, sizeof message - message_length, MSG_DONTWAIT);
	if (length < 0 && (errno == EAGAIN || errno == EINTR))
		return;
	if (length <= 0) { /* also a message that is longer than any path: there is no room to read into */
		lose_keeper();
		return;
	}
	message_length += (size_t)length;
	obey_all();
}

/* The life of a relay. */

static void accept_client(void)
{
	int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
	if (fd >= 0)
		add_client(fd);
}

static void look_after_kilnd(void)
{
	if (lost_at != 0 && !gave_up && now_ms() >= lost_at + UNAVAILABLE_AFTER_MS) {
		gave_up = true;
		answer_unavailable(why_no_kilnd());
	}
	if (keeper < 0 && starter_fd() < 0 && now_ms() >= retry_at)
		find_kilnd();
	if (welcomed)
		open_sessions(open_session);
}

static int64_t earlier(int64_t one, int64_t other)
{
	return one < other ? one : other;
}

/* In ms for poll(2); -1 where only an event can bring something new. */
static int time_to_sleep(int64_t reap_at)
{
	int64_t at = reap_at;
	if (ending) {
		if (end_by != 0)
			at = earlier(at, end_by);
	} else {
		if (lost_at != 0 && !gave_up)
			at = earlier(at, lost_at + UNAVAILABLE_AFTER_MS);
		if (keeper < 0 && starter_fd() < 0)
			at = earlier(at, retry_at);
		if (welcomed)
			at = earlier(at, next_session_at());
	}
	if (at == INT64_MAX)
		return -1;
	int64_t now = now_ms();
	return at <= now ? 0 : (int)(at - now);
}

static void __attribute__((noreturn)) live(void)
{
	struct pollfd *polls = NULL;
	size_t room = 0;
	lost_at = now_ms();
	for (;;) {
		if (!ending)
			look_after_kilnd();
		int64_t reap_at = reap_clients();
		if (ending && (client_count() == 0 || (end_by != 0 && now_ms() >= end_by)))
			end_now();
		size_t count = 3 + client_polls();
		if (count > room) {
			struct pollfd *more = realloc(polls, (count + 8) * sizeof *polls);
			if (more == NULL)
				end_now();
			polls = more;
			room = count + 8;
		}
		polls[0] = (struct pollfd){.fd = clients_have_room() ? listener : -1, .events = POLLIN};
		polls[1] = (struct pollfd){.fd = keeper, .events = answers_length > 0 ? POLLOUT : POLLIN};
		polls[2] = (struct pollfd){.fd = starter_fd(), .events = POLLIN};
		fill_polls(polls + 3);
		if (poll(polls, count, time_to_sleep(reap_at)) < 0)
			continue;
		act_on_polls(polls + 3); /* first: the list may not change before */
		if (keeper >= 0 && polls[1].revents & POLLOUT) {
			flush_answers();
			obey_all();
		} else if (keeper >= 0 && polls[1].revents != 0) {
			hear_kilnd();
		}
		if (polls[2].revents != 0)
			hear_starter();
		if (listener >= 0 && polls[0].revents != 0)
			accept_client();
	}
}

static void __attribute__((noreturn)) become_relay(void)
{
	struct rlimit files;
	int score = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
	if (score >= 0)
		(void)!write(score, "-999", 4); /* as kilnd's; may be forbidden */
	for (int number = 1; number < NSIG; number++)
		signal(number, SIG_DFL);
	sigset_t none;
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	signal(SIGHUP, SIG_IGN);
	signal(SIGINT, SIG_IGN);
	signal(SIGPIPE, SIG_IGN);
	setsid();
	/* None of containerd's descriptors: it waits for the end of our output. */
	int null = open("/dev/null", O_RDWR);
	if (null < 0 || chdir("/") < 0 || dup2(null, 0) < 0 || dup2(null, 1) < 0 || dup2(null, 2) < 0)
		_exit(1);
	if (listener != 3) {
		dup2(listener, 3);
		listener = 3;
	}
	fcntl(3, F_SETFD, FD_CLOEXEC);
	fcntl(3, F_SETFL, O_NONBLOCK);
	syscall(SYS_close_range, 4u, ~0u, 0u);
	if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
		files.rlim_cur = files.rlim_max;
		setrlimit(RLIMIT_NOFILE, &files);
	}
	prctl(PR_SET_NAME, "kiln-relay");
	memset(self->title, 0, self->title_room);
	snprintf(self->title, self->title_room, "kiln-relay %s %s %s", self->namespace, self->id, self->socket_path);
	live();
}

void ensure_relay(struct relay *relay)
{
	int lock;
	self = relay;
	state_path(relay_socket, "relay.sock");
	listener = listen_unless_served(relay->socket_path, &lock);
	if (listener >= 0) {
		pid_t child = fork();
		if (child == 0)
			become_relay();
		if (child < 0) {
			int problem = errno;
			unlink(relay->socket_path);
			fail("kiln: cannot make a process for the relay: %s", strerror(problem));
		}
		close(listener);
	}
	close(lock);
}
