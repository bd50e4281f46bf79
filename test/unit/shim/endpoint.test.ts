import { once } from 'node:events';
import { existsSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import { DeleteResponse } from '../../../gen/containerd/task.ts';
import { Status } from '../../../gen/containerd/task_types.ts';
import { loggerTo } from '../../../src/observe/logger.ts';
import { Endpoint, type EndpointOptions } from '../../../src/shim/endpoint.ts';
import type { RelayHeader } from '../../../src/shim/relay/header.ts';
import { noTask, type TaskState } from '../../../src/shim/task-record.ts';
import type { TaskEvent } from '../../../src/shim/topics.ts';
import { SandboxClient } from '../../support/sandbox-client.ts';
import { headerOf, ScriptedRelay, socketPair } from './relay-pair.ts';
import { ScriptedSandbox } from './sandbox-bench.ts';
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

function make(fields: Partial<EndpointOptions> = {}) {
  const container = new ScriptedContainer('c1');
  const events: TaskEvent[] = [];
  const told = { quiet: 0, deleted: 0 };
  /** Resolves at the next onQuiet. */
  let quiet = Promise.withResolvers<void>();
  const warnings: string[] = [];
  const endpoint = new Endpoint({
    socketPath: join(directory, 's'),
    namespace: 'ns',
    id: 'c1',
    createContainer: async () => container,
    createSandbox: () => Promise.reject(new Error('no sandbox is expected')),
    prepareExec: () => {
      throw new Error('no Exec is expected');
    },
    publish: (event) => void events.push(event),
    save: () => {},
    logger: loggerTo({ write: (line) => warnings.push(line) }, 'warn'),
    onQuiet: () => {
      told.quiet += 1;
      quiet.resolve();
      quiet = Promise.withResolvers();
    },
    onDeleted: () => {
      told.deleted += 1;
    },
    ...fields,
  });
  cleanup.defer(() => void endpoint.delete());
  /** A connection of containerd, which the relay hands over. */
  const dial = async (header: Partial<RelayHeader> = {}) => {
    const [near, socket] = await socketPair(directory);
    endpoint.serve({ header: headerOf({ role: 'session', ...header }), socket: near.pause() });
    const client = new TaskClient(socket, 'c1');
    cleanup.use(client.ttrpc);
    return client;
  };
  return { container, endpoint, events, told, warnings, dial, nextQuiet: () => quiet.promise };
}

it('an endpoint serves the connections that its relay hands over', async () => {
  const { endpoint, dial } = make();
  expect(endpoint.address).toBe(`unix://${directory}/s`);
  const client = await dial();
  expect(await client.create()).toEqual({ pid: 4242 });
});

it('an endpoint whose socket path is too long is refused', () => {
  expect(() => make({ socketPath: `/${'x'.repeat(107)}` })).toThrow('has 108 bytes');
});

it('an endpoint is busy while there is a connection or a task, and tells when that may have changed', async () => {
  const { endpoint, dial, nextQuiet } = make();
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
  const { container, dial, events, nextQuiet } = make();
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
  const { endpoint, dial, told, events } = make();
  writeFileSync(endpoint.socketPath, '');
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
  const { endpoint, told, container, dial } = make();
  await (await dial()).create();
  const [first, second] = await Promise.all([endpoint.delete(), endpoint.delete()]);
  expect(second).toEqual(first);
  expect(await endpoint.delete()).toEqual(first);
  expect(container.calls).toEqual(['destroy']);
  expect(told.deleted).toBe(1);
});

it('nobody can connect any more while delete waits for the container', async () => {
  const { endpoint, dial, container } = make();
  const relay = await ScriptedRelay.connect(directory);
  endpoint.attach(relay.keeper);
  writeFileSync(endpoint.socketPath, '');
  const client = await dial();
  await client.create();
  const gate = new Gate();
  container.gates.destroy = gate;
  const deleted = endpoint.delete();
  await gate.entered;
  expect(await relay.until(2)).toEqual(['welcome', 'end']);
  expect(existsSync(endpoint.socketPath)).toBe(false);
  expect(await errorOf(client.create())).toBe('Unavailable: container c1 is being deleted');
  gate.open();
  await client.ttrpc.closed;
  // The relay ends when its clients have.
  relay.socket.end();
  await deleted;
});

it('delete waits for the relay, but not for ever', async () => {
  const { endpoint, told } = make();
  const relay = await ScriptedRelay.connect(directory);
  endpoint.attach(relay.keeper);
  vi.useFakeTimers({ toFake: ['setTimeout', 'clearTimeout'] });
  cleanup.defer(() => void vi.useRealTimers());
  const deleted = endpoint.delete();
  await relay.until(2);
  expect(told.deleted).toBe(0);
  vi.advanceTimersByTime(3000);
  await deleted;
  expect(told.deleted).toBe(1);
  await once(relay.socket, 'close');
});

it('a relay that comes during delete is told to end, too', async () => {
  const { endpoint, container, dial } = make();
  await (await dial()).create();
  const gate = new Gate();
  container.gates.destroy = gate;
  const deleted = endpoint.delete();
  await gate.entered;
  const relay = await ScriptedRelay.connect(directory);
  endpoint.attach(relay.keeper);
  expect(await relay.until(1)).toEqual(['end']);
  gate.open();
  relay.socket.end();
  await deleted;
});

it('of two relays the later one is kept', async () => {
  const { endpoint } = make();
  const first = await ScriptedRelay.connect(directory, { relayPid: 1 });
  const second = await ScriptedRelay.connect(directory, { relayPid: 2 });
  endpoint.attach(first.keeper);
  expect(endpoint.relayPid).toBe(1);
  endpoint.attach(second.keeper);
  expect(await first.until(2)).toEqual(['welcome', 'end']);
  expect(await second.until(1)).toEqual(['welcome']);
  first.socket.end();
  await first.keeper.closed;
  expect(endpoint.relayPid).toBe(2);
  second.socket.end();
  await second.keeper.closed;
  expect(endpoint.relayPid).toBe(null);
});

it('FIFOs are held by each relay that comes, until they are released', async () => {
  const { endpoint, warnings } = make();
  await endpoint.holdFifo('/early');
  const first = await ScriptedRelay.connect(directory);
  endpoint.attach(first.keeper);
  const held = endpoint.holdFifo('/f');
  expect(await first.until(3)).toEqual(['welcome', 'hold /early', 'hold /f']);
  first.say('error Permission denied', 'ok');
  await held;
  expect(warnings.map((line) => (JSON.parse(line) as { path: string }).path)).toEqual(['/early']);
  const released = endpoint.releaseFifo('/early');
  expect((await first.until(4))[3]).toBe('release /early');
  first.say('ok');
  await released;
  first.socket.end();
  await first.keeper.closed;
  const second = await ScriptedRelay.connect(directory);
  endpoint.attach(second.keeper);
  expect(await second.until(2)).toEqual(['welcome', 'hold /f']);
  // A relay that goes has released everything.
  const last = endpoint.releaseFifo('/f');
  second.socket.end();
  await last;
});

it('a replay reaches the service as any request: a container that nobody knows is not found', async () => {
  const { dial } = make();
  const client = await dial({ replayed: 1 });
  expect(await errorOf(client.wait())).toBe('NotFound: container c1 does not exist');
});

it('a thousand Waits that nobody waits for any more do not keep a Kill away', async () => {
  const { dial } = make();
  const client = await dial();
  await client.create();
  const abort = new AbortController();
  const given = Array.from({ length: 2000 }, () => errorOf(client.wait({}, { signal: abort.signal })));
  await client.state();
  abort.abort();
  await Promise.all(given);
  expect(await client.kill(9)).toEqual({});
});

describe('an endpoint of a sandbox', () => {
  const sandboxOf = (fields: Partial<EndpointOptions> = {}) => {
    const sandbox = new ScriptedSandbox('s1');
    const made = make({ id: 's1', createSandbox: async () => sandbox, ...fields });
    const dial = async () => {
      const [near, socket] = await socketPair(directory);
      made.endpoint.serve({ header: headerOf({ role: 'session' }), socket: near.pause() });
      const client = new SandboxClient(socket, 's1');
      cleanup.use(client.ttrpc);
      return client;
    };
    return { ...made, sandbox, dialSandbox: dial };
  };

  it('writes down the sandbox, until it is shut down, and no task', async () => {
    const saved: TaskState[] = [];
    const { endpoint, dialSandbox } = sandboxOf({ save: (state) => void saved.push(state) });
    const client = await dialSandbox();
    await client.create();
    expect(saved).toEqual([{ ...noTask, sandbox: { createdAtMs: expect.any(Number) } }]);
    expect(endpoint.hasTask).toBe(true);
    await client.shutdown();
    expect(saved.at(-1)).toEqual(noTask);
    expect(endpoint.hasTask).toBe(false);
  });

  it('takes no task of the same name, nor a sandbox in place of a task', async () => {
    const { dial, dialSandbox } = sandboxOf();
    const tasks = await dial();
    await (await dialSandbox()).create();
    expect(await errorOf(tasks.create({ id: 's1' }))).toBe('AlreadyExists: s1 is a sandbox');
    const other = sandboxOf();
    await (await other.dial()).create({ id: 's1' });
    expect(await errorOf((await other.dialSandbox()).create())).toBe('AlreadyExists: s1 is a container');
  });

  it('ends the sandbox at its deletion, and prints how it ended', async () => {
    const { endpoint, dialSandbox, sandbox } = sandboxOf();
    const client = await dialSandbox();
    await client.create();
    await client.start();
    const waiting = client.wait();
    // It has arrived when a later call is answered.
    await client.status();
    expect(DeleteResponse.decode(await endpoint.delete())).toMatchObject({ pid: 4242, exitStatus: 137 });
    expect((await waiting).exitStatus).toBe(137);
    expect(sandbox.calls).toEqual(['start', 'destroy']);
  });

  it('goes on with the sandbox of an earlier kilnd', async () => {
    const { endpoint, dialSandbox, sandbox } = sandboxOf();
    sandbox.state = { kind: 'running' };
    const adopt = { task: () => Promise.reject(new Error('it is no task')), sandbox: async () => sandbox };
    const before = { pid: 4242, status: Status.RUNNING };
    await endpoint.restore({ ...noTask, sandbox: { createdAtMs: 1_600_000_000_000 } }, before, adopt);
    const { state, createdAt } = await (await dialSandbox()).status();
    expect([state, createdAt?.seconds]).toEqual(['SANDBOX_READY', 1_600_000_000n]);
  });
});
