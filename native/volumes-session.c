/*
 * The connection. Each thread in turn reads one request, does it, and sends its reply; while it works, another reads the
 * next. So a lone request is never handed from thread to thread, and one that waits (for a disk, for a lock) holds up
 * no other. There are as many threads as requests under way, and one more, up to MAX_THREADS.
 *
 * A message is size[4] type[1] tag[2] and its fields. The tag names a request under way, for Tflush: who has given up
 * waiting for a request says so, and gets Rflush after that request's own reply. A request that may wait for long is
 * interrupted by a signal.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "volumes.h"

#define TFLUSH 108
#define MAX_THREADS 64
/* More than these do not wait for work. */
#define KEPT_THREADS 3
#define STACK_SIZE (128 * 1024)
/* A read takes what is there, up to so much; a larger message's rest goes straight into its thread's buffer. */
#define RECEIVE_SIZE (64 * 1024)

static int connection;
static atomic_uint limit = MAX_MESSAGE;

static struct {
	pthread_mutex_t lock;
	uint8_t bytes[RECEIVE_SIZE];
	size_t start, end;
} received = {.lock = PTHREAD_MUTEX_INITIALIZER};

static pthread_mutex_t sending = PTHREAD_MUTEX_INITIALIZER;

static struct {
	pthread_mutex_t lock;
	pthread_cond_t changed;
	unsigned waiting; /* for a request */
	struct {
		bool exists, busy, flushes;
		uint16_t tag;
		pthread_t thread;
	} slots[MAX_THREADS];
} workers = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};

void set_message_limit(uint32_t size) { atomic_store(&limit, size); }
uint32_t message_limit(void) { return atomic_load(&limit); }

static void __attribute__((noreturn)) end(const char *reason)
{
	if (reason != NULL)
		dprintf(STDERR_FILENO, "kiln-volumes: %s\n", reason);
	_exit(reason == NULL ? 0 : 1);
}

/* Ends the program when there is no more. */
static size_t receive_some(uint8_t *bytes, size_t size)
{
	ssize_t got;
	do
		got = read(connection, bytes, size);
	while (got < 0 && errno == EINTR);
	if (got <= 0)
		end(got == 0 || errno == ECONNRESET ? NULL : "the connection broke");
	return (size_t)got;
}

/* So many bytes of a message, of which some may have been received already. */
static void receive(uint8_t *bytes, size_t size)
{
	size_t ready = received.end - received.start;
	if (ready > size)
		ready = size;
	memcpy(bytes, received.bytes + received.start, ready);
	received.start += ready;
	while (ready < size) {
		if (size - ready >= RECEIVE_SIZE) {
			ready += receive_some(bytes + ready, size - ready);
			continue;
		}
		received.start = 0;
		received.end = receive_some(received.bytes, RECEIVE_SIZE);
		size_t more = received.end < size - ready ? received.end : size - ready;
		memcpy(bytes + ready, received.bytes, more);
		received.start = more;
		ready += more;
	}
}

static void send_all(const uint8_t *bytes, size_t size)
{
	pthread_mutex_lock(&sending);
	while (size > 0) {
		ssize_t sent = write(connection, bytes, size);
		if (sent < 0 && errno == EINTR)
			continue;
		if (sent <= 0)
			end(NULL);
		bytes += sent;
		size -= (size_t)sent;
	}
	pthread_mutex_unlock(&sending);
}

static void *work(void *slot);

/* Without memory for another thread we do with those that there are. */
static bool start_thread(void)
{
	pthread_attr_t attributes;
	size_t slot = 0;
	bool started;
	/* The new one inherits whom we act as, and takes it for root. */
	act_as_root();
	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, STACK_SIZE);
	pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
	pthread_mutex_lock(&workers.lock);
	while (slot < MAX_THREADS && workers.slots[slot].exists)
		slot++;
	started = slot < MAX_THREADS &&
		  pthread_create(&workers.slots[slot].thread, &attributes, work, (void *)slot) == 0;
	if (started) {
		workers.slots[slot].exists = true;
		workers.waiting++;
	}
	pthread_mutex_unlock(&workers.lock);
	pthread_attr_destroy(&attributes);
	return started;
}

/* The next request, into the thread's buffer. When this returns, another thread can read the one after it. */
static size_t next_request(size_t slot, uint8_t *bytes)
{
	pthread_mutex_lock(&received.lock);
	receive(bytes, HEADER_SIZE);
	size_t size = bytes[0] | bytes[1] << 8 | bytes[2] << 16 | (size_t)bytes[3] << 24;
	if (size < HEADER_SIZE || size > message_limit())
		end("the guest sent a message of an impossible size");
	receive(bytes + HEADER_SIZE, size - HEADER_SIZE);
	pthread_mutex_lock(&workers.lock);
	workers.slots[slot].busy = true;
	workers.slots[slot].flushes = bytes[4] == TFLUSH;
	workers.slots[slot].tag = (uint16_t)(bytes[5] | bytes[6] << 8);
	workers.waiting--;
	bool alone = workers.waiting == 0;
	pthread_mutex_unlock(&workers.lock);
	pthread_mutex_unlock(&received.lock);
	if (alone)
		start_thread();
	return size;
}

/* Whether this thread is still wanted. */
static bool finish_request(size_t slot)
{
	pthread_mutex_lock(&workers.lock);
	workers.slots[slot].busy = false;
	bool wanted = workers.waiting < KEPT_THREADS;
	if (wanted)
		workers.waiting++;
	else
		workers.slots[slot].exists = false;
	pthread_cond_broadcast(&workers.changed);
	pthread_mutex_unlock(&workers.lock);
	return wanted;
}

static void *work(void *slot)
{
	size_t own = (size_t)slot;
	/* Touched only as far as messages are long. */
	uint8_t *buffers = mmap(NULL, 2 * MAX_MESSAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (buffers == MAP_FAILED)
		end("there is no memory for another request");
	do {
		size_t size = next_request(own, buffers);
		struct request request = {
			.in = buffers + HEADER_SIZE,
			.left = size - HEADER_SIZE,
			.out = buffers + MAX_MESSAGE,
			.limit = message_limit(),
			.tag = (uint16_t)(buffers[5] | buffers[6] << 8),
			.type = buffers[4],
		};
		handle(&request);
		send_all(request.out, request.length);
	} while (finish_request(own));
	munmap(buffers, 2 * MAX_MESSAGE);
	return NULL;
}

/* Returns when no request with that tag is under way, but for flushes, which could wait for each other. The signal may come before the request waits, so it comes again. */
void flush_tag(uint16_t tag)
{
	bool found;
	pthread_mutex_lock(&workers.lock);
	do {
		found = false;
		for (size_t i = 0; i < MAX_THREADS; i++) {
			if (!workers.slots[i].busy || workers.slots[i].tag != tag)
				continue;
			if (workers.slots[i].flushes)
				continue;
			found = true;
			pthread_kill(workers.slots[i].thread, SIGUSR1);
		}
		if (found) {
			struct timespec soon;
			clock_gettime(CLOCK_REALTIME, &soon);
			soon.tv_nsec += 5 * 1000 * 1000;
			soon.tv_sec += soon.tv_nsec / 1000000000;
			soon.tv_nsec %= 1000000000;
			pthread_cond_timedwait(&workers.changed, &workers.lock, &soon);
		}
	} while (found);
	pthread_mutex_unlock(&workers.lock);
}

static void interrupt(int number) { (void)number; }

void serve(int socket, const char *root)
{
	struct sigaction action = {.sa_handler = interrupt}; /* without SA_RESTART */
	connection = socket;
	set_root(open(root, O_PATH | O_DIRECTORY | O_CLOEXEC));
	sigaction(SIGUSR1, &action, NULL);
	/* Whoever accepted it may have made it non-blocking, and we have it for us alone. */
	fcntl(connection, F_SETFL, fcntl(connection, F_GETFL) & ~O_NONBLOCK);
	allow_only_what_serving_needs();
	if (!start_thread())
		end("there is no memory for a thread");
	for (;;)
		pause();
}
