import { spawnSync } from 'node:child_process';
import { mkdtempSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import net from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { afterAll, beforeAll, describe, expect, it, vi } from 'vitest';
import { KilnError } from '../../../src/errors.ts';
import { abortable } from '../../../src/host/abortable.ts';
import { loggerTo } from '../../../src/observe/logger.ts';
import type { VolumeMount } from '../../../src/oci/binds.ts';
import { checkVolumes, type FileServer, inHostsWords, SandboxVolumes } from '../../../src/sandbox/volumes.ts';

const mount = (source: string): VolumeMount => ({
  ...{ source, destination: '/data', readOnly: 'no', recursive: true, follows: false },
});

describe('a source of a bind mount', () => {
  let directory = '';
  let socket: net.Server;
  const at = (name: string) => join(directory, name);
  const refusal = async (name: string) => {
    const error = await checkVolumes([mount(at(name))]).then(
      () => undefined,
      (thrown: unknown) => thrown,
    );
    if (!(error instanceof KilnError)) throw new Error(`no refusal of ${name}`);
    return `${error.code}: ${error.message}`;
  };

  beforeAll(async () => {
    directory = mkdtempSync(join(tmpdir(), 'kiln-volumes-'));
    writeFileSync(at('file'), 'x');
    symlinkSync('file', at('link'));
    symlinkSync('/proc/self', at('to-proc'));
    symlinkSync('/dev/null', at('to-null'));
    symlinkSync('nowhere', at('dangling'));
    spawnSync('mkfifo', [at('fifo')]);
    socket = net.createServer();
    await new Promise<void>((resolve) => socket.listen(at('socket'), resolve));
  });
  afterAll(() => {
    socket.close();
    rmSync(directory, { recursive: true, force: true });
  });

  it('is taken with the path behind its links', async () => {
    expect(await checkVolumes([mount(at('link')), mount(directory)])).toEqual([
      { source: at('file'), readOnly: 'no', recursive: true, follows: false },
      { source: directory, readOnly: 'no', recursive: true, follows: false },
    ]);
  });

  it.each(['missing', 'missing/below', 'dangling'])(
    "that is not there is refused in runc's words: %s",
    async (name) => {
      expect(await refusal(name)).toBe(
        `not-found: error mounting "${at(name)}" to rootfs at "/data": stat ${at(name)}: no such file or directory`,
      );
    },
  );

  it.each([
    ['socket', 'it is a socket: a program in a virtual machine cannot connect to a socket of the host'],
    ['fifo', 'it is a FIFO: a FIFO ends at the kernel that has it'],
    ['to-null', 'it is a character device: the guest has devices of its own'],
    ['to-proc', `/proc/${process.pid} tells of the processes of the host, not of the guest`],
  ])('that only the kernel of the host can serve is refused: %s', async (name, reason) => {
    expect(await refusal(name)).toContain(reason);
    expect(await refusal(name)).toMatch(/^unimplemented: /);
  });
});

describe('the volumes of a sandbox', () => {
  const log: { level: string; msg: string }[] = [];
  const logger = loggerTo({ write: (line) => void log.push(JSON.parse(line)) }, 'trace');

  function scripted() {
    const served: number[] = [];
    const removed: number[] = [];
    const ended = Promise.withResolvers<string>();
    const server: FileServer = {
      ended: ended.promise,
      add: async (volumes) => volumes.map((_, index) => index),
      remove: async (numbers) => {
        if (numbers.includes(99)) throw new KilnError('failed-precondition', 'cannot unmount /99');
        removed.push(...numbers);
      },
      serve: async (fd) => void served.push(fd),
      record: () => ({ pid: 7 }),
      [Symbol.asyncDispose]: async () => ended.resolve('killed'),
    };
    return { served, removed, ended, servers: { start: async () => server, adopt: async () => server } };
  }

  it('get the channel of the guest once, also when the first try has failed', async () => {
    const { served, servers } = scripted();
    await using volumes = await SandboxVolumes.start(servers, { directory: '/d', logger });
    const { signal } = new AbortController();
    let fails = true;
    const vm = {
      acceptFiles: async () => {
        if (fails) throw new KilnError('unavailable', 'the VM has ended');
        return 12;
      },
    };
    await expect(volumes.connect(vm, signal)).rejects.toThrow('the VM has ended');
    expect(volumes.record()).toEqual({ server: { pid: 7 }, connected: false });
    fails = false;
    await Promise.all([volumes.connect(vm, signal), volumes.connect(vm, signal)]);
    expect(served).toEqual([12]);
    expect(volumes.record()).toEqual({ server: { pid: 7 }, connected: true });
    await using adopted = await SandboxVolumes.adopt(servers, volumes.record(), { directory: '/d', logger });
    await adopted?.connect(vm, signal);
    expect(served).toEqual([12]);
  });

  it('reach the guest for a container that is made beside another one, which is given up', async () => {
    const { served, servers } = scripted();
    await using volumes = await SandboxVolumes.start(servers, { directory: '/d', logger });
    const dialled = Promise.withResolvers<number>();
    const vm = { acceptFiles: (given: AbortSignal) => abortable(dialled.promise, given) };
    const given = new AbortController();
    const first = volumes.connect(vm, given.signal);
    const second = volumes.connect(vm, new AbortController().signal);
    given.abort(new Error('nobody wants it'));
    await expect(first).rejects.toThrow('nobody wants it');
    dialled.resolve(12);
    await second;
    expect(served).toEqual([12]);
  });

  it('of a container that has left go, and what cannot go is told and keeps nothing from ending', async () => {
    log.length = 0;
    const { removed, servers } = scripted();
    await using volumes = await SandboxVolumes.start(servers, { directory: '/d', logger });
    await volumes.remove([1, 2]);
    await volumes.remove([99]);
    expect(removed).toEqual([1, 2]);
    expect(log).toMatchObject([
      { level: 'warn', msg: 'volumes that nobody uses stay until the VM ends', numbers: [99] },
    ]);
  });

  it('tell when their server ends, but not of an end that is wanted', async () => {
    log.length = 0;
    const { ended, servers } = scripted();
    const volumes = await SandboxVolumes.start(servers, { directory: '/d', logger });
    const living = { wait: () => new Promise<never>(() => {}) };
    volumes.belongTo(living);
    ended.resolve('SIGKILL');
    await vi.waitFor(() => expect(log.length).toBe(1), 5000);
    expect(log.map(({ msg }) => msg)).toEqual(['the file server has ended: volumes give I/O errors from now on']);
    await volumes[Symbol.asyncDispose]();
    const other = await SandboxVolumes.start(scripted().servers, { directory: '/d', logger });
    await other[Symbol.asyncDispose]();
    const third = scripted();
    const ofAnother = await SandboxVolumes.start(third.servers, { directory: '/d', logger });
    const exit = { code: 0, signal: null, guestStopped: true, consoleTail: '' };
    ofAnother.belongTo({ wait: async () => exit });
    third.ended.resolve('exit code 0');
    // Longer than the end of a VM may be seen later than that of its server.
    await delay(700);
    expect(log.length).toBe(1);
  });
});

it('names volumes in the errors of a guest as the host knows them', () => {
  const words = (message: string) =>
    (inHostsWords(new KilnError('invalid-argument', message), [mount('/srv/a'), mount('/srv/b')], [4, 12]) as Error)
      .message;
  expect(words('mount `/run/kiln/volumes/12` to `data`: I/O error')).toBe('mount `/srv/b` to `data`: I/O error');
  expect(words('/run/kiln/volumes/4/x and /run/kiln/volumes/1')).toBe('/srv/a/x and /run/kiln/volumes/1');
});
