import { execFileSync } from 'node:child_process';
import { mkdtempSync, readdirSync, rmSync, statSync, truncateSync, writeFileSync } from 'node:fs';
import { open } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { BlankFilesystems } from '../../../src/rootfs/blank.ts';

const mib = 2 ** 20;
const never = new AbortController().signal;
let folder: string;
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'kiln-blank-'));
});
afterEach(() => rmSync(folder, { recursive: true }));

const cache = () => join(folder, 'blank');

async function make(name: string, sizeBytes: number, signal = never, blanks = new BlankFilesystems(cache())) {
  const file = join(folder, name);
  await using handle = await open(file, 'wx+');
  await blanks.copyTo(handle.fd, sizeBytes, signal);
  return file;
}

const check = (file: string) => execFileSync('e2fsck', ['-fn', file], { stdio: 'pipe' });

test('a copy is a filesystem of its size, and takes what the first one takes', async () => {
  for (const name of ['first', 'second']) {
    const file = await make(name, 1024 * mib);
    check(file);
    expect(statSync(file).size).toBe(1024 * mib);
    expect(statSync(file).blocks * 512).toBeLessThan(mib);
  }
  execFileSync('cmp', [join(folder, 'first'), join(folder, 'second')]);
  expect(readdirSync(cache())).toEqual([`${1024 * mib}-1.ext4`]);
});

test('many at once make one, and each size has its own', async () => {
  const blanks = new BlankFilesystems(cache());
  const sizes = [64, 64, 64, 128, 128].map((size) => size * mib);
  const files = await Promise.all(sizes.map((size, index) => make(`copy-${index}`, size, never, blanks)));
  for (const file of files) check(file);
  expect(readdirSync(cache()).length).toBe(2);
});

test.each<[string, (blank: string) => void]>([
  ['cut off', (blank) => truncateSync(blank, mib)],
  ['no filesystem', (blank) => writeFileSync(blank, Buffer.alloc(64 * mib, 'x'))],
])('one that is %s is made anew', async (_what, damage) => {
  await make('first', 64 * mib);
  damage(join(cache(), `${64 * mib}-1.ext4`));
  check(await make('second', 64 * mib));
});

test('one that mkfs.ext4 cannot make says so, and leaves nothing', async () => {
  await expect(make('tiny', 4096)).rejects.toMatchObject({
    code: 'internal',
    message: expect.stringMatching(/^cannot make the empty filesystem .*: mkfs\.ext4: /),
  });
  expect(readdirSync(cache())).toEqual([]);
});

test('one that nobody wants any more leaves nothing', async () => {
  const reason = new Error('enough');
  await expect(make('unwanted', 64 * mib, AbortSignal.abort(reason))).rejects.toBe(reason);
  expect(readdirSync(cache())).toEqual([]);
});
