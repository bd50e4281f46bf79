/**
 * Keeps a process small that relays many bytes.
 *
 * A chunk that has been relayed is garbage right after. Its bytes lie outside of V8's heap, whose collector starts only
 * when some 64 MiB of such bytes have come together: half of a small guest's memory. A minor collection frees them and
 * takes well under a millisecond when the chunks are short-lived, so it is due every few MiB.
 */
/** Bytes between two collections. */
const interval = 8 << 20;

let relayed = 0;
let collect: ((options: { type: 'minor' }) => void) | undefined;

/** Counts bytes that have been relayed and collects what they left when it is worth it. */
export function countRelayed(bytes: number): void {
  relayed += bytes;
  if (relayed < interval) return;
  relayed = 0;
  collectYoung();
}

/** A minor collection, now. */
export function collectYoung(): void {
  if (collect === undefined) {
    // V8 gives its `gc` function to contexts that are made after this flag.
    process.getBuiltinModule('node:v8').setFlagsFromString('--expose-gc');
    collect = process.getBuiltinModule('node:vm').runInNewContext('gc') as NonNullable<typeof collect>;
  }
  collect({ type: 'minor' });
}
