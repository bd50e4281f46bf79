/*
 * The frames of one client that wait: requests until kilnd has answered them, replies until containerd has taken them. Both
 * keep their order, and requests also through a lost session, after which all of them are sent again.
 */
#define _GNU_SOURCE
#include "relay.h"

#include <stdlib.h>

/* Towards kilnd. */

void init_requests(struct requests *requests)
{
	*requests = (struct requests){.last = &requests->frames};
}

void add_request(struct requests *requests, struct frame *frame)
{
	*requests->last = frame;
	requests->last = &frame->next;
	if (requests->unsent == NULL)
		requests->unsent = frame;
	requests->count++;
	requests->bytes += frame->length;
}

/* The frame is the caller's then. */
static struct frame *take_request(struct requests *requests, struct frame **at)
{
	struct frame *frame = *at;
	*at = frame->next;
	if (requests->last == &frame->next)
		requests->last = at;
	if (requests->unsent == frame)
		requests->unsent = frame->next;
	requests->count--;
	requests->bytes -= frame->length;
	frame->next = NULL;
	return frame;
}

bool send_requests(struct requests *requests, int session)
{
	while (requests->unsent) {
		struct frame *frame = requests->unsent;
		int written = write_frame(session, frame);
		if (written <= 0)
			return written == 0;
		frame->sent = frame->seen = true;
		requests->unsent = frame->next;
		if (frame->type == FRAME_REQUEST)
			continue;
		struct frame **at = &requests->frames;
		while (*at != frame)
			at = &(*at)->next;
		free(take_request(requests, at));
	}
	return true;
}

void forget_answered(struct requests *requests, uint32_t stream)
{
	for (struct frame **at = &requests->frames; *at && (*at)->sent;)
		if ((*at)->stream == stream)
			free(take_request(requests, at));
		else
			at = &(*at)->next;
}

struct frame *take_all_but_waits(struct requests *requests)
{
	struct frame *taken = NULL, **last = &taken;
	for (struct frame **at = &requests->frames; *at;) {
		struct frame *frame = *at;
		if (frame->type != FRAME_REQUEST || frame->wait) {
			at = &frame->next;
			continue;
		}
		*last = take_request(requests, at);
		last = &frame->next;
	}
	return taken;
}

struct frame *rewind_requests(struct requests *requests)
{
	struct frame *taken = NULL, **last = &taken;
	for (struct frame **at = &requests->frames; *at;) {
		struct frame *frame = *at;
		if (frame->sent && !frame->wait && ++frame->replays > REPLAY_LIMIT) {
			*last = take_request(requests, at);
			last = &frame->next;
			continue;
		}
		frame->sent = false;
		frame->done = 0;
		at = &frame->next;
	}
	requests->unsent = requests->frames;
	return taken;
}

size_t count_replayed(const struct requests *requests)
{
	size_t replayed = 0;
	for (struct frame *frame = requests->frames; frame && frame->seen; frame = frame->next)
		replayed++;
	return replayed;
}

void drop_requests(struct requests *requests)
{
	while (requests->frames)
		free(take_request(requests, &requests->frames));
}

/* Towards containerd. */

void init_replies(struct replies *replies)
{
	*replies = (struct replies){.last = &replies->frames};
}

void add_reply(struct replies *replies, struct frame *frame)
{
	*replies->last = frame;
	replies->last = &frame->next;
	replies->count++;
}

static void drop_first_reply(struct replies *replies)
{
	struct frame *frame = replies->frames;
	replies->frames = frame->next;
	if (replies->frames == NULL)
		replies->last = &replies->frames;
	replies->count--;
	free(frame);
}

bool send_replies(struct replies *replies, int client)
{
	while (replies->frames) {
		int written = write_frame(client, replies->frames);
		if (written <= 0)
			return written == 0;
		drop_first_reply(replies);
	}
	return true;
}

void drop_replies(struct replies *replies)
{
	while (replies->frames)
		drop_first_reply(replies);
}
