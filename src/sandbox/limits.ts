/** How long the parts of a container's life may take, in milliseconds. The boot's limit is in the configuration. */

/** Output that a reader takes its time to fetch holds an exit back for so long and no longer. */
export const outputGraceMs = 1000;

/** The time that Delete gives a slow reader before what is left of the output is dropped; runc's shim has the same. */
export const deleteDrainMs = 10_000;

/**
 * The time in which a container that is ended at once may still be killed from inside, so that what it wrote gets to its
 * disk, before its VM is. containerd gives its `delete` 5 s.
 */
export const destroyGraceMs = 3000;

/** How long a VM may take to end by itself after its agent is gone, before it is killed. */
export const guestStopGraceMs = 5000;

/** How long a guest may take to end a container after it has taken SIGKILL for it, before its VM is ended. */
export const killLimitMs = 30_000;

/** How long a guest may take to get to the end of making a container that nobody wants any more. */
export const clearLimitMs = 10_000;

/** How long a VMM may take to tell its guest's console: one that hangs must not take the error with it. */
export const consoleLimitMs = 2000;

/**
 * How long a poststop hook without a timeout of its own may take: nobody can give up a Delete, and kilnd's end waits for
 * it.
 */
export const poststopLimitMs = 60_000;
