/** The store: what is made once, what is shared, what is found again, and what goes away. */
import { existsSync, mkdirSync, readFileSync, renameSync, rmSync, statSync, symlinkSync, writeFileSync } from 'node:fs';
import { describe, expect, test } from 'vitest';
import { type RootfsPlan, RootfsStore, SnapshotUpper } from '../../../src/rootfs/index.ts';
import { mustRun } from '../../support/spawn.ts';
import {
  at,
  busy,
  cache,
  container,
  native,
  options,
  paths,
  useSnapshots,
  view,
  writableSizeBytes,
} from './snapshots.ts';
import { imagesIn, isRoot, layersIn, never, sh, stubMkfs } from './workspace.ts';

describe.skipIf(!isRoot)('RootfsStore', () => {
  useSnapshots();

  /** The inode number: a file that was made again has another. */
  const made = (file: string) => statSync(file).ino;

  describe('the image', () => {
    test('is made once and shared by containers of the same image, also after a restart of kilnd', async () => {
      await using first = await new RootfsStore({ cacheDir: cache() }).prepare(container('10'), options);
      const inode = made(first.lower.file);
      await using second = await new RootfsStore({ cacheDir: cache() }).prepare(container('11'), options);
      expect(second.lower).toEqual({ file: first.lower.file, readOnly: true, format: 'erofs' });
      expect(made(second.lower.file)).toBe(inode);
      expect(second.writable?.file).not.toBe(first.writable?.file);
      expect(await paths(first.lower.file)).toEqual(['', '/from-1', '/from-2']);
    });

    test('is converted once when twenty containers ask at the same time', async () => {
      const program = stubMkfs(at(), `echo run >>${at('runs')}; exec mkfs.erofs "$@"`);
      const store = new RootfsStore({ cacheDir: cache(), mkfsErofs: program });
      const plans = Array.from({ length: 20 }, (_, index) => container(`c${index}`));
      const all = await Promise.all(plans.map((plan) => store.prepare(plan, options)));
      expect(new Set(all.map(({ lower }) => lower.file)).size).toBe(1);
      expect(readFileSync(at('runs'), 'utf8')).toBe('run\n');
      for (const rootfs of all) await rootfs.release();
    });

    test('is made anew when a layer was removed and made again at the same path', async () => {
      const store = new RootfsStore({ cacheDir: cache() });
      const first = await store.prepare(view(), options);
      await first.release();
      rmSync(at('snapshots/2'), { recursive: true });
      mkdirSync(at('snapshots/2/fs'), { recursive: true });
      writeFileSync(at('snapshots/2/fs/another'), 'x');
      await using second = await store.prepare(view(), options);
      expect(second.lower.file).not.toBe(first.lower.file);
      expect(await paths(second.lower.file)).toEqual(['', '/another', '/from-1']);
      expect(await store.collectGarbage()).toEqual([first.lower.file]);
    });

    test('is of the layers alone, and shared; what somebody put into the snapshot comes as files, with what is gone', async () => {
      const plan = container('10');
      const before = await new RootfsStore({ cacheDir: cache() }).prepare(plan, options);
      await before.release();
      await sh(at('snapshots/10/fs'), 'echo x >copied-in; mknod from-1 c 0 0');
      await using rootfs = await new RootfsStore({ cacheDir: cache() }).prepare(plan, options);
      expect(rootfs.lower.file).toBe(before.lower.file);
      using edits = await new SnapshotUpper(plan.upper!).edits();
      const pieces: Buffer[] = [];
      for await (const piece of edits!.stream) pieces.push(piece);
      const { stdout } = await mustRun('tar', ['-tf', '-'], { stdin: Buffer.concat(pieces) });
      expect(stdout.toString()).toBe('./\n./copied-in\n./from-1\n');
    });

    test('of a writable directory is made afresh for each create and goes with it', async () => {
      const store = new RootfsStore({ cacheDir: cache() });
      const directory = native(at('snapshots/1/fs'));
      const first = await store.prepare(directory, options);
      expect(await paths(first.lower.file)).toEqual(['', '/from-1']);
      await first.release();
      expect(imagesIn(cache())).toEqual([]);
      writeFileSync(at('snapshots/1/fs/later'), 'x');
      await using second = await store.prepare(directory, options);
      expect(await paths(second.lower.file)).toEqual(['', '/from-1', '/later']);
    });

    test('of a read-only bind is kept and comes without a writable disk', async () => {
      const store = new RootfsStore({ cacheDir: cache() });
      const first = await store.prepare(native(at('snapshots/1/fs'), 'ro'), options);
      expect(first.writable).toBeNull();
      await first.release();
      expect(existsSync(first.lower.file)).toBe(true);
    });

    test('of an image without layers is an empty tree', async () => {
      mkdirSync(at('snapshots/empty/fs'), { recursive: true });
      await using rootfs = await new RootfsStore({ cacheDir: cache() }).prepare(
        native(at('snapshots/empty/fs')),
        options,
      );
      expect(await paths(rootfs.lower.file)).toEqual(['']);
    });
  });

  describe('the writable layer', () => {
    test('is an ext4 filesystem of the given size that takes less than 1 MiB of the disk', async () => {
      await using rootfs = await new RootfsStore({ cacheDir: cache() }).prepare(container('10'), options);
      expect(rootfs.writable).toEqual({ file: at('snapshots/10/work/kiln-rw.ext4'), readOnly: false, format: 'ext4' });
      const { size, blocks, mode } = statSync(at('snapshots/10/work/kiln-rw.ext4'));
      expect({ size, mode: mode & 0o777 }).toEqual({ size: writableSizeBytes, mode: 0o600 });
      expect(blocks * 512).toBeLessThan(1024 * 1024);
      await mustRun('e2fsck', ['-fn', at('snapshots/10/work/kiln-rw.ext4')]);
      const script = 'mkdir mnt; mount -o loop,noinit_itable,discard,relatime "$0" mnt; df -B1M --output=avail mnt';
      const namespace = ['--mount', '--propagation', 'private', '--', 'sh', '-euc', script];
      const { stdout } = await mustRun('unshare', [...namespace, rootfs.writable?.file ?? ''], { cwd: at() });
      expect(Number(stdout.toString().split('\n')[1])).toBeGreaterThan(10_000);
    });

    test('is found again, with its content, when the same container starts again', async () => {
      const plan = container('10');
      const first = await new RootfsStore({ cacheDir: cache() }).prepare(plan, options);
      const file = first.writable?.file ?? '';
      await sh(at(), `echo mine >data; debugfs -w -R 'write data kept' '${file}' 2>/dev/null`);
      await first.release();
      await using second = await new RootfsStore({ cacheDir: cache() }).prepare(plan, options);
      expect(second.writable?.file).toBe(file);
      expect(await sh(at(), `debugfs -R 'cat kept' '${file}' 2>/dev/null`)).toBe('mine\n');
    });

    test('of the native snapshotter is found again, and goes when the snapshot is gone', async () => {
      const store = new RootfsStore({ cacheDir: cache() });
      const first = await store.prepare(native(at('snapshots/1')), options);
      const file = first.writable?.file ?? '';
      const inode = made(file);
      await first.release();
      expect(await store.collectGarbage()).toEqual([]);
      const second = await store.prepare(native(at('snapshots/1')), options);
      expect(made(second.writable?.file ?? '')).toBe(inode);
      rmSync(at('snapshots/1'), { recursive: true });
      expect(await store.collectGarbage()).toEqual([]);
      await second.release();
      expect(await store.collectGarbage()).toEqual([file]);
      expect(layersIn(cache())).toEqual([]);
    });

    test("stays when the snapshotter's whole folder is not there, which may just not be mounted yet", async () => {
      const store = new RootfsStore({ cacheDir: cache() });
      const rootfs = await store.prepare(native(at('snapshots/1')), options);
      await rootfs.release();
      renameSync(at('snapshots'), at('elsewhere'));
      expect(await store.collectGarbage()).toEqual([]);
      renameSync(at('elsewhere'), at('snapshots'));
      await using again = await store.prepare(native(at('snapshots/1')), options);
      expect(again.writable?.file).toBe(rootfs.writable?.file);
    });

    test('is refused while a running sandbox uses it, by whatever path, and free again afterwards', async () => {
      const store = new RootfsStore({ cacheDir: cache() });
      const first = await store.prepare(container('10'), options);
      symlinkSync(at('snapshots'), at('alias'));
      const { lower } = container('10');
      const alias: RootfsPlan = {
        lower,
        writable: { kind: 'in-directory', directory: at('alias/10/work') },
        upper: null,
      };
      await expect(store.prepare(container('10'), options)).rejects.toMatchObject(busy);
      await expect(store.prepare(alias, options)).rejects.toMatchObject(busy);
      await first.release();
      const second = await store.prepare(alias, options);
      // A second release must not free what is somebody else's by now.
      await first.release();
      await expect(store.prepare(container('10'), options)).rejects.toMatchObject(busy);
      await second.release();
    });

    test('does not disturb the host when it mounts the same snapshot, nor is it disturbed', async () => {
      const small = { signal: never, writableSizeBytes: 64 * 1024 * 1024 };
      await using rootfs = await new RootfsStore({ cacheDir: cache() }).prepare(container('10'), small);
      const file = rootfs.writable?.file ?? '';
      const before = await sh(at(), `sha256sum '${file}'`);
      const script = 'mkdir mnt; mount -t overlay -o lowerdir=2/fs:1/fs,upperdir=10/fs,workdir=10/work overlay mnt';
      const use = 'echo x >mnt/written; rm mnt/from-1; ls mnt';
      const { stdout } = await mustRun(
        'unshare',
        ['--mount', '--propagation', 'private', '--', 'sh', '-euc', `${script}; ${use}`],
        {
          cwd: at('snapshots'),
        },
      );
      expect(stdout.toString()).toBe('from-2\nwritten\n');
      expect(await sh(at(), `sha256sum '${file}'`)).toBe(before);
    });

    test.each([
      ['a symbolic link', (file: string) => symlinkSync('/etc/passwd', file), 'a symbolic link'],
      ['a dangling symbolic link', (file: string) => symlinkSync('/nonexistent/target', file), 'a symbolic link'],
      ['a directory', (file: string) => mkdirSync(file), 'not a regular file'],
      ['a FIFO', async (file: string) => void (await mustRun('mkfifo', [file])), 'not a regular file'],
      ['an empty file', (file: string) => writeFileSync(file, ''), 'not an ext4 filesystem'],
      ['a file of another kind', (file: string) => writeFileSync(file, 'x'.repeat(8192)), 'not an ext4 filesystem'],
    ])('is not made over %s of its name', async (_, make, words) => {
      const plan = container('10');
      await make(at('snapshots/10/work/kiln-rw.ext4'));
      const store = new RootfsStore({ cacheDir: cache() });
      const prepare = store.prepare(plan, options);
      await expect(prepare).rejects.toMatchObject({
        code: 'failed-precondition',
        message: expect.stringContaining(words),
      });
      expect(existsSync('/nonexistent/target')).toBe(false);
    });

    test('that was half made when kilnd was killed is removed and not taken for a layer', async () => {
      const plan = container('10');
      const part = at('snapshots/10/work/kiln-rw.ext4.99999999-1-1.part');
      writeFileSync(part, 'half');
      await using rootfs = await new RootfsStore({ cacheDir: cache() }).prepare(plan, options);
      expect(existsSync(part)).toBe(false);
      await mustRun('e2fsck', ['-fn', rootfs.writable?.file ?? '']);
    });

    test('of a size that no filesystem fits into is refused', async () => {
      const store = new RootfsStore({ cacheDir: cache() });
      const prepare = store.prepare(container('10'), { signal: never, writableSizeBytes: 1024 * 1024 });
      await expect(prepare).rejects.toMatchObject({ code: 'invalid-argument' });
      await using rootfs = await store.prepare(container('10'), { signal: never, writableSizeBytes: 64 * 1024 * 1024 });
      expect(statSync(rootfs.writable?.file ?? '').size).toBe(64 * 1024 * 1024);
    });
  });
});
