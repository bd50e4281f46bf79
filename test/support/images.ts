/**
 * OCI images made on the spot: no registry, and layers as odd as a test wants them.
 *
 * An OCI archive is a tar of `oci-layout`, `index.json` and blobs named by their SHA-256. A layer is a tar itself; in
 * it, a file `.wh.NAME` removes NAME of the layers below, and `.wh..wh..opq` hides everything the folder held there
 * (image-spec, layer.md).
 */
import { execFileSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { readFileSync, realpathSync } from 'node:fs';
import { basename } from 'node:path';
import { gzipSync } from 'node:zlib';
import { type Header, pack } from 'tar-stream';
import type { Containerd } from './containerd.ts';
import { busyboxBinary } from './paths.ts';

interface Attributes {
  readonly mode?: number;
  readonly uid?: number;
  readonly gid?: number;
  /** Whole seconds, so that every filesystem on the way can keep it. */
  readonly mtime?: Date;
  /** Values are ASCII (NUL included): tar-stream writes PAX records as UTF-8. */
  readonly xattrs?: Readonly<Record<string, string>>;
}

/** One entry of a layer. `path` goes into the tar as it is: also `../x`, to test who is careful. */
export type LayerEntry = { readonly path: string } & Attributes &
  (
    | { readonly kind: 'file'; readonly content: string | Buffer }
    | { readonly kind: 'dir' | 'fifo' }
    | { readonly kind: 'symlink' | 'link'; readonly target: string }
    | { readonly kind: 'char' | 'block'; readonly major: number; readonly minor: number }
  );

/** The entry that removes `path` of the layers below. */
export function whiteout(path: string): LayerEntry {
  const slash = path.lastIndexOf('/') + 1;
  return { kind: 'file', path: `${path.slice(0, slash)}.wh.${path.slice(slash)}`, content: '' };
}

/** The entry that hides what the layers below have in the folder `path`. */
export function opaque(path: string): LayerEntry {
  return { kind: 'file', path: `${path}/.wh..wh..opq`, content: '' };
}

export interface ImageConfig {
  readonly Cmd?: readonly string[];
  readonly Env?: readonly string[];
  readonly WorkingDir?: string;
  readonly User?: string;
}

export interface Image {
  /** Full reference, for example docker.io/kiln/busybox:test. */
  readonly name: string;
  /** From the bottom up. */
  readonly layers: readonly (readonly LayerEntry[])[];
  readonly config?: ImageConfig;
}

const tarTypes = {
  file: 'file',
  dir: 'directory',
  fifo: 'fifo',
  symlink: 'symlink',
  link: 'link',
  char: 'character-device',
  block: 'block-device',
} as const;
const defaultMtime = new Date('2024-02-29T12:34:56Z');
// Six octal digits: what tar-stream's ustar header holds.
const largestUstarId = 0o777777;

function tarHeader(entry: LayerEntry): Partial<Header> & { name: string } {
  const pax: Record<string, string> = {};
  for (const [name, value] of Object.entries(entry.xattrs ?? {})) pax[`SCHILY.xattr.${name}`] = value;
  if ((entry.uid ?? 0) > largestUstarId) pax.uid = String(entry.uid);
  if ((entry.gid ?? 0) > largestUstarId) pax.gid = String(entry.gid);
  const header: Partial<Header> & { name: string } = {
    name: entry.path,
    type: tarTypes[entry.kind],
    mode: entry.mode ?? (entry.kind === 'dir' ? 0o755 : 0o644),
    uid: Math.min(entry.uid ?? 0, largestUstarId),
    gid: Math.min(entry.gid ?? 0, largestUstarId),
    mtime: entry.mtime ?? defaultMtime,
  };
  if (Object.keys(pax).length > 0) header.pax = pax;
  if ('target' in entry) header.linkname = entry.target;
  if ('major' in entry) Object.assign(header, { devmajor: entry.major, devminor: entry.minor });
  return header;
}

/** The entries as an uncompressed tar. */
export async function layerTar(entries: readonly LayerEntry[]): Promise<Buffer> {
  const tar = pack();
  const chunks: Buffer[] = [];
  tar.on('data', (chunk) => chunks.push(chunk as Buffer));
  for (const entry of entries) {
    await new Promise<void>((resolve, reject) => {
      const done = (error?: Error | null): void => (error ? reject(error) : resolve());
      if (entry.kind === 'file') tar.entry(tarHeader(entry), Buffer.from(entry.content), done);
      else tar.entry(tarHeader(entry), done);
    });
  }
  const ended = new Promise<void>((resolve) => tar.once('end', resolve));
  tar.finalize();
  await ended;
  return Buffer.concat(chunks);
}

/** As descriptors have it. */
export const sha256 = (data: Buffer): string => `sha256:${createHash('sha256').update(data).digest('hex')}`;

/** The image as an OCI archive for `ctr image import`. */
export async function imageArchive(image: Image): Promise<Buffer> {
  const blobs = new Map<string, Buffer>();
  const add = (mediaType: string, data: Buffer): { mediaType: string; digest: string; size: number } => {
    const digest = sha256(data);
    blobs.set(digest, data);
    return { mediaType, digest, size: data.length };
  };
  const json = (value: unknown): Buffer => Buffer.from(JSON.stringify(value));

  const layers = [];
  const diffIds: string[] = [];
  for (const entries of image.layers) {
    const tar = await layerTar(entries);
    diffIds.push(sha256(tar));
    layers.push(add('application/vnd.oci.image.layer.v1.tar+gzip', gzipSync(tar, { level: 1 })));
  }
  const platform = { architecture: process.arch === 'arm64' ? 'arm64' : 'amd64', os: 'linux' };
  const config = add(
    'application/vnd.oci.image.config.v1+json',
    json({
      ...platform,
      config: { Env: ['PATH=/usr/sbin:/usr/bin:/sbin:/bin'], ...image.config },
      rootfs: { type: 'layers', diff_ids: diffIds },
    }),
  );
  const manifestType = 'application/vnd.oci.image.manifest.v1+json';
  const manifest = add(manifestType, json({ schemaVersion: 2, mediaType: manifestType, config, layers }));
  const index = {
    schemaVersion: 2,
    manifests: [{ ...manifest, platform, annotations: { 'io.containerd.image.name': image.name } }],
  };
  return layerTar([
    { kind: 'file', path: 'oci-layout', content: json({ imageLayoutVersion: '1.0.0' }) },
    { kind: 'file', path: 'index.json', content: json(index) },
    { kind: 'dir', path: 'blobs' },
    { kind: 'dir', path: 'blobs/sha256' },
    ...[...blobs].map(
      ([digest, content]): LayerEntry => ({ kind: 'file', path: `blobs/sha256/${digest.slice(7)}`, content }),
    ),
  ]);
}

/** Imports and unpacks an image; fails with containerd's words when it will not have it. */
export async function importImage(containerd: Containerd, image: Image, snapshotter?: string): Promise<void> {
  const flags = snapshotter === undefined ? [] : ['--snapshotter', snapshotter];
  const result = await containerd.ctr(['image', 'import', ...flags, '-'], { stdin: await imageArchive(image) });
  if (result.code !== 0) throw new Error(`ctr image import: ${result.stderr}`);
}

/** A layer with a static busybox, all its applets, and the few files a program expects of a root filesystem. */
export function busyboxLayer(): LayerEntry[] {
  const binary = busyboxBinary();
  const applets = execFileSync(binary, ['--list'], { encoding: 'utf8' }).split('\n').filter(Boolean);
  const dirs = ['bin', 'etc', 'root', 'tmp', 'proc', 'sys', 'dev', 'var', 'home'];
  return [
    ...dirs.map((path): LayerEntry => ({ kind: 'dir', path, mode: path === 'tmp' ? 0o1777 : 0o755 })),
    { kind: 'file', path: 'bin/busybox', mode: 0o755, content: readFileSync(binary) },
    ...applets
      .filter((name) => name !== 'busybox')
      .map((name): LayerEntry => ({ kind: 'symlink', path: `bin/${name}`, target: 'busybox', mode: 0o777 })),
    {
      kind: 'file',
      path: 'etc/passwd',
      content: 'root:x:0:0:root:/root:/bin/sh\nkate:x:1234:5678:Kate:/home:/bin/sh\n',
    },
    { kind: 'file', path: 'etc/group', content: 'root:x:0:\nstaff:x:5678:\nextra:x:777:kate\n' },
  ];
}

export const busyboxImage: Image = {
  name: 'docker.io/kiln/busybox:test',
  get layers() {
    return [busyboxLayer()];
  },
  config: { Cmd: ['sh'] },
};

/**
 * GNU tar with its libraries, in a folder of its own: inside a container it describes a whole tree (types, modes,
 * owners, times, links, devices, extended attributes, contents) in one stream. The host's own is taken: busybox's tar
 * knows no extended attributes.
 */
export function tarToolLayer(): LayerEntry[] {
  const libraries = execFileSync('ldd', ['/bin/tar'], { encoding: 'utf8' })
    .split('\n')
    .map((line) => /(\/\S+) \(0x/.exec(line)?.[1])
    .filter((path) => path !== undefined);
  const copy = (path: string, name: string): LayerEntry => {
    return { kind: 'file', path: `.tar/${name}`, mode: 0o755, content: readFileSync(realpathSync(path)) };
  };
  const loader = libraries.find((path) => basename(path).startsWith('ld-'));
  if (loader === undefined) throw new Error('ldd names no dynamic loader for /bin/tar');
  return [
    { kind: 'dir', path: '.tar' },
    copy('/bin/tar', 'tar'),
    copy(loader, 'loader'),
    ...libraries.filter((path) => path !== loader).map((path) => copy(path, basename(path))),
  ];
}

/** The command that writes the listing of `tarToolLayer` to stdout, for the tree at `root`. */
export function tarToolCommand(root: string, exclude: readonly string[] = []): string[] {
  return [
    ...['/.tar/loader', '--library-path', '/.tar', '/.tar/tar', '--create', '--format=posix', '--sort=name'],
    ...['--pax-option=delete=atime,delete=ctime', '--numeric-owner', '--xattrs', '--xattrs-include=*'],
    ...['--one-file-system', ...exclude.map((path) => `--exclude=${path}`), '--directory', root, '.'],
  ];
}
