import { once } from 'node:events';
import type net from 'node:net';
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest';
import { listenUnix } from '../../../src/host/unix-socket.ts';
import { answerSerialSession } from '../../../src/rpc/serial-session.ts';
import { type SerialConnection, serialConnection } from '../../../src/vmm/virtio-serial.ts';
import { Workspace } from './workspace.ts';

/** The VMM's end of the port is a server of the test's, which plays the agent as well. */
let workspace: Workspace;
let disposal: AsyncDisposableStack;
/** Every host that has been there, in order. */
let hosts: net.Socket[];
let server: net.Server;
beforeEach(async () => {
  workspace = new Workspace();
  disposal = new AsyncDisposableStack();
  disposal.use(workspace);
  hosts = [];
  server = await listenUnix(path());
  disposal.defer(() => void server.close());
  server.on('connection', (socket) => {
    hosts.push(socket);
    socket.on('error', () => {});
    disposal.defer(() => void socket.destroy());
  });
});
afterEach(() => disposal.disposeAsync());

const path = () => workspace.path('agent.sock');
const never = new AbortController().signal;

function connection(options?: { hadHost: boolean }): SerialConnection {
  return disposal.use(serialConnection(path(), options));
}

/** What the agent does with a host: answers it, and says hello as soon as the host has spoken. */
async function answer(socket: net.Socket): Promise<void> {
  try {
    await answerSerialSession(socket);
    socket.write('hello');
  } catch {
    // The host has hung up.
  }
}

/** The agent answers each host that comes from now on, from the given one, counted from 1. */
function answerFrom(first: number): void {
  server.on('connection', (socket) => {
    if (hosts.length >= first) void answer(socket);
    else socket.resume();
  });
}

/** Speaks with the agent on a connection that was accepted. */
async function greet(socket: net.Socket): Promise<string> {
  socket.write('PRI * HTTP/2.0');
  socket.resume();
  return String((await once(socket, 'data'))[0]);
}

/** Resolves when each host that was there has hung up. */
async function allHungUp(): Promise<void> {
  for (const host of hosts) if (!host.closed) await once(host.resume(), 'close');
}

describe('the agent’s connection by a serial port', () => {
  test('is there when the agent has answered', async () => {
    answerFrom(1);
    expect(await greet(await connection().accept(never))).toBe('hello');
    expect(hosts).toHaveLength(1);
  });

  test('is there when the agent comes, however late', async () => {
    const accepted = connection().accept(never);
    const [host] = (await once(server, 'connection')) as [net.Socket];
    // The host says its line again and again.
    await once(host, 'data');
    await once(host, 'data');
    void answer(host);
    expect(await greet(await accepted)).toBe('hello');
    expect(hosts).toHaveLength(1);
  });

  test('is the one that was opened before', async () => {
    answerFrom(1);
    const serial = connection();
    serial.open();
    await once(server, 'connection');
    serial.open();
    expect(await greet(await serial.accept(never))).toBe('hello');
    expect(hosts).toHaveLength(1);
  });

  test('is an error when the VMM closes its end, and when that was before anybody waited', async () => {
    const closed = { code: 'unavailable', message: 'the VM closed its end of the virtio-serial port' };
    server.on('connection', (socket) => socket.destroy());
    const early = connection();
    early.open();
    // The other came later, so that the early one is closed when this is.
    await expect(connection().accept(never)).rejects.toMatchObject(closed);
    await expect(early.accept(never)).rejects.toMatchObject(closed);
  });

  test('is an error when nobody listens', async () => {
    const serial = disposal.use(serialConnection(workspace.path('none.sock')));
    await expect(serial.accept(never)).rejects.toMatchObject({ code: 'unavailable', cause: expect.any(Error) });
  });

  test('is not waited for any more after the abort', async () => {
    const serial = connection();
    const reason = new Error('enough');
    await expect(serial.accept(AbortSignal.abort(reason))).rejects.toBe(reason);
    const controller = new AbortController();
    const waiting = expect(serial.accept(controller.signal)).rejects.toBe(reason);
    await vi.waitFor(() => expect(hosts.length).toBeGreaterThan(0), { interval: 1 });
    controller.abort(reason);
    await waiting;
    await allHungUp();
    answerFrom(1);
    expect(await greet(await serial.accept(never))).toBe('hello');
  });
});

describe('the next connection by a serial port', () => {
  test('is there when the agent has seen that the first was closed', async () => {
    const serial = connection();
    const first = serial.accept(never);
    await once(server, 'connection');
    void answer(hosts[0]!);
    (await first).destroy();
    await allHungUp();
    // The agent misses two of the pauses.
    answerFrom(4);
    expect(await greet(await serial.accept(never))).toBe('hello');
    expect(hosts.length).toBeGreaterThan(3);
    // One at a time.
    for (const host of hosts.slice(0, -1)) expect(host.destroyed || host.readableEnded).toBe(true);
  });

  test('is tried with pauses that get longer, since the agent has to see one', async () => {
    const noticedMs = 80;
    const pauses: number[] = [];
    let hungUpAt: number | undefined;
    server.on('connection', (socket) => {
      if (hungUpAt !== undefined) pauses.push(performance.now() - hungUpAt);
      socket.on('close', () => {
        hungUpAt = performance.now();
      });
      // Longer than the first pause.
      if ((pauses.at(-1) ?? 0) >= noticedMs) void answer(socket);
      else socket.resume();
    });
    expect(await greet(await connection({ hadHost: true }).accept(never))).toBe('hello');
    expect(pauses.at(-1)).toBeGreaterThanOrEqual(noticedMs);
    expect(hosts).toHaveLength(pauses.length + 1);
  });

  test('is the first one, too, of a VM that is taken over', async () => {
    answerFrom(2);
    expect(await greet(await connection({ hadHost: true }).accept(never))).toBe('hello');
    expect(hosts.length).toBeGreaterThan(1);
  });

  test('is an error when the VMM closes its end', async () => {
    server.on('connection', (socket) => socket.destroy());
    await expect(connection({ hadHost: true }).accept(never)).rejects.toMatchObject({
      code: 'unavailable',
      message: 'the VM closed its end of the virtio-serial port',
    });
  });

  /** Resolves in the first pause: a host has hung up, and the next is not there yet. */
  async function firstPause(): Promise<void> {
    const [host] = (await once(server, 'connection')) as [net.Socket];
    await once(host.resume(), 'close');
  }

  test('is not waited for any more after the abort, in a pause either', async () => {
    const controller = new AbortController();
    const reason = new Error('enough');
    const waiting = expect(connection({ hadHost: true }).accept(controller.signal)).rejects.toBe(reason);
    await firstPause();
    controller.abort(reason);
    await waiting;
    await allHungUp();
  });

  test('is not waited for any more after the end of the VM, in a pause either', async () => {
    const serial = connection({ hadHost: true });
    const waiting = expect(serial.accept(never)).rejects.toMatchObject({
      code: 'unavailable',
      message: 'the VM was stopped before the connection of the agent',
    });
    await firstPause();
    await serial[Symbol.asyncDispose]();
    await waiting;
    await allHungUp();
  });
});

describe('a serial port that is disposed', () => {
  test('hangs up, whether its end was only opened, waits for the agent, or was accepted', async () => {
    const opened = connection();
    opened.open();
    await once(server, 'connection');

    const waits = connection();
    const waiting = expect(waits.accept(never)).rejects.toMatchObject({
      code: 'unavailable',
      message: 'the VM was stopped before the connection of the agent',
    });
    await once(server, 'connection');

    const used = connection();
    answerFrom(3);
    await used.accept(never);

    expect(hosts).toHaveLength(3);
    for (const serial of [opened, waits, used]) await serial[Symbol.asyncDispose]();
    await waiting;
    await allHungUp();
    await used[Symbol.asyncDispose]();
  });

  test('opens no other end', async () => {
    const serial = connection();
    await serial[Symbol.asyncDispose]();
    await expect(serial.accept(never)).rejects.toMatchObject({ code: 'unavailable' });
    await allHungUp();
  });
});
