import {
  closeSync,
  constants,
  type FSWatcher,
  fstatSync,
  ftruncateSync,
  openSync,
  readSync,
  watch,
  writeSync,
} from 'node:fs';

/** The most that a helper's log may hold, in bytes. It lies in memory (tmpfs), and a guest can make its VMM complain. */
export const logLimitBytes = 1 << 20;

/** What is left of a log that was too long: its end, in bytes. */
const keptBytes = 64 * 1024;

/**
 * Cuts a log down to its end each time it has grown past the limit; its program must append. It may pass the limit by
 * what is written until the event loop comes to it, and lines that are written in the moment of the cut are lost.
 */
export function limitLog(file: string): Disposable {
  const check = () => {
    try {
      cut(file);
    } catch {
      // The sandbox's directory is gone.
    }
  };
  let watcher: FSWatcher | undefined;
  try {
    watcher = watch(file, { persistent: false }, check);
    watcher.on('error', () => watcher?.close());
    // For what was written while nobody watched.
    check();
  } catch {
    // The file is gone, or the user's inotify watches are used up: no reason to end a virtual machine.
  }
  return { [Symbol.dispose]: () => watcher?.close() };
}

function cut(file: string): void {
  const fd = openSync(file, constants.O_RDWR | constants.O_APPEND);
  try {
    const { size } = fstatSync(fd);
    if (size <= logLimitBytes) return;
    const end = Buffer.alloc(keptBytes);
    const length = readSync(fd, end, 0, keptBytes, size - keptBytes);
    ftruncateSync(fd);
    writeSync(fd, end, 0, length);
  } finally {
    closeSync(fd);
  }
}
