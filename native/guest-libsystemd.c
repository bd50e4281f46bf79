/*
 * libsystemd.so: what crun wants of the library of that name, which it never calls in the guest: it is told to use the
 * kernel's control groups itself (--cgroup-manager=cgroupfs), and nobody waits for its notices. The real one brings five
 * libraries more, and a crun would spend more on loading and linking the six than on all else that it does before it reads
 * its command line. Each function says that it cannot; guest-libsystemd.ld gives them the versions that crun asks for.
 */
#include <errno.h>
#include <stddef.h>

#define CANNOT(name)                                                                                                             \
  int name(void) { return -ENOSYS; }
#define NOTHING(name)                                                                                                            \
  void *name(void) { return NULL; }

CANNOT(sd_bus_call)
CANNOT(sd_bus_default_system)
CANNOT(sd_bus_default_user)
NOTHING(sd_bus_error_free)
CANNOT(sd_bus_error_get_errno)
CANNOT(sd_bus_match_signal_async)
CANNOT(sd_bus_message_append)
CANNOT(sd_bus_message_append_array)
CANNOT(sd_bus_message_append_basic)
CANNOT(sd_bus_message_append_strv)
CANNOT(sd_bus_message_close_container)
CANNOT(sd_bus_message_new_method_call)
CANNOT(sd_bus_message_open_container)
CANNOT(sd_bus_message_read)
NOTHING(sd_bus_message_unref)
CANNOT(sd_bus_process)
NOTHING(sd_bus_unref)
CANNOT(sd_bus_wait)
CANNOT(sd_journal_send_with_location)
CANNOT(sd_notify)
CANNOT(sd_notify_barrier)
