/**
 * Lists a whole tree, so that two trees can be compared: `node listing.ts DIRECTORY` prints one JSON object per file,
 * sorted by path. A program of its own, because it has to run in the mount namespace that has the tree.
 *
 * Left out is what a filesystem is free to choose: inode numbers (but which names share an inode is in), sizes of
 * directories, link counts, access and change times.
 */
import { createHash } from 'node:crypto';
import { type BigIntStats, lstatSync, readdirSync, readFileSync, readlinkSync } from 'node:fs';
import koffi from 'koffi';

const libc = koffi.load('libc.so.6');
const lsetxattr = libc.func(
  'int lsetxattr(const char *path, const char *name, const void *value, size_t size, int flags)',
);
const llistxattr = libc.func('long llistxattr(const uint8_t *path, _Out_ uint8_t *list, size_t size)');
const lgetxattr = libc.func('long lgetxattr(const uint8_t *path, const char *name, _Out_ uint8_t *value, size_t size)');

/** lsetxattr(2). */
export function setXattr(path: string, name: string, value: Buffer): void {
  if (lsetxattr(path, name, value, value.length, 0) !== 0)
    throw new Error(`lsetxattr ${name} ${path}: ${koffi.errno()}`);
}

export interface ListedFile {
  /** In latin1, so that every byte of the name is one character. */
  readonly path: string;
  readonly mode: string;
  readonly owner: string;
  readonly mtimeNs: string;
  readonly size?: string;
  readonly sha256?: string;
  readonly target?: string;
  readonly device?: string;
  /** The first name of the same inode. */
  readonly sameAs?: string;
  readonly xattrs: Readonly<Record<string, string>>;
}

export function list(root: Buffer): ListedFile[] {
  const files: ListedFile[] = [];
  const firstNames = new Map<string, string>();
  const visit = (path: Buffer) => {
    const stats = lstatSync(path, { bigint: true });
    const name = path.subarray(root.length).toString('latin1');
    const inode = `${stats.dev}:${stats.ino}`;
    const first = stats.isDirectory() ? undefined : firstNames.get(inode);
    firstNames.set(inode, first ?? name);
    files.push({
      path: name,
      mode: stats.mode.toString(8),
      owner: `${stats.uid}:${stats.gid}`,
      mtimeNs: String(stats.mtimeNs),
      ...content(path, stats),
      ...(first === undefined ? {} : { sameAs: first }),
      xattrs: xattrsOf(path),
    });
    if (!stats.isDirectory()) return;
    const names = readdirSync(path, { encoding: 'buffer' }).sort(Buffer.compare);
    // A whiteout outside of a merged directory has a name and nothing else (stat(2): ENOENT).
    const children = names.map((child) => Buffer.concat([path, Buffer.from('/'), child]));
    for (const child of children) if (lstatSync(child, { throwIfNoEntry: false }) !== undefined) visit(child);
  };
  visit(root);
  return files;
}

function content(path: Buffer, stats: BigIntStats): Pick<ListedFile, 'size' | 'sha256' | 'target' | 'device'> {
  if (stats.isSymbolicLink()) return { target: readlinkSync(path, 'buffer').toString('latin1') };
  if (stats.isCharacterDevice() || stats.isBlockDevice()) return { device: String(stats.rdev) };
  if (!stats.isFile()) return {};
  return { size: String(stats.size), sha256: createHash('sha256').update(readFileSync(path)).digest('hex') };
}

function xattrsOf(path: Buffer): Record<string, string> {
  const names = Buffer.alloc(64 * 1024);
  const terminated = Buffer.concat([path, Buffer.from([0])]);
  const length = llistxattr(terminated, names, names.length);
  if (length < 0) throw new Error(`llistxattr ${path}: ${koffi.errno()}`);
  const found: Record<string, string> = {};
  for (const name of names.toString('latin1', 0, length).split('\0').filter(Boolean).sort()) {
    const value = Buffer.alloc(64 * 1024);
    found[name] = value.toString('hex', 0, lgetxattr(terminated, name, value, value.length));
  }
  return found;
}

if (process.argv[1] === import.meta.filename) {
  const root = Buffer.from(process.argv[2] ?? '');
  process.stdout.write(
    list(root)
      .map((file) => `${JSON.stringify(file)}\n`)
      .join(''),
  );
}
