import { existsSync, mkdirSync, rmSync, statSync } from 'node:fs';
import { mkdtemp } from 'node:fs/promises';
import { connect, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { buffer } from 'node:stream/consumers';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { KilnError } from '../../../src/errors.ts';
import { controlCall } from '../../../src/shim/control/client.ts';
import { type ControlReply, type ControlRequest, controlMessageLimit } from '../../../src/shim/control/request.ts';
import { ControlServer, controlSocketIsServed } from '../../../src/shim/control/server.ts';

let stateDir: string;
let cleanup: AsyncDisposableStack;

beforeEach(async () => {
  stateDir = await mkdtemp(path.join(tmpdir(), 'kiln-t'));
  cleanup = new AsyncDisposableStack();
  cleanup.defer(() => rmSync(stateDir, { recursive: true, force: true }));
});
afterEach(() => cleanup.disposeAsync());

const ok = async (): Promise<ControlReply> => ({ exitCode: 0, stdout: Buffer.from('fine') });

async function listen(handler: (request: ControlRequest) => Promise<ControlReply> = ok, idleMs = 60_000) {
  const errors: KilnError[] = [];
  const onError = (error: KilnError) => errors.push(error);
  const server = await ControlServer.listen(stateDir, handler, { onError, requestIdleMs: idleMs });
  cleanup.use(server);
  return { server, errors };
}

/** A client that can misbehave. */
async function rawCall(server: ControlServer, bytes: Uint8Array): Promise<Buffer> {
  const socket = connect({ path: server.socketPath, allowHalfOpen: true });
  socket.end(bytes);
  return buffer(socket);
}

describe('ControlServer and controlCall', () => {
  test('a request arrives as it was sent, and so does its reply', async () => {
    const seen: ControlRequest[] = [];
    const stdout = Buffer.from([0, 1, 255, 10]);
    await listen(async (request) => {
      seen.push(request);
      return { exitCode: 7, stdout };
    });
    const request: ControlRequest = {
      kind: 'start',
      namespace: 'default',
      id: 'c1',
      bundle: '/run/b ü',
      address: '/a=b',
      ttrpcAddress: '',
      publishBinary: '/usr/bin/containerd',
      debug: true,
      maxShimVersion: 2,
      launcherStartedNs: 1_763_000_000_123_456_789n,
      payload: Buffer.from('a\0b=c\0\0'),
    };
    expect(await controlCall(stateDir, request)).toEqual({ exitCode: 7, stdout });
    expect(await controlCall(stateDir, { kind: 'status' })).toEqual({ exitCode: 7, stdout });
    expect(seen).toEqual([request, { kind: 'status' }]);
  });

  test('the socket is for its owner only, whatever the umask', async () => {
    const mask = process.umask(0);
    cleanup.defer(() => void process.umask(mask));
    const { server } = await listen();
    expect(statSync(server.socketPath).mode & 0o777).toBe(0o600);
    expect(process.umask()).toBe(0);
  });

  test('an error of the handler is exit code 1 with the message and its hint, and is reported', async () => {
    const thrown = new KilnError('not-found', 'no kernel at /x', { hint: 'run setup' });
    const { errors } = await listen(async () => {
      throw thrown;
    });
    const reply = await controlCall(stateDir, { kind: 'status' });
    expect(reply).toEqual({ exitCode: 1, stdout: Buffer.from('no kernel at /x (run setup)') });
    expect(errors).toEqual([thrown]);
  });

  test('a reply that cannot be sent is an error too', async () => {
    await listen(async () => ({ exitCode: 256, stdout: new Uint8Array() }));
    expect(Buffer.from((await controlCall(stateDir, { kind: 'status' })).stdout).toString()).toBe(
      'exit code 256 is not an integer from 0 to 255',
    );
  });

  test('garbage and oversized requests get an answer, and the server keeps serving', async () => {
    const { server } = await listen();
    expect((await rawCall(server, Buffer.from('GET / HTTP/1.1\r\n\r\n'))).toString()).toBe(
      '\x01\0control request ends within its header',
    );
    const reply = await rawCall(server, Buffer.alloc(controlMessageLimit + 1, 'a'));
    expect(reply.toString()).toBe(`\x01\0control request exceeds ${controlMessageLimit} bytes`);
    expect((await controlCall(stateDir, { kind: 'status' })).exitCode).toBe(0);
    expect(server.inFlight).toBe(0);
  });

  test('a request that is never finished is dropped after the time limit', async () => {
    const { server, errors } = await listen(ok, 20);
    const socket = connect({ path: server.socketPath, allowHalfOpen: true });
    socket.write('protocol=2');
    expect(await buffer(socket)).toHaveLength(0);
    expect(errors.map((error) => error.code)).toEqual(['deadline-exceeded']);
  });

  test('a client that goes away before its answer harms nobody', async () => {
    const asked = Promise.withResolvers<void>();
    const release = Promise.withResolvers<void>();
    const { server, errors } = await listen(async (request) => {
      if (request.kind === 'stop') {
        asked.resolve();
        await release.promise;
      }
      return { exitCode: 0, stdout: Buffer.alloc(4 << 20) }; // more than a socket buffer takes
    });
    const abort = new AbortController();
    const call = controlCall(stateDir, { kind: 'stop' }, { signal: abort.signal });
    await asked.promise;
    abort.abort(new Error('enough'));
    await expect(call).rejects.toThrow('enough');
    release.resolve();
    expect((await controlCall(stateDir, { kind: 'status' })).exitCode).toBe(0);
    await server.close();
    expect(errors.map((error) => error.code)).toEqual(['unavailable']);
  });

  test('close unlinks the socket at once, lets the request in flight finish, and takes no other', async () => {
    const asked = Promise.withResolvers<void>();
    const release = Promise.withResolvers<void>();
    const { server } = await listen(async () => {
      asked.resolve();
      await release.promise;
      return ok();
    });
    const call = controlCall(stateDir, { kind: 'status' });
    await asked.promise;
    expect(server.inFlight).toBe(1);
    const closed = server.close();
    expect(existsSync(server.socketPath)).toBe(false);
    await expect(controlCall(stateDir, { kind: 'status' })).rejects.toMatchObject({ code: 'unavailable' });
    release.resolve();
    expect((await call).exitCode).toBe(0);
    await closed;
    expect(server.inFlight).toBe(0);
  });

  test('it can be asked whether a kilnd is there, which disturbs nobody', async () => {
    expect(await controlSocketIsServed(stateDir)).toBe(false);
    const { server, errors } = await listen();
    expect(await controlSocketIsServed(stateDir)).toBe(true);
    await server.close();
    expect(errors).toEqual([]);
    expect(await controlSocketIsServed(stateDir)).toBe(false);
  });

  test('a second kilnd is refused while the first listens, and the first is not disturbed', async () => {
    await listen();
    await expect(ControlServer.listen(stateDir, ok)).rejects.toMatchObject({ code: 'already-exists' });
    expect((await controlCall(stateDir, { kind: 'status' })).exitCode).toBe(0);
  });

  test('listening where there is no folder names the socket', async () => {
    const missing = path.join(stateDir, 'missing');
    await expect(ControlServer.listen(missing, ok)).rejects.toThrow(`cannot listen on ${missing}/kilnd.sock`);
  });

  test('a path that is too long for a socket is named with its length', async () => {
    const long = path.join(stateDir, 'x'.repeat(100));
    mkdirSync(long);
    await expect(ControlServer.listen(long, ok)).rejects.toMatchObject({
      code: 'invalid-argument',
      hint: 'choose a shorter KILN_STATE_DIR',
    });
    await expect(controlCall('relative', { kind: 'status' })).rejects.toThrow('"relative" is not an absolute path');
  });

  test('a call where no kilnd runs says so', async () => {
    await expect(controlCall(stateDir, { kind: 'status' })).rejects.toMatchObject({
      code: 'unavailable',
      message: `kilnd is not running: nothing listens on ${stateDir}/kilnd.sock`,
    });
  });

  test('connections that wait for nothing are counted until they close', async () => {
    const { server } = await listen();
    const sockets: Socket[] = [];
    for (let i = 0; i < 3; i++) sockets.push(connect({ path: server.socketPath }));
    // The server accepts in order, so an answered request proves that the three before it were accepted.
    await controlCall(stateDir, { kind: 'status' });
    expect(server.inFlight).toBe(3);
    for (const socket of sockets) socket.destroy();
    await server.close();
    expect(server.inFlight).toBe(0);
  });
});
