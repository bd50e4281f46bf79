/*
 * What the parts of kiln-process share: process.c is the story, process-task.c speaks of the process with kilnd,
 * process-stream.c carries its bytes.
 */
#ifndef KILN_PROCESS_H
#define KILN_PROCESS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define STREAM_ROOM 16384 /* bytes between two ends */

/* One direction of a process's stdio. An end that is -1 is closed. */
struct stream {
	int from, to;
	size_t begin, end; /* of what is read and not yet written */
	bool ended;	   /* nothing more comes from `from` */
	char bytes[STREAM_ROOM];
};

/* What poll(2) is to wait for at each end; 0 for nothing. */
short reads_wanted(const struct stream *stream);
short writes_wanted(const struct stream *stream);

/* Carries what can be carried without waiting. */
void carry(struct stream *stream, short from_events, short to_events);

/* All is written that ever comes, and `to` is still open. */
bool is_done(const struct stream *stream);

/* Closes `to`. */
void close_end(struct stream *stream);

/* The task service of the container, at the other end of a connected socket. */
struct task {
	int fd;
	const char *id, *exec_id;
	uint32_t next_stream;
	uint32_t awaited; /* the request whose answer is waited for */
	/* The frame that is being read. */
	unsigned char header[10];
	size_t header_length;
	unsigned char body[512];
	size_t body_length, body_size;
};

/* A socket that is connected to the path, or -1 with errno. */
int connect_task(const char *path);

void send_wait(struct task *task);
void send_kill(struct task *task, uint32_t signal_number);
void send_resize(struct task *task, uint32_t width, uint32_t height);
void send_stdin_end(struct task *task);
void send_delete(struct task *task);

/*
 * Reads what is there. True when the answer to Wait or Delete has come, whichever was sent last: *status is how the process
 * has ended; 255 when nobody will ever tell.
 */
bool read_exit(struct task *task, int *status);

#endif
