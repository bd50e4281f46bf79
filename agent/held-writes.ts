/** Writes to the host in as few pieces as may be, by a library that kiln-init has loaded into this program. */
import koffi from 'koffi';

/** Made of native/guest-joined-writes.c. */
const library = '/usr/lib/kiln/kiln-joined-writes.so';

let cHoldWritesTo: ((fd: number) => void) | undefined;

/**
 * What is written to this descriptor from now on is held until the event loop has nothing else to do. An earlier one is
 * forgotten. For this program's main thread.
 */
export function holdWritesTo(fd: number): void {
  cHoldWritesTo ??= koffi.load(library).func('void kiln_hold_writes_to(int fd)') as (fd: number) => void;
  cHoldWritesTo(fd);
}
