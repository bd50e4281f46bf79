/** A folder with two committed snapshots, and plans for containers on them: what each test of the store starts from. */
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterEach, beforeEach, expect } from 'vitest';
import { planRootfs, type RootfsPlan } from '../../../src/rootfs/index.ts';
import { listImage, makeWorkspace, mountsIn, never } from './workspace.ts';

export const writableSizeBytes = 10 * 1024 ** 3;
export const options = { signal: never, writableSizeBytes };

/** What a container gets whose writable layer somebody else has. */
export const busy = { code: 'failed-precondition', message: expect.stringContaining('in use') };

let folder = '';

/** Gives every test of the file a fresh folder, and checks at its end that no mount is left in it. */
export function useSnapshots(): void {
  let workspace: Awaited<ReturnType<typeof makeWorkspace>>;
  beforeEach(async () => {
    workspace = await makeWorkspace();
    folder = workspace.path;
    for (const layer of ['1', '2']) mkdirSync(at('snapshots', layer, 'fs'), { recursive: true });
    writeFileSync(at('snapshots/1/fs/from-1'), 'one');
    writeFileSync(at('snapshots/2/fs/from-2'), 'two');
  });
  afterEach(() => {
    expect(mountsIn(folder)).toEqual([]);
    workspace[Symbol.dispose]();
  });
}

/** A path in the test's folder. */
export const at = (...parts: string[]) => join(folder, ...parts);

/** The store's folder in there. */
export const cache = () => at('cache');

/** The plan of an active overlayfs snapshot on layers 2 and 1, whose directories it makes. */
export function container(id: string): RootfsPlan {
  mkdirSync(at('snapshots', id, 'fs'), { recursive: true });
  mkdirSync(at('snapshots', id, 'work'), { recursive: true });
  const lowerdir = `lowerdir=${at('snapshots/2/fs')}:${at('snapshots/1/fs')}`;
  const own = [`upperdir=${at('snapshots', id, 'fs')}`, `workdir=${at('snapshots', id, 'work')}`];
  return planRootfs([{ type: 'overlay', source: 'overlay', options: ['index=off', ...own, lowerdir] }]);
}

/** The plan of a view of layers 2 and 1. */
export function view(): RootfsPlan {
  const lowerdir = `lowerdir=${at('snapshots/2/fs')}:${at('snapshots/1/fs')}`;
  return planRootfs([{ type: 'overlay', source: 'overlay', options: [lowerdir] }]);
}

/** The plan of a snapshot of the native snapshotter. */
export function native(directory: string, flag = 'rw'): RootfsPlan {
  return planRootfs([{ type: 'bind', source: directory, options: ['rbind', flag] }]);
}

/** The paths in an image, sorted. */
export const paths = async (image: string) => (await listImage(folder, image)).map(({ path }) => path);

/** The command of a Node process that has a `store` on the same cache and runs a script with it. */
export function inOtherProcess(script: string, mkfsErofs = 'mkfs.erofs'): string[] {
  const index = new URL('../../../src/rootfs/index.ts', import.meta.url).href;
  const code = `
    import { RootfsStore } from ${JSON.stringify(index)};
    const store = new RootfsStore(${JSON.stringify({ cacheDir: cache(), mkfsErofs })});
    const options = { signal: new AbortController().signal, writableSizeBytes: ${writableSizeBytes} };
    ${script}`;
  return [process.execPath, '--input-type=module', '-e', code];
}
