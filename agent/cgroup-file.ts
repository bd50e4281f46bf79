/**
 * The formats of cgroup v2's files, and waiting for those that tell of their changes.
 *
 * Documentation/admin-guide/cgroup-v2.rst, "Interface Files": one value, `KEY VALUE` a line ("flat keyed"), or
 * `KEY SUB=VALUE SUB=VALUE` a line ("nested keyed"). A limit is a number or `max`. cgroup.events and memory.events raise
 * inotify's IN_MODIFY when a value in them changes.
 */
import { type FSWatcher, readFileSync, watch } from 'node:fs';

/** Everything of a file; undefined when there is none: the kernel lacks it, or the group is gone. */
export function readIfThere(path: string): string | undefined {
  try {
    return readFileSync(path, 'utf8');
  } catch (error) {
    if (isGone(error)) return undefined;
    throw error;
  }
}

/** Not there (ENOENT), removed between opening and reading (ENODEV), or not supported by this device (EOPNOTSUPP). */
function isGone(error: unknown): boolean {
  const { code } = error as NodeJS.ErrnoException;
  return code === 'ENOENT' || code === 'ENODEV' || code === 'EOPNOTSUPP';
}

/** A flat keyed file. Lines that are none are left out. */
export function parseFlatKeyed(text: string): Record<string, bigint> {
  const entries = text.matchAll(/^(\S+) (\d+)$/gm);
  return Object.fromEntries([...entries].map(([, key = '', value = '']) => [key, BigInt(value)]));
}

/** A file of one value; undefined for `max`. */
export function parseValue(text: string): bigint | undefined {
  const value = text.trim();
  return /^\d+$/.test(value) ? BigInt(value) : undefined;
}

/** A nested keyed file: the numbers of each key. */
export function parseNestedKeyed(text: string): [key: string, values: Record<string, bigint>][] {
  return text
    .split('\n')
    .filter(Boolean)
    .map((line) => {
      const [key = '', ...pairs] = line.split(' ');
      const values = pairs.map((pair) => /^(\w+)=(\d+)$/.exec(pair)).filter((match) => match !== null);
      return [key, Object.fromEntries(values.map(([, name = '', value = '']) => [name, BigInt(value)]))];
    });
}

/**
 * Calls `changed` at each change of a file. Changes in quick succession may come as one.
 *
 * @throws the error of inotify_add_watch(2): there is no such file
 */
export function watchFile(path: string, changed: () => void): Disposable {
  const watcher: FSWatcher = watch(path, { persistent: false }, changed);
  // It has none after its start, except that the file goes; then nobody waits for it any more.
  watcher.on('error', () => {});
  return { [Symbol.dispose]: () => watcher.close() };
}
