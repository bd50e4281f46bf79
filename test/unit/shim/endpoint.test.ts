import { once } from 'node:events';
import { existsSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { connect } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, expect, it } from 'vitest';
import { DeleteResponse } from '../../../gen/containerd/task.ts';
import { loggerTo } from '../../../src/observe/logger.ts';
import { Endpoint } from '../../../src/shim/endpoint.ts';
import type { TaskEvent } from '../../../src/shim/topics.ts';
import { Gate, ScriptedContainer } from './scripted-container.ts';
import { errorOf, TaskClient } from './task-client.ts';

let directory: string;
let cleanup: AsyncDisposableStack;
beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'kiln-endpoint-'));
  cleanup = new AsyncDisposableStack();
  cleanup.defer(() => rmSync(directory, { recursive: true, force: true }));
});
afterEach(() => cleanup.disposeAsync());

async function listen() {
  const container = new ScriptedContainer('c1');
  const events: TaskEvent[] = [];
  const told = { quiet: 0, deleted: 0 };
  /** Resolves at the next onQuiet. */
  let quiet = Promise.withResolvers<void>();
  const endpoint = await Endpoint.listen({
    socketPath: join(directory, 's'),
    namespace: 'ns',
    id: 'c1',
    save: () => {},
    createContainer: async () => container,
    prepareExec: () => {
      throw new Error('no Exec is expected');
    },
    publish: (event) => events.push(event),
    logger: loggerTo({ write: () => {} }, 'error'),
    onQuiet: () => {
      told.quiet += 1;
      quiet.resolve();
      quiet = Promise.withResolvers();
    },
    onDeleted: () => {
      told.deleted += 1;
    },
  });
  cleanup.defer(() => void endpoint.delete());
  const dial = async () => {
    const socket = connect(endpoint.socketPath);
    await once(socket, 'connect');
    const client = new TaskClient(socket, 'c1');
    cleanup.use(client.ttrpc);
    return client;
  };
  return { container, endpoint, events, told, dial, nextQuiet: () => quiet.promise };
}

it("an endpoint accepts as soon as it listens, also where a dead kilnd's socket lay", async () => {
  writeFileSync(join(directory, 's'), 'not even a socket');
  const { endpoint, dial } = await listen();
  expect(endpoint.address).toBe(`unix://${directory}/s`);
  const client = await dial();
  expect(await client.create()).toEqual({ pid: 4242 });
});

it('an endpoint that cannot listen names its path', async () => {
  const listening = Endpoint.listen({
    socketPath: join(directory, 'missing', 's'),
    namespace: 'ns',
    id: 'c1',
    save: () => {},
    createContainer: async () => new ScriptedContainer('c1'),
    prepareExec: () => {
      throw new Error('no Exec is expected');
    },
    publish: () => {},
    logger: loggerTo({ write: () => {} }, 'error'),
    onQuiet: () => {},
    onDeleted: () => {},
  });
  await expect(listening).rejects.toThrow(`cannot listen on ${directory}/missing/s`);
});

it('an endpoint is busy while there is a connection or a task, and tells when that may have changed', async () => {
  const { endpoint, dial, nextQuiet } = await listen();
  expect([endpoint.busy, endpoint.hasTask]).toEqual([false, false]);
  const client = await dial();
  await client.connect();
  expect([endpoint.busy, endpoint.hasTask]).toEqual([true, false]);
  await client.create();
  expect([endpoint.busy, endpoint.hasTask]).toEqual([true, true]);
  let quiet = nextQuiet();
  client.ttrpc.close();
  await quiet;
  expect([endpoint.busy, endpoint.hasTask]).toEqual([true, true]);
  const again = await dial();
  await again.delete();
  expect([endpoint.busy, endpoint.hasTask]).toEqual([true, false]);
  quiet = nextQuiet();
  again.ttrpc.close();
  await quiet;
  expect([endpoint.busy, endpoint.hasTask]).toEqual([false, false]);
});

it('a task outlives its connection, and its exit reaches the next one', async () => {
  const { container, dial, events, nextQuiet } = await listen();
  const first = await dial();
  await first.create();
  await first.start();
  const lost = errorOf(first.wait());
  const quiet = nextQuiet();
  first.ttrpc.close();
  await Promise.all([lost, quiet]);
  const second = await dial();
  expect((await second.connect()).taskPid).toBe(4242);
  const waiting = second.wait();
  container.end(9);
  expect((await waiting).exitStatus).toBe(9);
  expect(events.map(({ type }) => type)).toEqual(['TaskCreate', 'TaskStart', 'TaskExit']);
});

it('delete ends the task, answers who waits, closes every connection and takes the socket away', async () => {
  const { endpoint, dial, told, events } = await listen();
  const client = await dial();
  await client.create();
  await client.start();
  const waiting = client.wait();
  // It has arrived when a later call is answered.
  await client.state();
  const printed = DeleteResponse.decode(await endpoint.delete());
  expect(printed).toMatchObject({ pid: 4242, exitStatus: 137 });
  expect((await waiting).exitStatus).toBe(137);
  await client.ttrpc.closed;
  expect(existsSync(endpoint.socketPath)).toBe(false);
  expect(told.deleted).toBe(1);
  expect(events.map(({ type }) => type)).toEqual(['TaskCreate', 'TaskStart']);
});

it('delete is done once, whoever asks and how often', async () => {
  const { endpoint, told, container, dial } = await listen();
  await (await dial()).create();
  const [first, second] = await Promise.all([endpoint.delete(), endpoint.delete()]);
  expect(second).toEqual(first);
  expect(await endpoint.delete()).toEqual(first);
  expect(container.calls).toEqual(['destroy']);
  expect(told.deleted).toBe(1);
});

it('nobody can connect any more while delete waits for the container', async () => {
  const { endpoint, dial, container } = await listen();
  const client = await dial();
  await client.create();
  const gate = new Gate();
  container.gates.destroy = gate;
  const deleted = endpoint.delete();
  await gate.entered;
  await expect(dial()).rejects.toThrow(/ENOENT|ECONNREFUSED/);
  expect(await errorOf(client.create())).toBe('Unavailable: container c1 is being deleted');
  gate.open();
  await deleted;
});

it('a thousand Waits that nobody waits for any more do not keep a Kill away', async () => {
  const { dial } = await listen();
  const client = await dial();
  await client.create();
  const abort = new AbortController();
  const given = Array.from({ length: 2000 }, () => errorOf(client.wait({}, { signal: abort.signal })));
  await client.state();
  abort.abort();
  await Promise.all(given);
  expect(await client.kill(9)).toEqual({});
});
