/*
 * containerd's connections, and the session with kilnd that each has. Requests wait (relay-queues.c), in their order, until
 * their response is whole: a kilnd that comes back is sent again what the last one has not answered. Towards containerd only
 * whole frames go, so a kilnd that ends in the middle of one leaves no trace there.
 *
 * Bounds: a client with too much unanswered or untaken is not read from, and kilnd is not read from while its last frame
 * is still on its way to the client. The number of requests is above what kilnd takes of one connection
 * (src/shim/endpoint.ts), so that it is kilnd who refuses, and a Kill is never stuck behind Waits.
 */
#define _GNU_SOURCE
#include "relay.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define CLIENT_LIMIT 256	   /* connections; a containerd has one or two */
#define REQUEST_LIMIT (17u << 10)  /* unanswered requests of a client */
#define BYTE_LIMIT (32u << 20)	   /* bytes of them */
#define REPLY_LIMIT 64		   /* answers that a client has not taken */
#define LAST_WORDS_MS 1000	   /* what a client gets to take its last answers once all is over */
#define FIRST_PAUSE_MS 20	   /* before a lost session is opened again: a kilnd that dies closes its keeper, too */
#define PAUSE_LIMIT_MS 5000	   /* it doubles with a kilnd that closes it again and again */

struct client {
	struct client *next;
	unsigned number;
	int fd, session; /* -1: gone; none */
	struct reader from_client, from_kilnd;
	struct requests requests; /* towards kilnd */
	struct replies replies;	  /* towards containerd */
	int64_t retry_at, pause;  /* for the next session */
	int64_t close_by;	  /* 0: not yet ending */
	bool stuck;		  /* writing to the session failed; what kilnd has said is read to its end */
	bool spoke;		  /* something has come from it: who only looks whether we are here needs no session */
};

static struct client *clients;
static size_t count;
static unsigned last_number;
static bool ending;
static char unavailable[2048]; /* empty: requests wait for kilnd */

size_t client_count(void)
{
	return count;
}

bool clients_have_room(void)
{
	return count < CLIENT_LIMIT;
}

void add_client(int fd)
{
	struct client *client = calloc(1, sizeof *client);
	if (client == NULL) {
		close(fd);
		return;
	}
	client->number = ++last_number;
	client->fd = fd;
	client->session = -1;
	client->pause = FIRST_PAUSE_MS;
	init_requests(&client->requests);
	init_replies(&client->replies);
	client->next = clients;
	clients = client;
	count++;
}

/* Towards kilnd. */

static void send_to_kilnd(struct client *client)
{
	if (client->session >= 0 && !client->stuck)
		client->stuck = !send_requests(&client->requests, client->session);
}

/* Towards containerd. */

static void drop_client_side(struct client *client)
{
	if (client->fd >= 0)
		close(client->fd);
	client->fd = -1;
	forget_reading(&client->from_client);
	drop_replies(&client->replies);
}

static void send_to_client(struct client *client)
{
	if (client->fd >= 0 && !send_replies(&client->replies, client->fd))
		drop_client_side(client);
}

/* Takes the frame; null, for want of memory, ends the connection, since an answer would be missing. */
static void reply(struct client *client, struct frame *frame)
{
	if (frame == NULL || client->fd < 0) {
		free(frame);
		drop_client_side(client);
		return;
	}
	add_reply(&client->replies, frame);
	send_to_client(client);
}

/* Takes the requests. */
static void refuse(struct client *client, struct frame *requests, const char *why)
{
	while (requests) {
		struct frame *frame = requests;
		uint32_t stream = frame->stream;
		requests = frame->next;
		free(frame);
		reply(client, make_failure(stream, STATUS_UNAVAILABLE, why));
	}
}

static void answer_waiting(struct client *client)
{
	refuse(client, take_all_but_waits(&client->requests), unavailable);
}

void answer_unavailable(const char *reason)
{
	unavailable[0] = '\0';
	if (reason == NULL)
		return;
	snprintf(unavailable, sizeof unavailable, "kilnd is not running and cannot be started: %s", reason);
	for (struct client *client = clients; client; client = client->next)
		if (client->session < 0)
			answer_waiting(client);
}

static void read_client(struct client *client)
{
	struct frame *frame;
	uint32_t stream, length;
	uint8_t type;
	char text[128];
	client->spoke = true;
	switch (read_frame(client->fd, &client->from_client, &frame, &stream, &type, &length)) {
	case READ_MORE:
		return;
	case READ_END:
	case READ_FAILED:
		drop_client_side(client);
		return;
	case READ_TOO_LARGE: /* as a ttrpc server: the stream is told, the connection goes on; other types are ignored */
		snprintf(text, sizeof text, "message length %u exceed maximum message size of %u", length, DATA_LIMIT);
		if (type == FRAME_REQUEST || type == FRAME_DATA)
			reply(client, make_failure(stream, STATUS_RESOURCE_EXHAUSTED, text));
		return;
	case READ_FRAME:
		break;
	}
	add_request(&client->requests, frame);
	if (client->session >= 0)
		send_to_kilnd(client);
	else if (*unavailable)
		answer_waiting(client);
}

static void lose_session(struct client *client)
{
	char text[128];
	close(client->session);
	client->session = -1;
	client->stuck = false;
	forget_reading(&client->from_kilnd);
	client->retry_at = now_ms() + client->pause;
	client->pause = 2 * client->pause < PAUSE_LIMIT_MS ? 2 * client->pause : PAUSE_LIMIT_MS;
	if (ending)
		client->close_by = now_ms() + LAST_WORDS_MS;
	snprintf(text, sizeof text, "kilnd ended %d times before it answered this request", REPLAY_LIMIT + 1);
	refuse(client, rewind_requests(&client->requests), text);
}

static void read_session(struct client *client)
{
	struct frame *frame;
	uint32_t stream, length;
	uint8_t type;
	switch (read_frame(client->session, &client->from_kilnd, &frame, &stream, &type, &length)) {
	case READ_MORE:
		return;
	case READ_TOO_LARGE: /* no kilnd says that: whatever follows cannot be trusted either */
	case READ_END:
	case READ_FAILED:
		lose_session(client);
		return;
	case READ_FRAME:
		break;
	}
	if (frame->type == FRAME_RESPONSE)
		forget_answered(&client->requests, frame->stream);
	client->pause = FIRST_PAUSE_MS;
	reply(client, frame);
}

/* Sessions. */

static bool wants_session(const struct client *client)
{
	return client->fd >= 0 && client->session < 0 && client->spoke && !ending;
}

void open_sessions(int (*open_session)(unsigned client, size_t replayed))
{
	int64_t now = now_ms();
	for (struct client *client = clients; client; client = client->next) {
		if (!wants_session(client) || client->retry_at > now)
			continue;
		client->session = open_session(client->number, count_replayed(&client->requests));
		if (client->session < 0) { /* whether kilnd has ended is for its keeper connection to find out */
			client->retry_at = now + FIRST_PAUSE_MS;
			continue;
		}
		send_to_kilnd(client);
	}
}

int64_t next_session_at(void)
{
	int64_t at = INT64_MAX;
	for (struct client *client = clients; client; client = client->next)
		if (wants_session(client) && client->retry_at < at)
			at = client->retry_at;
	return at;
}

void end_clients(void)
{
	ending = true;
	for (struct client *client = clients; client; client = client->next)
		if (client->session < 0)
			client->close_by = now_ms() + LAST_WORDS_MS;
}

static bool is_over(struct client *client, int64_t now)
{
	if (client->fd < 0) /* what it has said is still for kilnd, its answers are for nobody */
		return client->session < 0 || client->stuck || client->requests.unsent == NULL;
	return client->close_by != 0 && ((client->session < 0 && client->replies.count == 0) || client->close_by <= now);
}

int64_t reap_clients(void)
{
	int64_t now = now_ms(), next = INT64_MAX;
	for (struct client **at = &clients; *at;) {
		struct client *client = *at;
		if (!is_over(client, now)) {
			if (client->close_by != 0 && client->close_by < next)
				next = client->close_by;
			at = &client->next;
			continue;
		}
		drop_client_side(client);
		if (client->session >= 0)
			close(client->session);
		forget_reading(&client->from_kilnd);
		drop_requests(&client->requests);
		*at = client->next;
		free(client);
		count--;
	}
	return next;
}

/* poll(2): two entries per client, in the order of the list. One that nothing is wanted of is left out (fd -1), or a
 * connection that has ended would be reported again and again while we may not read it. */

size_t client_polls(void)
{
	return 2 * count;
}

static bool may_read(const struct client *client)
{
	return client->close_by == 0 && client->requests.count < REQUEST_LIMIT && client->requests.bytes < BYTE_LIMIT &&
	       client->replies.count < REPLY_LIMIT;
}

void fill_polls(struct pollfd *polls)
{
	for (struct client *client = clients; client; client = client->next, polls += 2) {
		/* Asked for nothing, the client's entry still tells when it is gone. */
		short from = (short)((may_read(client) ? POLLIN : 0) | (client->replies.count > 0 ? POLLOUT : 0));
		polls[0] = (struct pollfd){.fd = client->fd, .events = from};
		short to = (short)((client->replies.count > 0 || client->fd < 0 ? 0 : POLLIN) |
				   (client->requests.unsent && !client->stuck ? POLLOUT : 0));
		/* In the end a client that takes nothing must not keep us from seeing that kilnd is through with it. */
		bool watch = to != 0 || (ending && client->close_by == 0);
		polls[1] = (struct pollfd){.fd = watch ? client->session : -1, .events = to};
	}
}

void act_on_polls(const struct pollfd *polls)
{
	for (struct client *client = clients; client; client = client->next, polls += 2) {
		if (polls[1].revents & POLLOUT)
			send_to_kilnd(client);
		if (client->session >= 0 && polls[1].revents & (POLLIN | POLLHUP | POLLERR)) {
			if (client->replies.count == 0)
				read_session(client);
			else if (ending && client->close_by == 0)
				client->close_by = now_ms() + LAST_WORDS_MS;
		}
		if (polls[0].revents & POLLOUT)
			send_to_client(client);
		if (client->fd < 0)
			continue;
		if (polls[0].revents & POLLIN)
			read_client(client);
		else if (polls[0].revents & (POLLHUP | POLLERR))
			drop_client_side(client);
	}
}
