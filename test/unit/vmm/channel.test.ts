import { once } from 'node:events';
import { existsSync } from 'node:fs';
import net from 'node:net';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { listenUnix } from '../../../src/host/unix-socket.ts';
import { VMADDR_CID_ANY } from '../../../src/sys/vsock.ts';
import { type FirstConnection, firstConnection } from '../../../src/vmm/channel.ts';
import { hostSocketFor, listenHybrid } from '../../../src/vmm/hybrid-vsock.ts';
import { listenKernel, randomCid } from '../../../src/vmm/kernel-vsock.ts';
import { hasVsock } from './vsock.ts';
import { Workspace } from './workspace.ts';

let workspace: Workspace;
let disposal: AsyncDisposableStack;
beforeEach(() => {
  workspace = new Workspace();
  disposal = new AsyncDisposableStack();
  disposal.use(workspace);
});
afterEach(() => disposal.disposeAsync());

const never = new AbortController().signal;

async function dial(path: string): Promise<net.Socket> {
  const socket = net.connect(path);
  disposal.defer(() => void socket.destroy());
  socket.on('error', () => {});
  await once(socket, 'connect');
  return socket;
}

describe('hybrid vsock', () => {
  const uds = () => workspace.path('vsock');

  test('listens where the VMM looks for the port, and hands over the agent’s connection', async () => {
    const listener = disposal.use(await listenHybrid(uds(), 1024));
    expect(listener.port).toBe(1024);
    expect(hostSocketFor(uds(), 1024)).toBe(`${uds()}_1024`);
    const agent = await dial(`${uds()}_1024`);
    agent.write('hello');
    const accepted = await listener.accept(never);
    expect(String((await once(accepted, 'data'))[0])).toBe('hello');
  });

  test('takes the first connection only, and leaves nothing to connect to', async () => {
    const listener = disposal.use(await listenHybrid(uds(), 1024));
    await dial(`${uds()}_1024`);
    await listener.accept(never);
    await expect(dial(`${uds()}_1024`)).rejects.toMatchObject({ code: 'ENOENT' });
  });

  test('rejects with the signal’s reason, before and while it waits', async () => {
    const listener = disposal.use(await listenHybrid(uds(), 1024));
    const reason = new Error('enough');
    await expect(listener.accept(AbortSignal.abort(reason))).rejects.toBe(reason);
    const controller = new AbortController();
    const waiting = listener.accept(controller.signal);
    controller.abort(reason);
    await expect(waiting).rejects.toBe(reason);
  });

  test('when disposed stops waiting, closes the connection and removes its socket', async () => {
    const unused = await listenHybrid(uds(), 1);
    const waiting = expect(unused.accept(never)).rejects.toMatchObject({ code: 'unavailable' });
    await unused[Symbol.asyncDispose]();
    await waiting;
    expect(existsSync(`${uds()}_1`)).toBe(false);

    const used = await listenHybrid(uds(), 2);
    const agent = await dial(`${uds()}_2`);
    await used.accept(never);
    await used[Symbol.asyncDispose]();
    await used[Symbol.asyncDispose]();
    await once(agent.resume(), 'close');
  });

  test('when disposed closes a connection that came and that nobody has asked for', async () => {
    const listener = await listenHybrid(uds(), 1024);
    const agent = await dial(`${uds()}_1024`);
    // Accepted later than the first, which so has been, too.
    const other = disposal.use(await listenHybrid(uds(), 1025));
    await dial(`${uds()}_1025`);
    await other.accept(never);
    await listener[Symbol.asyncDispose]();
    await once(agent.resume(), 'close');
  });
});

describe('a Unix socket', () => {
  test('whose path is too long is refused with the way out', async () => {
    const long = workspace.path('x'.repeat(108 - workspace.folder.length - 1));
    expect(long).toHaveLength(108);
    await expect(listenUnix(long)).rejects.toMatchObject({
      code: 'failed-precondition',
      message: `the socket path ${long} has 108 bytes, the system's limit is 107`,
      hint: 'choose a shorter KILN_STATE_DIR',
    });
    const server = await listenUnix(long.slice(0, 107));
    disposal.defer(() => void server.close());
  });

  test('that exists already, or has no directory, is named', async () => {
    const path = workspace.file('taken');
    await expect(listenUnix(path)).rejects.toThrow(`cannot listen on ${path}: listen EADDRINUSE`);
    await expect(listenUnix(workspace.path('no/where'))).rejects.toThrow(/cannot listen on .*no\/where/);
  });
});

describe('the first connection that is wanted', () => {
  let server: net.Server;
  let connection: FirstConnection;
  const callers: string[] = [];

  beforeEach(async () => {
    callers.length = 0;
    server = await listenUnix(workspace.path('socket'));
  });

  test('is taken, and every other before it is closed', async () => {
    // Stands for the look at the peer's CID.
    const isWanted = () => callers.push('caller') === 3;
    connection = disposal.use(firstConnection(server, 'the agent', isWanted));
    const strangers = [await dial(workspace.path('socket')), await dial(workspace.path('socket'))];
    for (const stranger of strangers) await once(stranger.resume(), 'close');
    const agent = await dial(workspace.path('socket'));
    const accepted = await connection.accept(never);
    accepted.write('welcome');
    expect(String((await once(agent, 'data'))[0])).toBe('welcome');
    expect(server.listening).toBe(false);
  });

  test('that cannot be accepted is an error of the one who waits, and not of the process', async () => {
    connection = disposal.use(firstConnection(server, 'the agent'));
    server.emit('error', new Error('accept EMFILE'));
    await expect(connection.accept(never)).rejects.toMatchObject({
      code: 'internal',
      message: 'cannot accept the connection of the agent: accept EMFILE',
    });
  });
});

describe('kernel vsock', () => {
  test('chooses CIDs that a guest can have', () => {
    for (let i = 0; i < 10_000; i++) {
      const cid = randomCid();
      expect(cid).toBeGreaterThanOrEqual(3);
      expect(cid).toBeLessThan(VMADDR_CID_ANY);
    }
  });

  test.skipIf(!hasVsock)('has a port of its own for each VM, and stops waiting when disposed', async () => {
    const listeners = [listenKernel(5), listenKernel(6)];
    const ports = listeners.map(({ port }) => port);
    expect(Math.min(...ports)).toBeGreaterThan(1023);
    expect(ports[0]).not.toBe(ports[1]);
    for (const listener of listeners) {
      const waiting = expect(listener.accept(never)).rejects.toMatchObject({ code: 'unavailable' });
      await listener[Symbol.asyncDispose]();
      await waiting;
    }
  });
});
