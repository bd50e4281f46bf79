/** What the tests of the root filesystem need: a folder with snapshots, mounts in private namespaces, shell scripts. */
import { chmodSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { mkdtemp } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { mustRun } from '../../support/spawn.ts';
import type { ListedFile } from './listing.ts';

export const isRoot = process.getuid?.() === 0;

export const never = new AbortController().signal;

const lister = join(import.meta.dirname, 'listing.ts');

/** A folder of the test's own; disposing it removes it. */
export async function makeWorkspace(): Promise<{ path: string } & Disposable> {
  const path = await mkdtemp(join(tmpdir(), 'kiln-rootfs-'));
  return { path, [Symbol.dispose]: () => rmSync(path, { recursive: true, force: true }) };
}

/** Runs a shell script in a folder; any command that fails, fails the test. */
export async function sh(cwd: string, script: string): Promise<string> {
  return (await mustRun('sh', ['-euc', script], { cwd })).stdout.toString();
}

/** The listing of what `script` mounts at `mnt` of the folder, in a mount namespace that ends with the call. */
export async function listMounted(cwd: string, script: string): Promise<ListedFile[]> {
  const command = `${script}; exec "$0" "$@"`;
  const program = [process.execPath, lister, 'mnt'];
  const namespace = ['--mount', '--propagation', 'private', '--', 'sh', '-euc', command];
  const { stdout } = await mustRun('unshare', [...namespace, ...program], { cwd });
  const lines = stdout.toString().trimEnd().split('\n');
  return lines.map((line) => JSON.parse(line) as ListedFile);
}

export function listImage(cwd: string, image: string): Promise<ListedFile[]> {
  return listMounted(cwd, `mkdir -p mnt; mount -t erofs -o loop,ro '${image}' mnt`);
}

/** A program that answers -V as mkfs.erofs does and otherwise runs `script`, with mkfs.erofs's arguments. */
export function stubMkfs(folder: string, script: string): string {
  const program = join(folder, 'mkfs-stub');
  writeFileSync(program, `#!/bin/sh\nif [ "$1" = -V ]; then exec mkfs.erofs -V; fi\n${script}\n`);
  chmodSync(program, 0o755);
  return program;
}

/** The mount points of this namespace that lie in a folder. */
export function mountsIn(folder: string): string[] {
  const points = readFileSync('/proc/self/mountinfo', 'utf8')
    .split('\n')
    .map((line) => line.split(' ')[4] ?? '');
  return points.filter((point) => point.startsWith(folder));
}

export const imagesIn = (cache: string): string[] => readdirSync(join(cache, 'layers')).sort();
export const layersIn = (cache: string): string[] => readdirSync(join(cache, 'writable')).sort();
