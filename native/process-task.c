/*
 * As much of containerd's task service as it takes to follow one process: Wait, Kill, ResizePty, CloseIO, Delete, over ttrpc.
 * The bytes are as docs/ttrpc.md and proto/containerd/task.proto have them. Only the answers to Wait and Delete are read; the
 * others would tell of a process that has ended, which Wait tells too.
 */
#define _GNU_SOURCE
#include "process.h"
#include "ttrpc.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define REQUEST 1
#define RESPONSE 2
#define MESSAGE_ROOM 1024 /* the longest: the service's name and twice an id of 76 bytes */
#define UNKNOWN_STATUS 255

struct message {
	unsigned char bytes[MESSAGE_ROOM];
	size_t length;
};

static void put_varint(struct message *message, uint64_t value)
{
	for (; value >= 0x80; value >>= 7)
		message->bytes[message->length++] = (unsigned char)(value | 0x80);
	message->bytes[message->length++] = (unsigned char)value;
}

static void put_number(struct message *message, unsigned field, uint64_t value)
{
	put_varint(message, field << 3);
	put_varint(message, value);
}

static void put_bytes(struct message *message, unsigned field, const void *data, size_t length)
{
	put_varint(message, field << 3 | 2);
	put_varint(message, length);
	memcpy(message->bytes + message->length, data, length);
	message->length += length;
}

int connect_task(const char *path)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	if (strlen(path) >= sizeof address.sun_path) {
		errno = ENAMETOOLONG;
		return -1;
	}
	strcpy(address.sun_path, path);
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd >= 0 && connect(fd, (struct sockaddr *)&address, sizeof address) < 0) {
		int problem = errno;
		close(fd);
		errno = problem;
		return -1;
	}
	return fd;
}

/* Every request of these begins with the ids of the container and of the process. */
static struct message payload_for(const struct task *task)
{
	struct message payload = {.length = 0};
	put_bytes(&payload, 1, task->id, strlen(task->id));
	put_bytes(&payload, 2, task->exec_id, strlen(task->exec_id));
	return payload;
}

static void call(struct task *task, const char *method, const struct message *payload)
{
	static const char service[] = "containerd.task.v2.Task";
	struct message request = {.length = 10};
	put_bytes(&request, 1, service, sizeof service - 1);
	put_bytes(&request, 2, method, strlen(method));
	put_bytes(&request, 3, payload->bytes, payload->length);
	write_u32(request.bytes, (uint32_t)request.length - 10);
	write_u32(request.bytes + 4, task->next_stream);
	request.bytes[8] = REQUEST;
	request.bytes[9] = 0;
	task->next_stream += 2;
	/* The relay reads whatever kilnd does. When it is gone, the next read tells. */
	for (size_t sent = 0; sent < request.length;) {
		ssize_t count = send(task->fd, request.bytes + sent, request.length - sent, MSG_NOSIGNAL);
		if (count < 0 && errno == EINTR)
			continue;
		if (count < 0)
			return;
		sent += (size_t)count;
	}
}

void send_wait(struct task *task)
{
	struct message payload = payload_for(task);
	task->awaited = task->next_stream;
	call(task, "Wait", &payload);
}

void send_delete(struct task *task)
{
	struct message payload = payload_for(task);
	task->awaited = task->next_stream;
	call(task, "Delete", &payload);
}

void send_kill(struct task *task, uint32_t signal_number)
{
	struct message payload = payload_for(task);
	put_number(&payload, 3, signal_number);
	call(task, "Kill", &payload);
}

void send_resize(struct task *task, uint32_t width, uint32_t height)
{
	struct message payload = payload_for(task);
	put_number(&payload, 3, width);
	put_number(&payload, 4, height);
	call(task, "ResizePty", &payload);
}

void send_stdin_end(struct task *task)
{
	struct message payload = payload_for(task);
	put_number(&payload, 3, 1);
	call(task, "CloseIO", &payload);
}

/* Finds a field in a message that has numbers and bytes only. False where there is none. */
static bool find_field(const unsigned char *at, const unsigned char *end, unsigned field, uint64_t *value,
		       const unsigned char **data)
{
	uint64_t key;
	while (at < end && read_varint(&at, end, &key) && read_varint(&at, end, value)) {
		bool bytes = (key & 7) == 2;
		if ((!bytes && (key & 7) != 0) || (bytes && *value > (uint64_t)(end - at)))
			return false;
		*data = at;
		if (key >> 3 == field)
			return true;
		if (bytes)
			at += *value;
	}
	return false;
}

/* The answer to Wait: { status = 1, payload = 2 }, whose payload is { exit_status = 1, … }; 0 is left out. */
static int status_in(const unsigned char *at, const unsigned char *end)
{
	uint64_t length, status;
	const unsigned char *data;
	if (find_field(at, end, 1, &length, &data) && length > 0)
		return UNKNOWN_STATUS; /* an error: nobody knows of such a process */
	if (!find_field(at, end, 2, &length, &data))
		return 0;
	return find_field(data, data + length, 1, &status, &at) ? (int)(status & 0xff) : 0;
}

static bool on_frame(struct task *task, int *status)
{
	bool told = read_u32(task->header + 4) == task->awaited && task->header[8] == RESPONSE;
	if (told)
		*status = status_in(task->body, task->body + task->body_length);
	task->header_length = 0;
	return told;
}

bool read_exit(struct task *task, int *status)
{
	unsigned char chunk[512];
	ssize_t count = recv(task->fd, chunk, sizeof chunk, MSG_DONTWAIT);
	if (count < 0 && (errno == EAGAIN || errno == EINTR))
		return false;
	if (count <= 0) {
		*status = UNKNOWN_STATUS;
		return true;
	}
	for (ssize_t i = 0; i < count; i++) {
		if (task->header_length < sizeof task->header) {
			task->header[task->header_length++] = chunk[i];
			task->body_length = 0;
			task->body_size = read_u32(task->header);
			if (task->header_length < sizeof task->header || task->body_size > 0)
				continue;
		} else {
			/* Of an answer that is longer, an error's text, the beginning is enough. */
			if (task->body_length < sizeof task->body)
				task->body[task->body_length++] = chunk[i];
			if (--task->body_size > 0)
				continue;
		}
		if (on_frame(task, status))
			return true;
	}
	return false;
}
