/*
 * A wall clock that jumps for one program alone: for tests. Preloaded, it adds the seconds that lie in the file KT_CLOCK, a
 * 64-bit number, to what the C library tells of CLOCK_REALTIME, in the process whose command line has KT_CLOCK_OF in it. All
 * other clocks, and all other processes, have the right time.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const volatile int64_t *seconds;
static int (*real_clock_gettime)(clockid_t, struct timespec *);

static int is_meant(const char *part)
{
	char text[4096];
	int fd = open("/proc/self/cmdline", O_RDONLY | O_CLOEXEC);
	ssize_t length = fd < 0 ? 0 : read(fd, text, sizeof text);
	if (fd >= 0)
		close(fd);
	return length > 0 && memmem(text, (size_t)length, part, strlen(part)) != NULL;
}

__attribute__((constructor)) static void find_shift(void)
{
	real_clock_gettime = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
	const char *file = getenv("KT_CLOCK"), *part = getenv("KT_CLOCK_OF");
	if (file == NULL || part == NULL || !is_meant(part))
		return;
	int fd = open(file, O_RDONLY | O_CLOEXEC);
	void *shared = fd < 0 ? MAP_FAILED : mmap(NULL, sizeof *seconds, PROT_READ, MAP_SHARED, fd, 0);
	if (shared != MAP_FAILED)
		seconds = shared;
	if (fd >= 0)
		close(fd);
}

int clock_gettime(clockid_t clock, struct timespec *time)
{
	if (real_clock_gettime == NULL)
		find_shift();
	int result = real_clock_gettime(clock, time);
	if (result == 0 && seconds != NULL && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
		time->tv_sec += *seconds;
	return result;
}

int gettimeofday(struct timeval *restrict time, void *restrict zone)
{
	(void)zone;
	struct timespec now;
	int result = clock_gettime(CLOCK_REALTIME, &now);
	if (result == 0) {
		time->tv_sec = now.tv_sec;
		time->tv_usec = now.tv_nsec / 1000;
	}
	return result;
}
