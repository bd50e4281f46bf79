/*
 * containerd's connections, and the session with kilnd that each has. Requests wait here, in their order, until their
 * response is whole: a kilnd that comes back is sent again what the last one has not answered. Towards containerd only
 * whole frames go, so a kilnd that ends in the middle of one leaves no trace there.
 *
 * Bounds: a client with too much unanswered or untaken is not read from, and kilnd is not read from while its last frame
 * is still on its way to the client. The number of requests is above what kilnd takes of one connection
 * (src/shim/endpoint.ts), so that it is kilnd who refuses, and a Kill is never stuck behind Waits.
 */
#define _GNU_SOURCE
#include "relay.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define CLIENT_LIMIT 256	   /* connections; a containerd has one or two */
#define REQUEST_LIMIT (17u << 10)  /* unanswered requests of a client */
#define BYTE_LIMIT (32u << 20)	   /* bytes of them */
#define REPLY_LIMIT 64		   /* answers that a client has not taken */
#define REPLAY_LIMIT 3		   /* times that a request other than Wait is sent again: it may be what ends kilnd */
#define LAST_WORDS_MS 1000	   /* what a client gets to take its last answers once all is over */
#define FIRST_PAUSE_MS 20	   /* before a lost session is opened again: a kilnd that dies closes its keeper, too */
#define PAUSE_LIMIT_MS 5000	   /* it doubles with a kilnd that closes it again and again */

struct client {
	struct client *next;
	unsigned number;
	int fd, session; /* -1: gone; none */
	struct reader from_client, from_kilnd;
	struct frame *frames, **last; /* towards kilnd: requests without a response, and what is not sent yet */
	struct frame *unsent;	      /* the first of those that is not yet sent in full */
	size_t requests, bytes;
	struct frame *replies, **last_reply; /* towards containerd */
	size_t reply_count;
	int64_t retry_at, pause; /* for the next session */
	int64_t close_by;	 /* 0: not yet ending */
	bool stuck;		 /* writing to the session failed; what kilnd has said is read to its end */
	bool spoke;		 /* something has come from it: who only looks whether we are here needs no session */
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
	client->last = &client->frames;
	client->last_reply = &client->replies;
	client->next = clients;
	clients = client;
	count++;
}

/* Towards kilnd. */

static void append_frame(struct client *client, struct frame *frame)
{
	*client->last = frame;
	client->last = &frame->next;
	if (client->unsent == NULL)
		client->unsent = frame;
	client->requests++;
	client->bytes += frame->length;
}

static void remove_frame(struct client *client, struct frame **at)
{
	struct frame *frame = *at;
	*at = frame->next;
	if (client->last == &frame->next)
		client->last = at;
	if (client->unsent == frame)
		client->unsent = frame->next;
	client->requests--;
	client->bytes -= frame->length;
	free(frame);
}

/* Removes what was sent with this id; it is more than one where the client has used an id twice. */
static void forget_answered(struct client *client, uint32_t stream)
{
	for (struct frame **at = &client->frames; *at && (*at)->sent;)
		if ((*at)->stream == stream)
			remove_frame(client, at);
		else
			at = &(*at)->next;
}

static void send_frames(struct client *client)
{
	while (client->session >= 0 && !client->stuck && client->unsent) {
		struct frame *frame = client->unsent;
		int written = write_frame(client->session, frame);
		if (written == 0)
			return;
		if (written < 0) {
			client->stuck = true;
			return;
		}
		frame->sent = frame->seen = true;
		client->unsent = frame->next;
		if (frame->type == FRAME_REQUEST)
			continue;
		struct frame **at = &client->frames;
		while (*at != frame)
			at = &(*at)->next;
		remove_frame(client, at);
	}
}

/* Towards containerd. */

static void drop_client_side(struct client *client)
{
	if (client->fd >= 0)
		close(client->fd);
	client->fd = -1;
	forget_reading(&client->from_client);
	while (client->replies) {
		struct frame *frame = client->replies;
		client->replies = frame->next;
		free(frame);
	}
	client->last_reply = &client->replies;
	client->reply_count = 0;
}

static void write_replies(struct client *client)
{
	while (client->fd >= 0 && client->replies) {
		struct frame *frame = client->replies;
		int written = write_frame(client->fd, frame);
		if (written == 0)
			return;
		if (written < 0) {
			drop_client_side(client);
			return;
		}
		client->replies = frame->next;
		if (client->replies == NULL)
			client->last_reply = &client->replies;
		client->reply_count--;
		free(frame);
	}
}

/* Takes the frame; null, for want of memory, ends the connection, since an answer would be missing. */
static void reply(struct client *client, struct frame *frame)
{
	if (frame == NULL || client->fd < 0) {
		free(frame);
		drop_client_side(client);
		return;
	}
	*client->last_reply = frame;
	client->last_reply = &frame->next;
	client->reply_count++;
	write_replies(client);
}

static void answer_waiting(struct client *client)
{
	for (struct frame **at = &client->frames; *at;) {
		struct frame *frame = *at;
		if (frame->type != FRAME_REQUEST || frame->wait) {
			at = &frame->next;
			continue;
		}
		uint32_t stream = frame->stream;
		remove_frame(client, at);
		reply(client, make_failure(stream, STATUS_UNAVAILABLE, unavailable));
	}
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
	append_frame(client, frame);
	if (client->session >= 0)
		send_frames(client);
	else if (*unavailable)
		answer_waiting(client);
}

/* What kilnd had in full is sent to the next one as a replay; the rest as if nothing had happened. */
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
	for (struct frame **at = &client->frames; *at;) {
		struct frame *frame = *at;
		if (frame->sent && !frame->wait && ++frame->replays > REPLAY_LIMIT) {
			uint32_t stream = frame->stream;
			remove_frame(client, at);
			reply(client, make_failure(stream, STATUS_UNAVAILABLE, text));
			continue;
		}
		frame->sent = false;
		frame->done = 0;
		at = &frame->next;
	}
	client->unsent = client->frames;
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
		forget_answered(client, frame->stream);
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
		size_t replayed = 0;
		for (struct frame *frame = client->frames; frame && frame->seen; frame = frame->next)
			replayed++;
		client->session = open_session(client->number, replayed);
		if (client->session < 0) { /* whether kilnd has ended is for its keeper connection to find out */
			client->retry_at = now + FIRST_PAUSE_MS;
			continue;
		}
		send_frames(client);
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
		return client->session < 0 || client->stuck || client->unsent == NULL;
	return client->close_by != 0 && ((client->session < 0 && client->replies == NULL) || client->close_by <= now);
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
		while (client->frames)
			remove_frame(client, &client->frames);
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
	return client->close_by == 0 && client->requests < REQUEST_LIMIT && client->bytes < BYTE_LIMIT &&
	       client->reply_count < REPLY_LIMIT;
}

void fill_polls(struct pollfd *polls)
{
	for (struct client *client = clients; client; client = client->next, polls += 2) {
		/* Asked for nothing, the client's entry still tells when it is gone. */
		short from = (short)((may_read(client) ? POLLIN : 0) | (client->replies ? POLLOUT : 0));
		polls[0] = (struct pollfd){.fd = client->fd, .events = from};
		short to = (short)((client->replies || client->fd < 0 ? 0 : POLLIN) |
				   (client->unsent && !client->stuck ? POLLOUT : 0));
		/* In the end a client that takes nothing must not keep us from seeing that kilnd is through with it. */
		bool watch = to != 0 || (ending && client->close_by == 0);
		polls[1] = (struct pollfd){.fd = watch ? client->session : -1, .events = to};
	}
}

void act_on_polls(const struct pollfd *polls)
{
	for (struct client *client = clients; client; client = client->next, polls += 2) {
		if (polls[1].revents & POLLOUT)
			send_frames(client);
		if (client->session >= 0 && polls[1].revents & (POLLIN | POLLHUP | POLLERR)) {
			if (client->replies == NULL)
				read_session(client);
			else if (ending && client->close_by == 0)
				client->close_by = now_ms() + LAST_WORDS_MS;
		}
		if (polls[0].revents & POLLOUT)
			write_replies(client);
		if (client->fd < 0)
			continue;
		if (polls[0].revents & POLLIN)
			read_client(client);
		else if (polls[0].revents & (POLLHUP | POLLERR))
			drop_client_side(client);
	}
}
