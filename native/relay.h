/*
 * What the parts of the relay share: relay.c lives (finds kilnd, obeys it, ends), relay-socket.c has the socket
 * file, relay-starter.c starts kilnd, relay-clients.c carries frames, relay-queues.c keeps those that wait, relay-frame.c
 * reads and makes them, relay-holds.c keeps FIFOs open. The story is at the head of relay.c.
 */
#ifndef KILN_RELAY_H
#define KILN_RELAY_H

#include <poll.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "launcher.h"

/* What a relay is started with. The texts must live as long as the relay does. */
struct relay {
	const char *socket_path, *bundle;
	struct bytes context; /* fields of its header: namespace … launcher_started_ns */
	char *title;	      /* what ps(1) shows: the memory of the launcher's arguments */
	size_t title_room;
	const char *namespace, *id;
};

/*
 * Makes sure that a relay listens on relay->socket_path, which accepts connections when this returns. A live one that is
 * there already stays. Fails like everything in the launcher. The new process never returns from here.
 */
void ensure_relay(struct relay *relay);

/* Milliseconds of CLOCK_MONOTONIC. */
int64_t now_ms(void);

/* relay-socket.c */

/*
 * Listens there, or returns -1 where a relay does already. Fails like everything in the launcher. *lock keeps all others
 * away from the folder's sockets until it is closed.
 */
int listen_unless_served(const char *socket_path, int *lock);

/* Whether the file is still the one that was made above. */
bool socket_is_ours(void);

/* Removes the file if it is ours, and stops listening. -1 is no error. */
void remove_socket(int listener);

/* relay-starter.c */

/* Begins to find or start kilnd; does nothing, until the next time, where there is no process for it. */
void launch_starter(void);

/* What to poll(2) while that goes on, else -1. */
int starter_fd(void);

/* To be called when there is something on it; true when kilnd is there, or cannot be started. */
bool read_starter(void);

/* The latest reason, for people. */
const char *why_no_kilnd(void);

/* relay-frame.c */

#define HEADER_LENGTH 10	   /* ttrpc channel.go, messageHeaderLength */
#define DATA_LIMIT (4u << 20)	   /* ttrpc channel.go, messageLengthMax: bytes of a frame's data */
enum { FRAME_REQUEST = 1, FRAME_RESPONSE = 2, FRAME_DATA = 3 }; /* ttrpc PROTOCOL.md */
enum { STATUS_RESOURCE_EXHAUSTED = 8, STATUS_UNAVAILABLE = 14 }; /* google.golang.org/grpc/codes */

struct frame {
	struct frame *next;
	size_t length, capacity, done; /* of bytes: all, allocated, read or written so far */
	uint32_t stream;
	uint8_t type;
	uint8_t replays;
	bool sent; /* to the kilnd of now, in full */
	bool seen; /* an earlier kilnd has had it in full: sending it again is a replay */
	bool wait; /* a Wait, which may stay unanswered for as long as it likes */
	unsigned char bytes[];
};

struct reader {
	unsigned char header[HEADER_LENGTH];
	size_t header_filled;
	struct frame *frame; /* the one that is arriving */
	uint64_t skip;	     /* bytes of a frame that is too large, still to come */
};

enum reading { READ_MORE, READ_FRAME, READ_TOO_LARGE, READ_END, READ_FAILED };

/*
 * Reads on, without waiting. READ_FRAME: *frame is whole, and the caller's to free. READ_TOO_LARGE: *stream and *type are
 * those of a frame above DATA_LIMIT, *length what it claims; what follows is skipped. READ_MORE: nothing yet.
 */
enum reading read_frame(int fd, struct reader *reader, struct frame **frame, uint32_t *stream, uint8_t *type,
			uint32_t *length);
void forget_reading(struct reader *reader);

/* 1: written in full; 0: the rest when there is room; -1: the other end is gone. */
int write_frame(int fd, struct frame *frame);

/* A Response with this status; null without memory. */
struct frame *make_failure(uint32_t stream, int code, const char *message);

/* relay-queues.c */

#define REPLAY_LIMIT 3 /* times that a request other than Wait is sent again: it may be what ends kilnd */

/* Requests without a response, and what is not sent yet. */
struct requests {
	struct frame *frames, **last;
	struct frame *unsent; /* the first of those that is not yet sent in full */
	size_t count, bytes;
};

void init_requests(struct requests *requests);

/* Takes the frame, which need not be a request: another one is forgotten when it is sent. */
void add_request(struct requests *requests, struct frame *frame);

/* Sends what is unsent, without waiting. False: the other end is gone. */
bool send_requests(struct requests *requests, int session);

/* Removes what was sent with this id; it is more than one where the client has used an id twice. */
void forget_answered(struct requests *requests, uint32_t stream);

/* Removes the requests other than Wait, for the caller to answer and free. */
struct frame *take_all_but_waits(struct requests *requests);

/*
 * The session is lost. What kilnd had in full is sent to the next one as a replay; the rest as if nothing had happened.
 * Removes those that more than REPLAY_LIMIT kilnds have had, for the caller to answer and free.
 */
struct frame *rewind_requests(struct requests *requests);

/* How many an earlier kilnd has had. */
size_t count_replayed(const struct requests *requests);
void drop_requests(struct requests *requests);

/* What the client has not taken. */
struct replies {
	struct frame *frames, **last;
	size_t count;
};

void init_replies(struct replies *replies);

/* Takes the frame. */
void add_reply(struct replies *replies, struct frame *frame);

/* Sends them, without waiting. False: the other end is gone. */
bool send_replies(struct replies *replies, int client);
void drop_replies(struct replies *replies);

/* relay-clients.c */

/* Takes an accepted connection of containerd. */
void add_client(int fd);
size_t client_count(void);

/* May containerd connect once more? */
bool clients_have_room(void);

/* kilnd has welcomed this relay: every client gets a session. `open_session` returns a socket that the header is on. */
void open_sessions(int (*open_session)(unsigned client, size_t replayed));

/* When open_sessions wants to be called next, in now_ms; INT64_MAX: not before something happens. */
int64_t next_session_at(void);

/* kilnd is gone for too long: answers all that waits, except Wait; then each new request, until `reason` is null. */
void answer_unavailable(const char *reason);

/* The endpoint is over: each client is closed when its session is, and at once if it has none. */
void end_clients(void);

/* Closes what has ended, and whoever does not take its last answers in time. Returns when to call again, in now_ms. */
int64_t reap_clients(void);

/* For poll(2): how many entries there are, fills them, and acts on what came. */
size_t client_polls(void);
void fill_polls(struct pollfd *polls);
void act_on_polls(const struct pollfd *polls);

/* relay-holds.c */

/* Opens the FIFO and keeps it open; again is no error. Null, or why not. */
const char *hold_fifo(const char *path);

/* Closes it; one that is not held is no error. */
void release_fifo(const char *path);

#endif
