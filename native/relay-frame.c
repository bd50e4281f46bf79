/*
 * ttrpc frames, as far as the relay looks at them: the 10-byte header (length, stream id, type, flags; big-endian), and in
 * a request whether the method is Wait. What a frame carries goes through untouched. Source: containerd/ttrpc channel.go,
 * PROTOCOL.md, request.proto.
 */
#define _GNU_SOURCE
#include "relay.h"
#include "ttrpc.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#define FIRST_ROOM 512	   /* bytes reserved for a frame before its data is here */
#define MESSAGE_LIMIT 1024 /* bytes of an error's text */

/* Whether field 2 of the Request, the method, is "Wait". What cannot be read is no Wait: kilnd refuses it at once. */
static bool is_wait(const unsigned char *at, const unsigned char *end)
{
	bool found = false;
	uint64_t key, value;
	while (at < end && read_varint(&at, end, &key)) {
		switch (key & 7) {
		case 0:
			if (!read_varint(&at, end, &value))
				return false;
			break;
		case 1:
		case 5:
			value = (key & 7) == 1 ? 8 : 4;
			if ((uint64_t)(end - at) < value)
				return false;
			at += value;
			break;
		case 2:
			if (!read_varint(&at, end, &value) || (uint64_t)(end - at) < value)
				return false;
			if (key >> 3 == 2)
				found = value == 4 && memcmp(at, "Wait", 4) == 0;
			at += value;
			break;
		default:
			return false;
		}
	}
	return found;
}

static struct frame *new_frame(size_t length, size_t room)
{
	struct frame *frame = malloc(sizeof *frame + room);
	if (frame == NULL)
		return NULL;
	memset(frame, 0, sizeof *frame);
	frame->length = length;
	frame->capacity = room;
	return frame;
}

/* Memory follows what has come, not what was announced: ten bytes cannot make us reserve 4 MiB. */
static bool make_room(struct reader *reader)
{
	struct frame *frame = reader->frame;
	if (frame->done < frame->capacity)
		return true;
	size_t room = 2 * frame->capacity < frame->length ? 2 * frame->capacity : frame->length;
	frame = realloc(frame, sizeof *frame + room);
	if (frame == NULL)
		return false;
	frame->capacity = room;
	reader->frame = frame;
	return true;
}

static enum reading nothing_read(ssize_t count)
{
	if (count == 0)
		return READ_END;
	return errno == EAGAIN || errno == EINTR ? READ_MORE : READ_FAILED;
}

void forget_reading(struct reader *reader)
{
	free(reader->frame);
	*reader = (struct reader){0};
}

enum reading read_frame(int fd, struct reader *reader, struct frame **result, uint32_t *stream, uint8_t *type,
			uint32_t *length)
{
	while (reader->skip > 0) {
		char dropped[4096];
		size_t wanted = reader->skip < sizeof dropped ? reader->skip : sizeof dropped;
		ssize_t count = recv(fd, dropped, wanted, MSG_DONTWAIT);
		if (count <= 0)
			return nothing_read(count);
		reader->skip -= (uint64_t)count;
	}
	if (reader->frame == NULL) {
		unsigned char *header = reader->header;
		ssize_t count = recv(fd, header + reader->header_filled, HEADER_LENGTH - reader->header_filled, MSG_DONTWAIT);
		if (count <= 0)
			return nothing_read(count);
		reader->header_filled += (size_t)count;
		if (reader->header_filled < HEADER_LENGTH)
			return READ_MORE;
		reader->header_filled = 0;
		*length = read_u32(header);
		*stream = read_u32(header + 4);
		*type = header[8];
		if (*length > DATA_LIMIT) {
			reader->skip = *length;
			return READ_TOO_LARGE;
		}
		size_t whole = HEADER_LENGTH + *length;
		reader->frame = new_frame(whole, whole < FIRST_ROOM ? whole : FIRST_ROOM);
		if (reader->frame == NULL)
			return READ_FAILED;
		memcpy(reader->frame->bytes, header, HEADER_LENGTH);
		reader->frame->done = HEADER_LENGTH;
		reader->frame->stream = *stream;
		reader->frame->type = *type;
	}
	while (reader->frame->done < reader->frame->length) {
		if (!make_room(reader))
			return READ_FAILED;
		struct frame *frame = reader->frame;
		ssize_t count = recv(fd, frame->bytes + frame->done, frame->capacity - frame->done, MSG_DONTWAIT);
		if (count <= 0)
			return nothing_read(count);
		frame->done += (size_t)count;
	}
	struct frame *frame = reader->frame;
	reader->frame = NULL;
	frame->done = 0;
	if (frame->type == FRAME_REQUEST)
		frame->wait = is_wait(frame->bytes + HEADER_LENGTH, frame->bytes + frame->length);
	*result = frame;
	return READ_FRAME;
}

int write_frame(int fd, struct frame *frame)
{
	while (frame->done < frame->length) {
		ssize_t count = send(fd, frame->bytes + frame->done, frame->length - frame->done, MSG_NOSIGNAL | MSG_DONTWAIT);
		if (count < 0 && errno == EINTR)
			continue;
		if (count < 0)
			return errno == EAGAIN ? 0 : -1;
		frame->done += (size_t)count;
	}
	return 1;
}

static unsigned char *write_varint(unsigned char *at, size_t value)
{
	for (; value >= 0x80; value >>= 7)
		*at++ = (unsigned char)(value | 0x80);
	*at++ = (unsigned char)value;
	return at;
}

/* Response{1: google.rpc.Status{1: code, 2: message}}. */
struct frame *make_failure(uint32_t stream, int code, const char *message)
{
	size_t length = strlen(message);
	if (length > MESSAGE_LIMIT) {
		length = MESSAGE_LIMIT;
		while (length > 0 && ((unsigned char)message[length] & 0xc0) == 0x80)
			length--; /* at a whole UTF-8 character */
	}
	struct frame *frame = new_frame(0, HEADER_LENGTH + length + 16);
	if (frame == NULL)
		return NULL;
	unsigned char *start = frame->bytes + HEADER_LENGTH, *at = start;
	size_t status = 2 + 1 + (length < 0x80 ? 1 : 2) + length;
	*at++ = 1 << 3 | 2;
	at = write_varint(at, status);
	*at++ = 1 << 3;
	*at++ = (unsigned char)code;
	*at++ = 2 << 3 | 2;
	at = write_varint(at, length);
	memcpy(at, message, length);
	at += length;
	write_u32(frame->bytes, (uint32_t)(at - start));
	write_u32(frame->bytes + 4, stream);
	frame->bytes[8] = FRAME_RESPONSE;
	frame->bytes[9] = 0;
	frame->length = (size_t)(at - frame->bytes);
	frame->stream = stream;
	frame->type = FRAME_RESPONSE;
	return frame;
}
