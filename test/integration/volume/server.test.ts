import { execFileSync } from 'node:child_process';
import {
  constants,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs';
import { createServer, Socket } from 'node:net';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterEach, describe, expect, test } from 'vitest';
import { killProcessesOf } from '../../../src/host/stale.ts';
import { mkfifo } from '../../../src/sys/fifo.ts';
import { VolumeServer } from '../../../src/volume/server.ts';
import { lockStatus, lockType, NinePClient } from '../../support/ninep.ts';
import { projectRoot } from '../../support/paths.ts';
import { socketPair } from '../../support/socket-pair.ts';
import { mountTmpfs } from '../../support/tmpfs.ts';
import { errno, fails } from './errno.ts';
import { program, type Share, useShares, volume } from './share.ts';

const { O_RDONLY, O_RDWR } = constants;

const isRunning = (pid: number | undefined) => {
  try {
    return !/^State:\s+[ZX]/m.test(readFileSync(`/proc/${pid}/status`, 'utf8'));
  } catch {
    return false;
  }
};

const names = async (client: NinePClient, folder: string) => {
  const fid = await client.open(folder, O_RDONLY);
  const entries = await client.readdir(fid);
  await client.clunk(fid);
  return entries.map(({ name }) => name).filter((name) => name !== '.' && name !== '..');
};

describe('the file server', () => {
  const share = useShares();
  let stack = new AsyncDisposableStack();
  afterEach(async () => {
    await stack.disposeAsync();
    stack = new AsyncDisposableStack();
  });

  /** A folder that goes after the test, and after the shares' servers. */
  function temporaryFolder(): string {
    const folder = mkdtempSync(path.join(tmpdir(), 'kiln-v'));
    stack.defer(() => rmSync(folder, { recursive: true, force: true }));
    return folder;
  }

  const procText = ({ server }: Share, file: string) => readFileSync(`/proc/${server.pid}/${file}`, 'utf8');
  const status = (made: Share, field: string) =>
    new RegExp(`^${field}:[ \\t]*(.*?)[ \\t]*$`, 'm').exec(procText(made, 'status'))?.[1];

  test('changes no mount of the host', async () => {
    const before = readFileSync('/proc/self/mountinfo', 'utf8');
    const { server } = await share(() => [{ source: '/', recursive: true, follows: true }]);
    await server.add([volume({ source: '/usr', readOnly: 'tree' })]);
    expect(readFileSync('/proc/self/mountinfo', 'utf8')).toBe(before);
  });

  test('sees the volumes, in namespaces of its own, and has the host’s files nowhere', async () => {
    const made = await share(() => [{ source: '/usr/bin' }]);
    for (const namespace of ['mnt', 'net', 'ipc', 'uts']) {
      const file = `ns/${namespace}`;
      expect(readlinkSync(`/proc/${made.server.pid}/${file}`)).not.toBe(readlinkSync(`/proc/self/${file}`));
    }
    expect(readdirSync(`/proc/${made.server.pid}/root`).sort()).toEqual(['0', '1']);
    const mountPoints = procText(made, 'mountinfo')
      .trim()
      .split('\n')
      .map((line) => line.split(' ')[4]);
    expect(mountPoints.sort()).toEqual(['/', '/0', '/1']);
    expect(() => writeFileSync(`/proc/${made.server.pid}/root/new`, '')).toThrow('EROFS');
    const open = readdirSync(`/proc/${made.server.pid}/fd`).map((fd) =>
      readlinkSync(`/proc/${made.server.pid}/fd/${fd}`),
    );
    const others = open.filter((file) => !/^(\/dev\/null|\/|socket:.*|.*\/volumes\.log)$/.test(file));
    expect(others).toEqual([]);
  });

  test('has no privilege that it does not need, and cannot get one', async () => {
    const made = await share();
    // CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, FSETID, SETGID, SETUID: linux/capability.h.
    expect(status(made, 'CapPrm')).toBe('00000000000000df');
    for (const set of ['CapInh', 'CapBnd', 'CapAmb']) expect(Number(`0x${status(made, set)}`)).toBe(0);
    expect(status(made, 'NoNewPrivs')).toBe('1');
    expect(status(made, 'Seccomp')).toBe('2');
    expect(status(made, 'Groups')).toBe('');
    for (const thread of readdirSync(`/proc/${made.server.pid}/task`)) {
      expect(procText(made, `task/${thread}/status`)).toMatch(/^Seccomp:\s+2$/m);
    }
  });

  test('could not signal other processes, or start one, if a guest had taken it over', () => {
    const folder = mkdtempSync(path.join(tmpdir(), 'kiln-v'));
    try {
      const tried = path.join(folder, 'confined');
      const sources = ['test/support/confined.c', 'native/volumes-confine.c'].map((file) =>
        path.join(projectRoot, file),
      );
      execFileSync('gcc', ['-O2', '-static', '-Wall', '-Wextra', '-Werror', '-o', tried, ...sources]);
      expect(execFileSync(tried, { encoding: 'utf8' }).trim().split('\n')).toEqual([
        'signal itself: done',
        'signal another: ENOSYS',
        'kill another: ENOSYS',
        'have another signalled: ENOSYS',
        'choose the signal: ENOSYS',
        'take a lease: ENOSYS',
        'duplicate a descriptor: done',
        'start a process: ENOSYS',
      ]);
    } finally {
      rmSync(folder, { recursive: true });
    }
  });

  test('takes volumes in and gives them up while it runs, and uses no number twice', async () => {
    const { client, server, folder } = await share();
    for (const name of ['a', 'b', 'c']) {
      mkdirSync(path.join(folder, name));
      writeFileSync(path.join(folder, name, name), name);
    }
    const source = (name: string) => volume({ source: path.join(folder, name) });
    expect(await server.add([source('a'), source('b')])).toEqual([1, 2]);
    expect(await names(client, '2')).toEqual(['b']);
    const open = await client.open('1/a', O_RDWR);
    await server.remove([1, 77]);
    expect((await names(client, '')).sort()).toEqual(['0', '2']);
    await fails(client.walk('1'), errno.ENOENT);
    await client.write(open, 0, 'still');
    expect(readFileSync(path.join(folder, 'a', 'a'), 'utf8')).toBe('still');
    expect(await Promise.all([server.add([source('a')]), server.add([source('c')])])).toEqual([[3], [4]]);
    expect(await names(client, '4')).toEqual(['c']);
  });

  test('takes all of the volumes that it is told of at once, or none', async () => {
    const { client, server, folder } = await share();
    const missing = path.join(folder, 'missing');
    await expect(server.add([volume({ source: '/usr' }), volume({ source: missing })])).rejects.toMatchObject({
      code: 'failed-precondition',
      message: `cannot change the sandbox's volumes: cannot open the source ${missing}: No such file or directory`,
    });
    expect(await names(client, '')).toEqual(['0']);
    expect(await server.add([volume({ source: '/usr' })])).toEqual([3]);
    expect((await names(client, '')).sort()).toEqual(['0', '3']);
  });

  test.each([
    ['a FIFO', (file: string) => mkfifo(file, 0o600)],
    ['a device', (file: string) => void execFileSync('mknod', [file, 'c', '1', '3'])],
    ['a socket', (file: string) => void stack.use(createServer().listen(file))],
  ])('refuses %s as a volume', async (_, make) => {
    const { server, folder } = await share();
    const source = path.join(folder, 'special');
    make(source);
    await expect(server.add([volume({ source })])).rejects.toThrow(
      `neither a directory nor a regular file is ${source}: Operation not supported`,
    );
  });

  test('does not start without a source, leaves nothing then, and says why', async () => {
    const directory = temporaryFolder();
    const server = await VolumeServer.start({ program, directory });
    await server.add([volume({ source: path.join(directory, 'missing') })]);
    const [ours, theirs] = socketPair();
    const client = new NinePClient(new Socket({ fd: ours }));
    await expect(server.serve(theirs)).rejects.toThrow(
      /^cannot start the file server: cannot open the source .*missing/,
    );
    await client.closed;
    expect(server.pid).toBeUndefined();
    expect(await killProcessesOf(directory)).toEqual([]);
    // Without the volume that was in the way, it starts.
    await server.remove([0]);
    expect(await server.add([volume({ source: '/usr' })])).toEqual([1]);
    const [again, theirsAgain] = socketPair();
    await server.serve(theirsAgain);
    using second = await NinePClient.open(new Socket({ fd: again }));
    expect(await names(second, '')).toEqual(['1']);
    await server[Symbol.asyncDispose]();
  });

  test('tells what to do where its program is not there', async () => {
    const directory = temporaryFolder();
    const server = await VolumeServer.start({ program: path.join(directory, 'none'), directory });
    const [ours, theirs] = socketPair();
    const client = new NinePClient(new Socket({ fd: ours }));
    await expect(server.serve(theirs)).rejects.toMatchObject({
      code: 'failed-precondition',
      hint: 'run `npm run build`',
    });
    await client.closed;
  });

  test('serves one connection', async () => {
    const { server } = await share();
    const [ours, theirs] = socketPair();
    const second = new NinePClient(new Socket({ fd: ours }));
    await expect(server.serve(theirs)).rejects.toMatchObject({ code: 'failed-precondition' });
    await second.closed;
  });

  test('ends with the connection', async () => {
    const { client, server } = await share();
    client[Symbol.dispose]();
    expect(await server.ended).toBe('(exit code 0)');
    expect(isRunning(server.pid)).toBe(false);
    await expect(server.add([volume({ source: '/usr' })])).rejects.toMatchObject({ code: 'unavailable' });
    await server.remove([0]);
  });

  test('closes the connection when it is killed, so that the guest gets errors and does not hang', async () => {
    const { client, server } = await share();
    process.kill(server.pid!, 'SIGKILL');
    await client.closed;
    await expect(client.getattr(0)).rejects.toThrow();
    expect(await server.ended).toBe('(SIGKILL)');
  });

  test('is taken over by a later kilnd, with volumes that the earlier one did not write down', async () => {
    const { client, server, directory } = await share();
    const record = JSON.parse(JSON.stringify(server.record()));
    await server.add([volume({ source: '/usr' })]);
    const later = await VolumeServer.adopt(record, { program, directory });
    expect(later.pid).toBe(server.pid);
    expect(await later.add([volume({ source: '/usr/bin' })])).toEqual([2]);
    expect(await names(client, '2')).toContain('env');
    expect(later.record()).toEqual(record);
    await later[Symbol.asyncDispose]();
    await client.closed;
    await expect(VolumeServer.adopt(record, { program, directory })).rejects.toMatchObject({ code: 'not-found' });
    await expect(VolumeServer.adopt({}, { program, directory })).rejects.toMatchObject({ code: 'not-found' });
  });

  test('is found by who clears away what a sandbox has left', async () => {
    const { client, server, directory } = await share();
    // Also after it has worked for another user, when the kernel thinks its memory secret.
    const other = client.newFid();
    await client.attach(other, { uid: 1000 });
    await client.create('0/file', { from: other });
    expect(await killProcessesOf(directory)).toEqual([server.pid]);
    await client.closed;
  });

  test('shows what the host mounts later where it is to follow, also in a read-only volume, and nowhere else', async () => {
    const folder = temporaryFolder();
    stack.use(mountTmpfs(path.join(folder, 'shared'), 'size=1m'));
    const source = path.join(folder, 'shared');
    mkdirSync(path.join(source, 'later'));
    const { client } = await share(() => [
      { source, recursive: true, follows: true },
      { source, recursive: true },
      { source, recursive: true, follows: true, readOnly: 'mount' },
    ]);
    execFileSync('mount', ['-t', 'tmpfs', 'kiln-test', path.join(source, 'later')]);
    writeFileSync(path.join(source, 'later', 'file'), '');
    expect(await names(client, '1/later')).toEqual(['file']);
    expect(await names(client, '2/later')).toEqual([]);
    expect(await names(client, '3/later')).toEqual(['file']);
    await client.clunk(await client.create('1/later/by-guest'));
    // As on the host, a mount says for itself whether it is read-only.
    await client.clunk(await client.create('3/later/too'));
    await fails(client.create('3/by-guest'), errno.EROFS);
    // While the guest has a file of it open, the host's umount(8) says that it is busy, as with any container.
    await client.version(65536);
    await client.attach(0);
    execFileSync('umount', [path.join(source, 'later')]);
    expect(await names(client, '1/later')).toEqual([]);
  });

  test('lets write to what is mounted in a volume, unless that is read-only itself, or the volume with all below', async () => {
    const folder = temporaryFolder();
    const source = path.join(folder, 'ro');
    mkdirSync(path.join(source, 'inner'), { recursive: true });
    mkdirSync(path.join(source, 'inner-ro'));
    stack.use(mountTmpfs(path.join(source, 'inner'), 'size=1m'));
    stack.use(mountTmpfs(path.join(source, 'inner-ro'), 'ro,size=1m'));
    const { client } = await share(() => [
      { source, recursive: true, readOnly: 'mount' },
      { source, recursive: true, readOnly: 'tree' },
    ]);
    await client.clunk(await client.create('1/inner/new'));
    await client.mkdir('1/inner/deep');
    await client.clunk(await client.create('1/inner/deep/new'));
    await fails(client.create('1/new'), errno.EROFS);
    await fails(client.create('1/inner-ro/new'), errno.EROFS);
    await fails(client.create('2/inner/other'), errno.EROFS);
    await fails(client.mkdir('2/inner/deep/other'), errno.EROFS);
    await fails(client.setattr(await client.walk('2/inner/new'), 1, { mode: 0o777 }), errno.EROFS);
  });

  test('hands no mount back to the host', async () => {
    const folder = temporaryFolder();
    stack.use(mountTmpfs(path.join(folder, 'shared'), 'size=1m'));
    const source = path.join(folder, 'shared');
    mkdirSync(path.join(source, 'inner'));
    const { server } = await share(() => [{ source, recursive: true, follows: true }]);
    const enter = ['--target', String(server.pid), '--mount', '--no-fork'];
    // By somebody with more rights than the server has, and with the host's programs.
    const own = `/proc/${server.pid}/root/1/inner`;
    expect(statSync(own).isDirectory()).toBe(true);
    expect(() => execFileSync('nsenter', [...enter, 'true'], { stdio: 'pipe' })).toThrow(); // There is no program.
    expect(readFileSync(`/proc/${server.pid}/mountinfo`, 'utf8')).not.toContain('shared:');
  });

  test('gives the errors of a file system that is full, and goes on when there is room', async () => {
    const folder = temporaryFolder();
    stack.use(mountTmpfs(path.join(folder, 'small'), 'size=64k'));
    const { client } = await share(() => [{ source: path.join(folder, 'small') }]);
    const fid = await client.create('1/file');
    expect(await client.write(fid, 0, Buffer.alloc(60_000))).toBe(60_000);
    expect(await client.write(fid, 60_000, Buffer.alloc(60_000))).toBe(5536);
    await fails(client.write(fid, 65_536, Buffer.alloc(60_000)), errno.ENOSPC);
    await client.setattr(fid, 8, { size: 0 });
    expect(await client.write(fid, 0, Buffer.alloc(60_000))).toBe(60_000);
  });

  test('gives the errors of a file system that becomes read-only, and keeps one that is unmounted', async () => {
    const folder = temporaryFolder();
    const source = path.join(folder, 'disk');
    const disk = mountTmpfs(source, 'size=1m');
    writeFileSync(path.join(source, 'file'), 'text');
    const { client } = await share(() => [{ source }]);
    execFileSync('mount', ['-o', 'remount,ro', source]);
    await fails(client.create('1/new'), errno.EROFS);
    await client.open('1/file', O_RDONLY);
    execFileSync('mount', ['-o', 'remount,rw', source]);
    disk[Symbol.dispose]();
    expect(readdirSync(source)).toEqual([]);
    await client.create('1/new');
    expect((await names(client, '1')).sort()).toEqual(['file', 'new']);
  });

  test('gives ENOENT for what is made in a source that was removed', async () => {
    const { client, source } = await share();
    writeFileSync(path.join(source, 'file'), 'text');
    const fid = await client.open('0/file', O_RDONLY);
    rmSync(source, { recursive: true });
    expect((await client.read(fid, 0, 10)).toString()).toBe('text');
    await fails(client.create('0/new'), errno.ENOENT);
    await fails(client.walk('0/file'), errno.ENOENT);
    await fails(names(client, '0'), errno.ENOENT);
  });

  test('keeps the locks of two guests apart that share a folder, and shows each what the other writes', async () => {
    const first = await share();
    const second = await share(() => [{ source: first.source }]);
    const [ours, theirs] = [await first.client.create('0/file'), await second.client.open('1/file', O_RDWR)];
    await first.client.write(ours, 0, 'from the first');
    expect((await second.client.read(theirs, 0, 100)).toString()).toBe('from the first');
    expect(await first.client.lock(ours, lockType.write)).toBe(lockStatus.success);
    expect(await second.client.lock(theirs, lockType.write)).toBe(lockStatus.blocked);
    const waiting = second.client.lock(theirs, lockType.write, { wait: true });
    first.client[Symbol.dispose]();
    expect(await waiting).toBe(lockStatus.success);
  });

  test('does with little memory, and gives back what it needed for many requests at once', async () => {
    const made = await share(() => [], { msize: 1 << 20 });
    // Of its own: the program's text is shared by all servers.
    const dirtyKib = () => Number(/^Private_Dirty:\s+(\d+) kB/m.exec(procText(made, 'smaps_rollup'))?.[1]);
    expect(dirtyKib()).toBeLessThan(150);
    const fid = await made.client.create('0/file');
    await Promise.all(Array.from({ length: 40 }, (_, i) => made.client.write(fid, i << 19, Buffer.alloc(1 << 19))));
    await Promise.all(Array.from({ length: 40 }, (_, i) => made.client.read(fid, i << 19, 1 << 19)));
    // One that reads, those that wait for their turn, and the main thread.
    await expect.poll(() => readdirSync(`/proc/${made.server.pid}/task`).length).toBeLessThanOrEqual(5);
    expect(dirtyKib()).toBeLessThan(9000);
  });
});
