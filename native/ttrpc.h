/*
 * The numbers of ttrpc frames and of protobuf messages, for those who speak or look through them: relay-frame.c and
 * process-task.c. Source: containerd/ttrpc channel.go; protobuf's encoding, "Base 128 Varints".
 */
#ifndef KILN_TTRPC_H
#define KILN_TTRPC_H

#include <stdbool.h>
#include <stdint.h>

static inline uint32_t read_u32(const unsigned char *at)
{
	return (uint32_t)at[0] << 24 | (uint32_t)at[1] << 16 | (uint32_t)at[2] << 8 | at[3];
}

static inline void write_u32(unsigned char *at, uint32_t value)
{
	at[0] = (unsigned char)(value >> 24);
	at[1] = (unsigned char)(value >> 16);
	at[2] = (unsigned char)(value >> 8);
	at[3] = (unsigned char)value;
}

/* A varint; false beyond the end, or above 64 bits. */
static inline bool read_varint(const unsigned char **at, const unsigned char *end, uint64_t *value)
{
	*value = 0;
	for (int shift = 0; shift < 64 && *at < end; shift += 7) {
		unsigned char byte = *(*at)++;
		*value |= (uint64_t)(byte & 0x7f) << shift;
		if ((byte & 0x80) == 0)
			return true;
	}
	return false;
}

#endif
