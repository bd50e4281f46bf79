/* What the parts of kiln-init share; the story is at the head of guest-init.c.
 *
 *   guest-init.c         its start, what the kernel's command line says to it, and how it tells what went wrong
 *   guest-init-root.c    the first stage: from the initrd to the guest image
 *   guest-init-system.c  the second stage: what the agent and its containers find, and the agent's start
 */
#ifndef KILN_GUEST_INIT_H
#define KILN_GUEST_INIT_H

#include <stdbool.h>
#include <sys/types.h>

/* --- the console --- */

void say(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* The time since boot at this step, where the host wants to know. */
void trace(const char *step);

/* Tells what went wrong, with errno's text, and ends the machine. */
void fail(const char *what) __attribute__((noreturn));

/* --- the kernel's command line --- */

#define MAX_SERIAL 20 /* virtio allows 20 bytes */

/* The host has no hardware virtualisation: each piece of machine code is translated before it runs. */
extern bool emulated;
/* Names with commas between them. */
extern char wanted_modules[256];
/* The kernel was told to start the second stage itself. */
extern bool has_one_stage;
/* Of the guest image's disk. */
extern char root_serial[MAX_SERIAL + 1];

/* Must come before anything above is looked at, and after /proc is mounted. */
void read_command_line(void);

/* Tells the VMM that the first program runs, where it asks for that. */
void tell_boot_timer(void);

/* --- what both stages do; what is there already is no error --- */

void mount_or_fail(const char *type, const char *target, unsigned long flags, const char *options);
void make_directory(const char *path, mode_t mode);

/* What a file of the kernel's says, as far as there is room for it and an end. */
void read_or_fail(const char *path, char *text, size_t size);

/* --- the stages --- */

void first_stage(void) __attribute__((noreturn));
void second_stage(void) __attribute__((noreturn));

#endif
