/*
 * The fields of 9P messages: little-endian numbers, and texts of a 16-bit length and that many bytes without a NUL.
 * A field that goes beyond the message's end reads as 0 and marks the request as malformed; its handler's reply is then
 * not sent.
 */
#include <errno.h>
#include <string.h>

#include "volumes.h"

static uint64_t get(struct request *request, size_t size)
{
	uint64_t value = 0;
	if (request->left < size) {
		request->malformed = true;
		request->left = 0;
		return 0;
	}
	for (size_t i = 0; i < size; i++)
		value |= (uint64_t)request->in[i] << 8 * i;
	request->in += size;
	request->left -= size;
	return value;
}

uint8_t get8(struct request *request) { return (uint8_t)get(request, 1); }
uint16_t get16(struct request *request) { return (uint16_t)get(request, 2); }
uint32_t get32(struct request *request) { return (uint32_t)get(request, 4); }
uint64_t get64(struct request *request) { return get(request, 8); }

gid_t get_gid(struct request *request)
{
	gid_t gid = get32(request);
	if (gid == (gid_t)-1)
		request->malformed = true;
	return gid;
}

int get_text(struct request *request, char *text, size_t size)
{
	size_t length = get16(request);
	text[0] = '\0';
	if (length > request->left) {
		request->malformed = true;
		request->left = 0;
		return EINVAL;
	}
	const uint8_t *bytes = request->in;
	request->in += length;
	request->left -= length;
	if (length >= size)
		return ENAMETOOLONG;
	if (memchr(bytes, '\0', length) != NULL)
		return EINVAL;
	memcpy(text, bytes, length);
	text[length] = '\0';
	return 0;
}

int get_name(struct request *request, char name[NAME_SIZE])
{
	int error = get_text(request, name, NAME_SIZE);
	if (error != 0)
		return error;
	if (name[0] == '\0' || strchr(name, '/') != NULL || strcmp(name, ".") == 0 || strcmp(name, "..") == 0)
		return EINVAL;
	return 0;
}

size_t room(const struct request *request)
{
	return request->limit - request->length;
}

static void put(struct request *request, uint64_t value, size_t size)
{
	if (room(request) < size) {
		request->malformed = true;
		return;
	}
	for (size_t i = 0; i < size; i++)
		request->out[request->length++] = (uint8_t)(value >> 8 * i);
}

void put8(struct request *request, uint8_t value) { put(request, value, 1); }
void put16(struct request *request, uint16_t value) { put(request, value, 2); }
void put32(struct request *request, uint32_t value) { put(request, value, 4); }
void put64(struct request *request, uint64_t value) { put(request, value, 8); }

void put_bytes(struct request *request, const void *bytes, size_t size)
{
	if (room(request) < size) {
		request->malformed = true;
		return;
	}
	memcpy(request->out + request->length, bytes, size);
	request->length += size;
}

void put_text(struct request *request, const char *text)
{
	size_t length = strlen(text);
	put16(request, (uint16_t)length);
	put_bytes(request, text, length);
}

/* The types of include/net/9p/9p.h. */
#define P9_QTDIR 0x80
#define P9_QTSYMLINK 0x02

/*
 * What the guest's kernel knows a file by. It makes the inode number of the path, so two volumes on two devices must
 * not have the same. The version changes with the content; 0 would mean: never cache.
 */
void put_qid(struct request *request, const struct stat *stat)
{
	uint8_t type = S_ISDIR(stat->st_mode) ? P9_QTDIR : S_ISLNK(stat->st_mode) ? P9_QTSYMLINK : 0;
	uint32_t version = (uint32_t)(stat->st_mtim.tv_sec ^ stat->st_mtim.tv_nsec ^ (stat->st_size << 8));
	put8(request, type);
	put32(request, version == 0 ? 1 : version);
	put64(request, stat->st_ino ^ device_bits(stat->st_dev));
}
