/*
 * Carries bytes from one descriptor to another without ever waiting for one of them. Whoever reads slowly holds the writer
 * back: no more than STREAM_ROOM bytes are under way.
 */
#define _GNU_SOURCE
#include "process.h"

#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <unistd.h>

short reads_wanted(const struct stream *stream)
{
	return stream->from >= 0 && !stream->ended && stream->begin == stream->end ? POLLIN : 0;
}

short writes_wanted(const struct stream *stream)
{
	return stream->to >= 0 && stream->begin < stream->end ? POLLOUT : 0;
}

static void fill(struct stream *stream)
{
	ssize_t count = read(stream->from, stream->bytes, sizeof stream->bytes);
	if (count < 0 && (errno == EINTR || errno == EAGAIN))
		return;
	if (count > 0) {
		stream->begin = 0;
		stream->end = (size_t)count;
		return;
	}
	/* A terminal that was hung up is an error, and an end. */
	stream->ended = true;
	close(stream->from);
	stream->from = -1;
}

/*
 * A descriptor of the caller's may be one on which write(2) waits, and others use it too, so it stays as it is. A pipe
 * that poll(2) calls writable takes PIPE_BUF bytes at once; pipe(7).
 */
static void drain(struct stream *stream)
{
	size_t length = stream->end - stream->begin;
	ssize_t count = write(stream->to, stream->bytes + stream->begin, length < PIPE_BUF ? length : PIPE_BUF);
	if (count < 0 && (errno == EINTR || errno == EAGAIN))
		return;
	/* Nobody reads any more. The process goes on, as if somebody did: the guest has no way to tell it. */
	stream->begin = count < 0 ? stream->end : stream->begin + (size_t)count;
}

void carry(struct stream *stream, short from_events, short to_events)
{
	if (from_events != 0 && reads_wanted(stream))
		fill(stream);
	if (to_events != 0 && writes_wanted(stream))
		drain(stream);
}

bool is_done(const struct stream *stream)
{
	return stream->to >= 0 && stream->ended && stream->begin == stream->end;
}

void close_end(struct stream *stream)
{
	close(stream->to);
	stream->to = -1;
}
