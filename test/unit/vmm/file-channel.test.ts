import { once } from 'node:events';
import { closeSync, existsSync, read, readFileSync, writeSync } from 'node:fs';
import net from 'node:net';
import { promisify } from 'node:util';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { listenUnix } from '../../../src/host/unix-socket.ts';
import { hybridFiles, kernelFiles, serialFiles } from '../../../src/vmm/file-channel.ts';
import { randomCid } from '../../../src/vmm/kernel-vsock.ts';
import { hasVsock } from './vsock.ts';
import { Workspace } from './workspace.ts';

/** The host's end of a guest's files, with the guest played by sockets of ours. */
let workspace: Workspace;
let disposal: AsyncDisposableStack;
beforeEach(() => {
  workspace = new Workspace();
  disposal = new AsyncDisposableStack();
  disposal.use(workspace);
});
afterEach(() => disposal.disposeAsync());

const never = new AbortController().signal;
const uds = () => workspace.path('vsock');
const socketPath = () => `${uds()}_9000`;

function dial(path: string): net.Socket {
  const socket = net.connect(path);
  disposal.defer(() => void socket.destroy());
  socket.on('error', () => {});
  return socket;
}

/** open(2)'s flags of a descriptor, octal: proc_pid_fdinfo(5). */
const flagsOf = (fd: number) =>
  Number.parseInt(/flags:\s+0(\d+)/.exec(readFileSync(`/proc/self/fdinfo/${fd}`, 'utf8'))![1]!, 8);
const O_NONBLOCK = 0o4000;
const O_CLOEXEC = 0o2000000;

/** On a thread of the pool, since the descriptor blocks. */
async function readText(fd: number): Promise<string> {
  const { bytesRead, buffer } = await promisify(read)(fd, Buffer.alloc(100), 0, 100, null);
  return buffer.toString('utf8', 0, bytesRead);
}

describe('over hybrid vsock', () => {
  test('the host listens as soon as somebody wants the files, and gives what the guest said untouched', async () => {
    const files = disposal.use(hybridFiles(uds()));
    expect(existsSync(socketPath())).toBe(false);
    const accepting = files.accept(never);
    expect(existsSync(socketPath())).toBe(true);
    const guest = dial(socketPath());
    guest.write('Tversion');
    await once(guest, 'connect');
    const fd = await accepting;
    disposal.defer(() => closeSync(fd));
    expect(flagsOf(fd) & (O_NONBLOCK | O_CLOEXEC)).toBe(O_CLOEXEC);
    expect(await readText(fd)).toBe('Tversion');
    writeSync(fd, 'Rversion');
    expect(String((await once(guest, 'data'))[0])).toBe('Rversion');
    // Nobody else can come by there.
    expect(existsSync(socketPath())).toBe(false);
  });

  test('a guest that asks again gets another connection, whatever an earlier kilnd has left there', async () => {
    workspace.file('vsock_9000');
    const files = disposal.use(hybridFiles(uds()));
    for (const word of ['one', 'two']) {
      const accepting = files.accept(never);
      dial(socketPath()).end(word);
      const fd = await accepting;
      expect(await readText(fd)).toBe(word);
      closeSync(fd);
    }
  });

  test('the VMM is let in', async () => {
    const admitted: string[] = [];
    const files = disposal.use(hybridFiles(uds(), (socket) => admitted.push(socket)));
    const accepting = files.accept(never);
    expect(admitted).toEqual([socketPath()]);
    dial(socketPath());
    closeSync(await accepting);
  });

  test('nobody waits any more when the signal says so, and nothing is left', async () => {
    const files = disposal.use(hybridFiles(uds()));
    const reason = new Error('enough');
    await expect(files.accept(AbortSignal.abort(reason))).rejects.toBe(reason);
    const controller = new AbortController();
    const accepting = files.accept(controller.signal);
    controller.abort(reason);
    await expect(accepting).rejects.toBe(reason);
    expect(existsSync(socketPath())).toBe(false);
  });

  test('a socket that cannot be made is named', async () => {
    const files = hybridFiles(workspace.path('no/where'));
    await expect(files.accept(never)).rejects.toThrow(/cannot listen for the guest's files: .*no\/where_9000/);
    const long = hybridFiles(workspace.path('x'.repeat(100)));
    await expect(long.accept(never)).rejects.toMatchObject({ code: 'failed-precondition' });
  });
});

describe('over virtio-serial', () => {
  test('the VMM’s socket is the host’s end, at once', async () => {
    const server = await listenUnix(workspace.path('files.sock'));
    disposal.defer(() => void server.close());
    const connected = once(server, 'connection') as Promise<[net.Socket]>;
    const fd = await serialFiles(workspace.path('files.sock')).accept(never);
    disposal.defer(() => closeSync(fd));
    expect(flagsOf(fd) & (O_NONBLOCK | O_CLOEXEC)).toBe(O_CLOEXEC);
    const [guest] = await connected;
    guest.write('Tversion');
    expect(await readText(fd)).toBe('Tversion');
    guest.destroy();
  });

  test('a VMM that is gone is unavailable', async () => {
    await expect(serialFiles(workspace.path('files.sock')).accept(never)).rejects.toMatchObject({
      code: 'unavailable',
      message: expect.stringContaining('ENOENT'),
    });
  });
});

describe.skipIf(!hasVsock)('over the kernel’s vsock', () => {
  test('each VM has a port of its own, from before it is asked for its files', async () => {
    const one = disposal.use(kernelFiles(randomCid()));
    const two = disposal.use(kernelFiles(randomCid()));
    expect(one.port).not.toBe(two.port);
    expect(() => kernelFiles(randomCid(), one.port)).toThrow(expect.objectContaining({ code: 'failed-precondition' }));
  });

  test('nobody waits any more when the signal says so', async () => {
    const files = disposal.use(kernelFiles(randomCid()));
    const controller = new AbortController();
    const accepting = files.accept(controller.signal);
    controller.abort(new Error('enough'));
    await expect(accepting).rejects.toThrow('enough');
  });
});
