import { execFileSync } from 'node:child_process';
import { createHash, randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import type { Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { buffer, text } from 'node:stream/consumers';
import { describe, expect, it, vi } from 'vitest';
import { NetworkNamespace } from '../../src/sys/netns.ts';
import { dialIn } from '../support/dial.ts';
import { busyboxLayer, type Image } from '../support/images.ts';
import { projectRoot, underKiln } from '../support/paths.ts';
import { run } from '../support/spawn.ts';
import { useScene } from '../support/use-scene.ts';
import { helpersOf } from '../support/victims.ts';
import { signal, waitForEnd } from '../support/wait-for-end.ts';

/** busybox, and /serve: see tcp-server.c. */
const serverImage: Image = {
  name: 'docker.io/kiln/server:test',
  get layers() {
    const folder = mkdtempSync(join(tmpdir(), 'kt-server-'));
    try {
      const program = join(folder, 'serve');
      const source = join(projectRoot, 'test', 'support', 'tcp-server.c');
      execFileSync('gcc', ['-O2', '-s', '-static', '-Wall', '-Wextra', '-Werror', '-o', program, source]);
      return [busyboxLayer(), [{ kind: 'file', path: 'serve', mode: 0o755, content: readFileSync(program) }] as const];
    } finally {
      rmSync(folder, { recursive: true });
    }
  },
};

type Host = Parameters<typeof dialIn>[1];

const sha256 = (data: Buffer): string => createHash('sha256').update(data).digest('hex');

/** How a test container's servers are spread over addresses and ports. */
const servers = [
  'serve 127.0.0.1 7 cat',
  'serve ::1 8 cat',
  'serve 0.0.0.0 9 sha256sum',
  'serve any 10 cat',
  'serve 127.0.0.2 11 cat',
];
const script = `${servers.map((line) => `/${line} &`).join(' ')} sleep 100000`;

// The channels differ in who carries the bytes, and everything else is the same.
describe.each(underKiln ? ['auto', 'virtio-serial'] : ['auto'])(
  'localhost of a container’s network namespace, by the channel %s',
  (channel) => {
    const scene = useScene({ version: '2.1', images: [serverImage], config: `[vm]\nchannel = "${channel}"\n` });

    const start = async (flags: string[] = []) => {
      const id = scene.id('server');
      await scene.start(id, ['sh', '-c', script], { image: serverImage.name, flags });
      return { id, namespace: await namespaceOf(id) };
    };
    const namespaceOf = async (id: string) => {
      const task = (await scene.tasks()).find((each) => each.id === id);
      return `/proc/${task?.pid}/ns/net`;
    };
    /** There is no event for a listener that appears. */
    const dialed = (namespace: string, host: Host, port: number): Promise<Socket> =>
      vi.waitFor(() => dialIn(namespace, host, port), { timeout: 30_000, interval: 20 });
    const refused = (namespace: string, host: Host, port: number): Promise<void> =>
      vi.waitFor(() => expect(() => dialIn(namespace, host, port).destroy()).toThrow('ECONNREFUSED'), {
        timeout: 30_000,
        interval: 20,
      });
    const exec = (id: string, ...command: string[]) =>
      scene.ctr(['task', 'exec', '--fifo-dir', scene.fifoDir, '--exec-id', scene.id('exec'), id, ...command]);
    /** What a connection answers to what is sent, after the end of that. */
    const answer = async (socket: Socket, data: Buffer): Promise<Buffer> => {
      const answered = buffer(socket);
      socket.end(data);
      return answered;
    };

    it('reaches what listens in the container at loopback and at all addresses, and nothing else', async () => {
      const { id, namespace } = await start();
      const hello = Buffer.from('hello\n');
      for (const [host, port] of [
        ['127.0.0.1', 7],
        ['::1', 8],
        ['127.0.0.1', 10],
        ['::1', 10],
      ] as const) {
        expect(await answer(await dialed(namespace, host, port), hello), `${host} ${port}`).toEqual(hello);
      }
      for (const [host, port] of [
        ['::1', 7],
        ['127.0.0.1', 8],
        ['::1', 9],
        ['127.0.0.1', 11],
        ['127.0.0.1', 12],
      ] as const) {
        expect(() => dialIn(namespace, host, port), `${host} ${port}`).toThrow('ECONNREFUSED');
      }

      // Both directions at once, and an end of one that is not the end of the other.
      const data = randomBytes(8 << 20);
      expect(sha256(await answer(dialIn(namespace, '127.0.0.1', 7), data))).toBe(sha256(data));
      const sum = await answer(await dialed(namespace, '127.0.0.1', 9), data);
      expect(sum.toString()).toBe(`${sha256(data)}  -\n`);
      const many = Array.from({ length: 20 }, (_, index) => Buffer.from(`${index}`));
      const answers = many.map((each) => answer(dialIn(namespace, '127.0.0.1', 7), each));
      expect(await Promise.all(answers)).toEqual(many);
      await scene.remove(id);
    });

    it.runIf(channel === 'auto')(
      'has listeners that come and go with the container’s, and connections that stay',
      async () => {
        const { id, namespace } = await start();
        const socket = await dialed(namespace, '127.0.0.1', 7);
        await exec(id, 'sh', '-c', '/serve 127.0.0.1 77 cat >/dev/null 2>&1 &');
        (await dialed(namespace, '127.0.0.1', 77)).destroy();
        await exec(id, 'killall', 'serve');
        for (const port of [7, 10, 77]) await refused(namespace, '127.0.0.1', port);
        for (const port of [8, 10]) await refused(namespace, '::1', port);
        expect(await answer(socket, Buffer.from('still here'))).toEqual(Buffer.from('still here'));
        await exec(id, 'sh', '-c', '/serve 127.0.0.1 7 cat >/dev/null 2>&1 &');
        (await dialed(namespace, '127.0.0.1', 7)).destroy();
        await scene.remove(id);
      },
    );

    it.runIf(channel === 'auto')('passes on that a connection was reset, both ways', async () => {
      const { id, namespace } = await start();
      const socket = await dialed(namespace, '127.0.0.1', 7);
      socket.write('x');
      await once(socket, 'data');
      // The program at the other end is killed with the byte unread that comes next: its kernel resets the connection.
      await exec(id, 'killall', '-STOP', 'cat');
      socket.write('unread');
      const error = new Promise((resolve) => socket.once('error', resolve));
      await exec(id, 'sh', '-c', 'until grep -q 00000006 /proc/net/tcp; do usleep 10000; done; killall -KILL cat');
      expect(await error).toMatchObject({ code: 'ECONNRESET' });

      const other = await dialed(namespace, '127.0.0.1', 7);
      other.write('x');
      await once(other, 'data');
      other.resetAndDestroy();
      await exec(id, 'sh', '-c', 'while pidof cat; do usleep 10000; done');
      await scene.remove(id);
    });

    it.runIf(underKiln)('is there again after kilnd was killed', async () => {
      const { id, namespace } = await start();
      const socket = await dialed(namespace, '127.0.0.1', 7);
      // It is through: one that kilnd has not accepted is reset.
      socket.write('x');
      await once(socket, 'data');
      const ended = once(socket, 'end');
      socket.resume();
      const pids = scene.kilndPids();
      for (const pid of pids) signal(pid, 'SIGKILL');
      for (const pid of pids) await waitForEnd(pid, 20_000);
      await ended;
      socket.destroy();
      const again = await dialed(namespace, '127.0.0.1', 7);
      expect(await answer(again, Buffer.from('again'))).toEqual(Buffer.from('again'));
      await scene.remove(id);
    });

    it.runIf(underKiln && channel === 'auto')(
      'ends with the virtual machine, and leaves nothing in a namespace that stays',
      async () => {
        using namespace = NetworkNamespace.create();
        const path = `/proc/${process.pid}/fd/${namespace.fd}`;
        const sockets = async () => (await run('nsenter', [`--net=${path}`, 'ss', '-tlnH'])).stdout.toString();
        const flags = ['--with-ns', `network:${path}`];
        const { id } = await start(flags);
        await vi.waitFor(async () => expect(await sockets()).toContain('[::1]:8'), { timeout: 30_000, interval: 100 });
        // Whoever made the namespace has left lo down.
        expect(() => dialIn(path, '127.0.0.1', 7)).toThrow();
        for (const pid of await helpersOf(scene, id, 'qemu-system')) signal(pid, 'SIGKILL');
        await vi.waitFor(async () => expect(await sockets()).toBe(''), { timeout: 30_000, interval: 100 });
        await scene.remove(id);
        await run('nsenter', [`--net=${path}`, 'ip', 'link', 'set', 'lo', 'up']);
        const second = await start(flags);
        const socket = await dialed(path, '127.0.0.1', 7);
        expect(await text(socket.end('x'))).toBe('x');
        await scene.remove(second.id);
        expect(await sockets()).toBe('');
        expect(() => dialIn(path, '127.0.0.1', 7)).toThrow('ECONNREFUSED');
      },
    );
  },
);
