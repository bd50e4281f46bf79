/** What a failure says, and what it leaves behind: nothing. */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import {
  chmodSync,
  createReadStream,
  existsSync,
  mkdirSync,
  renameSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs';
import { open } from 'node:fs/promises';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { RootfsStore } from '../../../src/rootfs/index.ts';
import { uniqueSuffix } from '../../../src/rootfs/owner.ts';
import { mustRun } from '../../support/spawn.ts';
import { at, cache, container, inOtherProcess, native, options, paths, useSnapshots, view } from './snapshots.ts';
import { imagesIn, isRoot, mountsIn, sh, stubMkfs } from './workspace.ts';

describe.skipIf(!isRoot)('RootfsStore', () => {
  useSnapshots();

  describe('a failure', () => {
    const nothingLeft = () => {
      expect(imagesIn(cache())).toEqual([]);
    };

    test('of mkfs.erofs names image, directories and its last words, and leaves nothing', async () => {
      const program = stubMkfs(at(), 'echo junk >image; echo "<E> erofs: bad luck" >&2; exit 1');
      const store = new RootfsStore({ cacheDir: cache(), mkfsErofs: program });
      const error = await store.prepare(container('10'), options).catch((reason: unknown) => reason);
      expect(error).toMatchObject({ code: 'internal' });
      const { message } = error as Error;
      for (const part of [join(cache(), 'layers'), at('snapshots/2/fs'), at('snapshots/1/fs'), 'bad luck']) {
        expect(message).toContain(part);
      }
      nothingLeft();
    });

    test('that mkfs.erofs reports with exit code 0 is a failure all the same', async () => {
      const program = stubMkfs(at(), 'echo "<E> erofs_io: Failed to write" >&2; exec mkfs.erofs "$@"');
      const store = new RootfsStore({ cacheDir: cache(), mkfsErofs: program });
      await expect(store.prepare(view(), options)).rejects.toMatchObject({ code: 'internal' });
      nothingLeft();
    });

    test('releases the writable layer, so that the next try works', async () => {
      const program = stubMkfs(at(), `[ -e ${at('ok')} ] || exit 1; exec mkfs.erofs "$@"`);
      const store = new RootfsStore({ cacheDir: cache(), mkfsErofs: program });
      await expect(store.prepare(container('10'), options)).rejects.toMatchObject({ code: 'internal' });
      writeFileSync(at('ok'), '');
      await using rootfs = await store.prepare(container('10'), options);
      expect(existsSync(rootfs.lower.file)).toBe(true);
    });

    test('because the disk is full says so and leaves nothing', async () => {
      mkdirSync(cache());
      await sh(at(), 'mount -t tmpfs -o size=1m tmpfs cache; head -c 3M /dev/urandom >snapshots/1/fs/big');
      try {
        const store = new RootfsStore({ cacheDir: cache() });
        const error = await store.prepare(view(), options).catch((reason: unknown) => reason);
        expect(error).toMatchObject({
          code: 'resource-exhausted',
          message: expect.stringContaining(at('snapshots/1/fs')),
        });
        nothingLeft();
      } finally {
        await sh(at(), 'umount cache');
      }
    });

    test('because a program is not installed says which package to install', async () => {
      const store = new RootfsStore({ cacheDir: cache(), mkfsErofs: '/nonexistent/mkfs.erofs' });
      const expected = { code: 'failed-precondition', message: expect.stringContaining('/nonexistent/mkfs.erofs') };
      await expect(store.prepare(view(), options)).rejects.toMatchObject(expected);
      await expect(store.prepare(view(), options)).rejects.toMatchObject({
        hint: expect.stringContaining('erofs-utils'),
      });
      nothingLeft();
    });

    test.each([
      ['is missing', () => rmSync(at('snapshots/2'), { recursive: true }), 'not-found', 'does not exist'],
      [
        'is a symbolic link',
        () => {
          renameSync(at('snapshots/2/fs'), at('moved'));
          symlinkSync(at('moved'), at('snapshots/2/fs'));
        },
        'invalid-argument',
        'is a symbolic link',
      ],
      [
        'is a file',
        () => {
          rmSync(at('snapshots/2/fs'), { recursive: true });
          writeFileSync(at('snapshots/2/fs'), '');
        },
        'invalid-argument',
        'is not a directory',
      ],
    ])('because a layer %s names the layer', async (_, spoil, code, words) => {
      spoil();
      const prepare = new RootfsStore({ cacheDir: cache() }).prepare(view(), options);
      await expect(prepare).rejects.toMatchObject({ code, message: expect.stringContaining(words) });
      await expect(prepare).rejects.toThrow(at('snapshots/2/fs'));
      nothingLeft();
    });

    test('because somebody mounted into the directory names the mount point', async () => {
      mkdirSync(at('snapshots/1/fs/proc'));
      await sh(at(), 'mount -t tmpfs tmpfs snapshots/1/fs/proc');
      try {
        const prepare = new RootfsStore({ cacheDir: cache() }).prepare(native(at('snapshots/1')), options);
        const message = expect.stringContaining(at('snapshots/1/fs/proc'));
        await expect(prepare).rejects.toMatchObject({ code: 'unimplemented', message });
      } finally {
        await sh(at(), 'umount snapshots/1/fs/proc');
      }
    });

    test('because Kiln may not read the layers says so', async () => {
      // Root reads everything: the store runs as another user here, in a process of its own.
      chmodSync(at(), 0o755);
      mkdirSync(cache(), { mode: 0o777 });
      chmodSync(cache(), 0o777);
      chmodSync(at('snapshots/2'), 0o700);
      const program = inOtherProcess(`
        await store.prepare(${JSON.stringify(view())}, options).then(
          () => console.log('prepared'), (error) => console.log(error.code, error.message))`);
      const { stdout } = await mustRun('setpriv', ['--reuid=65534', '--regid=65534', '--clear-groups', ...program]);
      expect(stdout.toString()).toContain(`permission-denied cannot read the image layer ${at('snapshots/2/fs')}`);
    });
  });

  describe('an interrupted conversion', () => {
    /** A mkfs.erofs that writes its process id to a FIFO, which it holds open, and then does nothing, for ever. */
    async function stuckMkfs() {
      await mustRun('mkfifo', [at('started')]);
      const program = stubMkfs(at(), `echo junk >image; exec >${at('started')}; echo $$; exec sleep 1000`);
      const started = async () => {
        const fifo = createReadStream(at('started'));
        const ended = once(fifo, 'end');
        const [pid] = (await once(fifo, 'data')) as [Buffer];
        return { pid: Number(pid.toString()), ended };
      };
      return { program, started };
    }

    test('by abort ends mkfs.erofs and leaves no file when it rejects', async () => {
      const { program, started } = await stuckMkfs();
      const store = new RootfsStore({ cacheDir: cache(), mkfsErofs: program });
      const controller = new AbortController();
      const prepare = store.prepare(view(), { ...options, signal: controller.signal });
      const outcome = prepare.catch((error: unknown) => error);
      const { ended } = await started();
      controller.abort(new Error('the container was deleted'));
      expect(await outcome).toMatchObject({ message: 'the container was deleted' });
      expect(imagesIn(cache())).toEqual([]);
      await ended;
    });

    test('by the end of kilnd leaves no mount, and the next kilnd removes the files', async () => {
      const { program, started } = await stuckMkfs();
      const script = `await store.prepare(${JSON.stringify(view())}, options)`;
      const [node = '', ...args] = inOtherProcess(script, program);
      const kilnd = spawn(node, args, { stdio: 'ignore' });
      const { pid, ended } = await started();
      try {
        // Another kilnd that starts meanwhile must not take the files away.
        const other = new RootfsStore({ cacheDir: cache() });
        expect(imagesIn(cache())).toHaveLength(1);
        kilnd.kill('SIGKILL');
        await once(kilnd, 'exit');
        expect(mountsIn(at())).toEqual([]);
        await other.collectGarbage();
        expect(imagesIn(cache())).toEqual([]);
        await using rootfs = await other.prepare(view(), options);
        expect(await paths(rootfs.lower.file)).toEqual(['', '/from-1', '/from-2']);
      } finally {
        process.kill(pid, 'SIGKILL');
        await ended;
      }
    });
  });

  describe('collectGarbage', () => {
    test('keeps what is in use and what still has its sources', async () => {
      const store = new RootfsStore({ cacheDir: cache() });
      const used = await store.prepare(view(), options);
      expect(await store.collectGarbage()).toEqual([]);
      rmSync(at('snapshots/1'), { recursive: true });
      expect(await store.collectGarbage()).toEqual([]);
      await used.release();
      expect(await store.collectGarbage()).toEqual([used.lower.file]);
      expect(imagesIn(cache())).toEqual([]);
    });

    test('removes an image that a kilnd left behind which made it for one container and was killed', async () => {
      const script = `await store.prepare(${JSON.stringify(native(at('snapshots/1')))}, options); process.kill(process.pid, 'SIGKILL')`;
      const [node = '', ...args] = inOtherProcess(script);
      await once(spawn(node, args, { stdio: 'ignore' }), 'exit');
      expect(imagesIn(cache())).toHaveLength(2);
      await new RootfsStore({ cacheDir: cache() }).collectGarbage();
      expect(imagesIn(cache())).toEqual([]);
    });

    test('leaves the scratch files alone that this process is writing, and other names too', async () => {
      const store = new RootfsStore({ cacheDir: cache() });
      const scratch = join(cache(), 'layers', `tmp-${uniqueSuffix()}`);
      mkdirSync(scratch);
      writeFileSync(join(cache(), 'layers', 'README'), '');
      await store.collectGarbage();
      expect(imagesIn(cache())).toEqual(['README', scratch.split('/').at(-1)]);
    });

    test('does not follow links out of a scratch folder that a crash left', async () => {
      const scratch = join(cache(), 'layers', 'tmp-99999999-1-1');
      mkdirSync(scratch, { recursive: true });
      symlinkSync(at('snapshots/1/fs'), join(scratch, '0'));
      new RootfsStore({ cacheDir: cache() });
      expect(existsSync(scratch)).toBe(false);
      await using file = await open(at('snapshots/1/fs/from-1'));
      expect((await file.readFile('utf8')).toString()).toBe('one');
    });
  });
});
