import { once } from 'node:events';
import { existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { connect, createServer, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it, vi } from 'vitest';
import { ForwardRequest } from '../../../gen/containerd/events_service.ts';
import { DeleteResponse } from '../../../gen/containerd/task.ts';
import { Daemon } from '../../../src/daemon/daemon.ts';
import type { ContainerContext } from '../../../src/daemon/endpoints.ts';
import { KilnError } from '../../../src/errors.ts';
import { createLogger } from '../../../src/observe/logger.ts';
import { TtrpcServer } from '../../../src/rpc/ttrpc/index.ts';
import { controlCall } from '../../../src/shim/control/client.ts';
import type { LauncherContext } from '../../../src/shim/control/request.ts';
import { compile, launcherSources, run, temporaryFolder } from '../native/harness.ts';
import { Gate, ScriptedContainer } from '../shim/scripted-container.ts';
import { errorOf, TaskClient } from '../shim/task-client.ts';

/** The launcher, whose relay owns a container's socket. There is no kilnd beside it that a relay could start. */
let binaries: string;
let launcher: string;
beforeAll(() => {
  binaries = temporaryFolder();
  launcher = join(binaries, 'launcher');
  compile(launcherSources, launcher);
}, 60_000);
afterAll(() => rmSync(binaries, { recursive: true, force: true }));

let root: string;
let cleanup: AsyncDisposableStack;
beforeEach(() => {
  root = mkdtempSync(join(tmpdir(), 'kiln-daemon-'));
  cleanup = new AsyncDisposableStack();
  cleanup.defer(() => rmSync(root, { recursive: true, force: true }));
});
afterEach(() => cleanup.disposeAsync());

interface Setup {
  readonly idleTimeoutMs?: number;
  /** Holds every createContainer. */
  readonly creation?: Gate;
  readonly collectGarbage?: () => Promise<unknown>;
  readonly collectEveryMs?: number;
}

class Bench {
  readonly stateDir = join(root, 'state');
  readonly containers: ScriptedContainer[] = [];
  readonly contexts: ContainerContext[] = [];
  readonly stopped: Promise<void>;
  readonly daemon: Daemon;
  collections = 0;

  constructor(setup: Setup) {
    const { promise, resolve } = Promise.withResolvers<void>();
    this.stopped = promise;
    mkdirSync(this.stateDir, { recursive: true });
    this.daemon = new Daemon({
      onRestoring: () => {},
      paths: {
        stateDir: this.stateDir,
        cacheDir: join(root, 'cache'),
        guestDir: '/',
        configFile: '/',
        configFileIsExplicit: false,
      },
      idleTimeoutMs: setup.idleTimeoutMs ?? 0,
      log: createLogger({ stateDir: this.stateDir, level: 'trace' }),
      createContainer: async ({ id }, context, signal) => {
        this.contexts.push(context);
        signal.addEventListener('abort', () => setup.creation?.open());
        await setup.creation?.pass();
        const container = new ScriptedContainer(id);
        this.containers.push(container);
        return container;
      },
      createSandbox: () => Promise.reject(new Error('these tests make no sandbox')),
      adoptSandbox: () => Promise.reject(new Error('these tests leave no sandbox behind')),
      adoptContainer: () => Promise.reject(new Error('these tests leave no task behind')),
      status: () => ({}),
      release: async () => {},
      prepareExec: () => {
        throw new KilnError('invalid-argument', 'these tests run one process');
      },
      collectGarbage: () => {
        this.collections += 1;
        return setup.collectGarbage?.() ?? Promise.resolve();
      },
      collectEveryMs: setup.collectEveryMs ?? 0,
      onStopped: resolve,
    });
    // Twice: a task that lives must not hold up the end of a test.
    cleanup.defer(async () => {
      await this.daemon.stop();
      await this.daemon.stop();
    });
  }

  get log(): { level: string; msg: string }[] {
    const lines = readFileSync(join(this.stateDir, 'kilnd.log'), 'utf8').trim().split('\n');
    return lines.map((line) => JSON.parse(line) as { level: string; msg: string });
  }

  context(id: string, fields: Partial<LauncherContext> = {}): LauncherContext {
    const bundle = join(root, 'bundles', id);
    mkdirSync(bundle, { recursive: true });
    return {
      namespace: 'default',
      id,
      bundle,
      address: '/run/c.sock',
      ttrpcAddress: join(root, 'ttrpc'),
      publishBinary: '',
      debug: false,
      maxShimVersion: 0,
      launcherStartedNs: 1_700_000_000_000_000_000n,
      ...fields,
    };
  }

  /** The launcher's request `start`, without a relay: exit code and text. */
  async start(id: string, fields: Partial<LauncherContext> = {}): Promise<[number, string]> {
    const request = { kind: 'start', payload: new Uint8Array(), ...this.context(id, fields) } as const;
    const { exitCode, stdout } = await controlCall(this.stateDir, request);
    return [exitCode, Buffer.from(stdout).toString()];
  }

  async delete(id: string, fields: Partial<LauncherContext> = {}) {
    const { exitCode, stdout } = await controlCall(this.stateDir, { kind: 'delete', ...this.context(id, fields) });
    expect(exitCode).toBe(0);
    return DeleteResponse.decode(stdout);
  }

  async status(): Promise<{
    draining: boolean;
    pid: number;
    containers: { relayPid: number | null; connections: number }[];
  }> {
    const { stdout } = await controlCall(this.stateDir, { kind: 'status' });
    return JSON.parse(Buffer.from(stdout).toString());
  }

  /** The launcher itself, and the connection that containerd then makes to its relay. */
  async dial(id: string): Promise<TaskClient> {
    const { namespace, bundle, address, ttrpcAddress } = this.context(id);
    const { text } = await run(launcher, ['-namespace', namespace, '-address', address, '-id', id, 'start'], {
      cwd: bundle,
      env: { KILN_STATE_DIR: this.stateDir, TTRPC_ADDRESS: ttrpcAddress },
    });
    if (!text.startsWith('unix://')) throw new Error(text);
    const socket = connect(text.replace('unix://', ''));
    await once(socket, 'connect');
    const client = new TaskClient(socket, id);
    cleanup.use(client.ttrpc);
    return client;
  }

  /** A container that runs, with containerd's connection to it. */
  async running(id: string): Promise<TaskClient> {
    const client = await this.dial(id);
    await client.create({ bundle: join(root, 'bundles', id) });
    await client.start();
    return client;
  }
}

async function started(setup: Setup = {}): Promise<Bench> {
  const bench = new Bench(setup);
  await bench.daemon.start();
  return bench;
}

/** A kilnd whose events arrive. */
async function startedWithEvents(setup: Setup = {}) {
  const sink = await eventSink();
  return Object.assign(await started(setup), { sink });
}

/** containerd's end of events: topics as they come. */
async function eventSink(hold?: Promise<void>) {
  const topics: string[] = [];
  const waiting: (() => void)[] = [];
  const server = new TtrpcServer({
    'containerd.services.events.ttrpc.v1.Events': {
      Forward: async (payload) => {
        await hold;
        const { envelope } = ForwardRequest.decode(payload);
        topics.push(`${envelope?.namespace} ${envelope?.topic}`);
        for (const resolve of waiting.splice(0)) resolve();
        return new Uint8Array();
      },
    },
  });
  const listener = createServer((socket) => server.serve(socket)).listen(join(root, 'ttrpc'));
  await once(listener, 'listening');
  cleanup.defer(async () => {
    listener.close();
    await server.close(0);
  });
  const until = async (count: number) => {
    while (topics.length < count) await new Promise<void>((resolve) => waiting.push(resolve));
    return topics;
  };
  return { topics, until };
}

describe('start', () => {
  it('gives an address that can be dialled, and leaves it in the bundle', async () => {
    const bench = await startedWithEvents();
    const [code, address] = await bench.start('c1');
    expect(code).toBe(0);
    expect(address).toMatch(/^unix:\/\/.*\/state\/s\/[0-9a-f]{16}$/);
    expect(readFileSync(join(root, 'bundles/c1/address'), 'utf8')).toBe(address);
    const client = await bench.dial('c1');
    expect((await client.connect()).shimPid).toBe(process.pid);
  });

  it('answers in the form that this containerd takes, and leaves the bare address in the bundle', async () => {
    const bench = await startedWithEvents();
    const [code, json] = await bench.start('c1', { maxShimVersion: 2 });
    const address = readFileSync(join(root, 'bundles/c1/address'), 'utf8');
    expect(address).toMatch(/^unix:\/\//);
    expect([code, JSON.parse(json)]).toEqual([0, { version: 2, address, protocol: 'ttrpc' }]);
  });

  it.each([
    ['a container', {}, 3],
    ["a pod's container", { 'io.kubernetes.cri.container-type': 'container', 'io.kubernetes.cri.sandbox-id': 'p' }, 3],
    ['what stands for a pod', { 'io.kubernetes.cri.container-type': 'sandbox' }, 2],
    ['a sandbox, whose bundle has no spec', undefined, 2],
  ])('answers for %s with the version that keeps each container an endpoint', async (_what, annotations, version) => {
    const bench = await startedWithEvents();
    const { bundle } = bench.context('c1');
    const spec = { ociVersion: '1.2.0', process: { args: ['sh'], cwd: '/' }, root: { path: 'rootfs' }, annotations };
    if (annotations !== undefined) writeFileSync(join(bundle, 'config.json'), JSON.stringify(spec));
    const [, json] = await bench.start('c1', { maxShimVersion: 3 });
    expect(JSON.parse(json)).toMatchObject({ version });
  });

  it('again gives the same address, and the timeline of the next Create begins with the latest launcher', async () => {
    const bench = await startedWithEvents();
    const [, first] = await bench.start('c1');
    const client = await bench.dial('c1');
    const launcherStartedNs = 1_700_000_001_500_000_000n;
    const [, second] = await bench.start('c1', { launcherStartedNs });
    expect(second).toBe(first);
    await client.create();
    expect(bench.contexts[0]?.timeline.at('launcher')).toBe(1_700_000_001_500);
  });

  it('many times at once makes one endpoint', async () => {
    const bench = await startedWithEvents();
    const replies = await Promise.all(Array.from({ length: 10 }, () => bench.start('c1')));
    expect(new Set(replies.map(([, address]) => address)).size).toBe(1);
    expect((await bench.status()).containers).toEqual([
      { namespace: 'default', id: 'c1', hasTask: false, relayPid: null, connections: 0 },
    ]);
    const client = await bench.dial('c1');
    expect(await client.create()).toEqual({ pid: 4242 });
  });

  it('tells containers apart by containerd, namespace and id, and gives each its own directory', async () => {
    const bench = await startedWithEvents();
    const variants = [{}, { namespace: 'other' }, { ttrpcAddress: '/run/other.ttrpc' }];
    const addresses = await Promise.all(variants.map((fields) => bench.start('c1', fields)));
    expect(new Set([...addresses, await bench.start('c2')].map(([, address]) => address)).size).toBe(4);
    const one = await bench.running('c1');
    const two = await bench.running('c2');
    expect(new Set(bench.contexts.map(({ directory }) => directory)).size).toBe(2);
    for (const { directory } of bench.contexts) expect(directory.startsWith(`${bench.stateDir}/c/`)).toBe(true);
    await Promise.all([one.kill(9), two.kill(9)]);
  });

  it('whose bundle is gone is an error, and leaves no endpoint', async () => {
    const bench = await startedWithEvents();
    const [code, text] = await bench.start('c1', { bundle: join(root, 'nowhere') });
    expect(code).toBe(1);
    expect(text).toContain(join(root, 'nowhere/address'));
    expect((await bench.status()).containers).toEqual([]);
  });

  it('waits for a delete of the same container that is still under way', async () => {
    const bench = await startedWithEvents();
    const client = await bench.running('c1');
    const gate = new Gate();
    bench.containers[0]!.gates.destroy = gate;
    const deleted = bench.delete('c1');
    await gate.entered;
    const again = bench.dial('c1');
    // Another container is not held up.
    await bench.start('c2');
    gate.open();
    expect((await deleted).pid).toBe(4242);
    await client.ttrpc.closed;
    expect(await (await again).create()).toEqual({ pid: 4242 });
  });
});

describe('delete', () => {
  it('of a container that nobody knows says that it was killed', async () => {
    const bench = await startedWithEvents();
    expect(await bench.delete('c9')).toMatchObject({ pid: 0, exitStatus: 137 });
  });

  it('ends the task, the endpoint and its socket, and what no snapshot needs is collected', async () => {
    const bench = await startedWithEvents();
    const client = await bench.running('c1');
    const [, address] = await bench.start('c1');
    const before = bench.collections;
    expect(await bench.delete('c1')).toMatchObject({ pid: 4242, exitStatus: 137 });
    await client.ttrpc.closed;
    expect(existsSync(address.replace('unix://', ''))).toBe(false);
    expect((await bench.status()).containers).toEqual([]);
    expect(bench.collections).toBe(before + 1);
    // A second one, as containerd may ask again.
    expect(await bench.delete('c1')).toMatchObject({ exitStatus: 137 });
  });

  it('during Create ends that, too', async () => {
    const creation = new Gate();
    const bench = await startedWithEvents({ creation });
    const client = await bench.dial('c1');
    const create = errorOf(client.create());
    await creation.entered;
    await bench.delete('c1');
    expect(await create).toBe('Canceled: container c1 was deleted during Create');
    expect(bench.containers[0]?.calls).toEqual(['destroy']);
  });

  it('of many, one soon after the other, is followed by one collection for all', async () => {
    const bench = await startedWithEvents({ collectEveryMs: 1000 });
    for (const id of ['c1', 'c2', 'c3']) {
      await bench.start(id);
      await bench.delete(id);
    }
    // The one at kilnd's start.
    expect(bench.collections).toBe(1);
    await expect.poll(() => bench.collections, { timeout: 5000 }).toBe(2);
  });

  it('whose collection fails is no failure', async () => {
    const bench = await startedWithEvents({ collectGarbage: () => Promise.reject(new Error('EIO')) });
    await bench.start('c1');
    await bench.delete('c1');
    expect(bench.log.filter(({ level }) => level === 'warn').map(({ msg }) => msg)).toContain(
      'cannot remove disks of snapshots that are gone',
    );
  });
});

describe('events', () => {
  it('go to the containerd that started the container, under its namespace', async () => {
    const bench = await startedWithEvents();
    const { sink } = bench;
    const client = await bench.running('c1');
    await client.kill(9);
    await client.delete();
    expect(await sink.until(4)).toEqual([
      'default /tasks/create',
      'default /tasks/start',
      'default /tasks/exit',
      'default /tasks/delete',
    ]);
  });

  it('that are still on their way are sent before kilnd stops', async () => {
    const hold = Promise.withResolvers<void>();
    const sink = await eventSink(hold.promise);
    const bench = await started();
    const client = await bench.running('c1');
    await client.kill(9);
    await client.delete();
    await bench.delete('c1');
    const stop = bench.daemon.stop();
    hold.resolve();
    await stop;
    expect(sink.topics.length).toBe(4);
  });
});

describe('stop', () => {
  it('without a container is at once', async () => {
    const bench = await startedWithEvents();
    const { exitCode } = await controlCall(bench.stateDir, { kind: 'stop' });
    expect(exitCode).toBe(0);
    await bench.stopped;
    await expect(bench.status()).rejects.toMatchObject({ code: 'unavailable' });
    expect(existsSync(join(bench.stateDir, 'kilnd.sock'))).toBe(false);
  });

  it('with a task waits for its end, takes no new one, and still serves', async () => {
    const bench = await startedWithEvents();
    const client = await bench.running('c1');
    await bench.daemon.stop();
    expect((await bench.status()).draining).toBe(true);
    expect(await bench.start('c2')).toEqual([1, 'kilnd is stopping and takes no new container']);
    const waiting = client.wait();
    await client.kill(15);
    expect((await waiting).exitStatus).toBe(143);
    await client.delete();
    // As containerd does.
    client.ttrpc.close();
    expect(await bench.delete('c1')).toMatchObject({ pid: 4242, exitStatus: 143 });
    await bench.stopped;
  });

  it('a second time ends the containers, in silence', async () => {
    const bench = await startedWithEvents();
    const { sink } = bench;
    const client = await bench.running('c1');
    await bench.daemon.stop();
    const waiting = client.wait();
    await client.state();
    await Promise.all([bench.daemon.stop(), bench.daemon.stop()]);
    await bench.stopped;
    expect(bench.containers[0]?.calls).toEqual(['start', 'destroy']);
    expect((await waiting).exitStatus).toBe(137);
    expect(sink.topics).toEqual(['default /tasks/create', 'default /tasks/start']);
  });

  it('while a container is created waits for it', async () => {
    const creation = new Gate();
    const bench = await startedWithEvents({ creation });
    const client = await bench.dial('c1');
    const create = client.create();
    await creation.entered;
    await bench.daemon.stop();
    creation.open();
    await create;
    await client.start();
    await client.kill(9);
    await client.delete();
    await bench.delete('c1');
    await bench.stopped;
  });

  it('that cannot release a container still stops, and the log tells', async () => {
    const bench = await startedWithEvents();
    await bench.running('c1');
    bench.containers[0]!.gates.destroy = new Gate();
    bench.containers[0]!.gates.destroy.fail(new KilnError('internal', 'EBUSY'));
    await bench.daemon.stop();
    await bench.daemon.stop();
    await bench.stopped;
    expect(bench.log.filter(({ level }) => level === 'error').map(({ msg }) => msg)).toEqual([
      'cannot release everything of the container',
    ]);
  });

  it('waits for the delete that follows a task, which no other kilnd could answer', async () => {
    const bench = await startedWithEvents();
    const client = await bench.running('c1');
    await client.kill(9);
    await client.delete();
    await bench.daemon.stop();
    client.ttrpc.close();
    // Some turns of the event loop, in each of which it could stop.
    for (let round = 0; round < 20; round++) expect((await bench.status()).draining).toBe(true);
    expect(await bench.delete('c1')).toMatchObject({ pid: 4242, exitStatus: 137 });
    await bench.stopped;
  });

  it('does not wait for ever for a delete that never comes', async () => {
    vi.useFakeTimers({ toFake: ['setTimeout', 'clearTimeout'] });
    cleanup.defer(() => void vi.useRealTimers());
    const bench = await startedWithEvents();
    await bench.start('c1');
    await bench.daemon.stop();
    vi.advanceTimersByTime(5000);
    vi.useRealTimers();
    await bench.stopped;
    expect(bench.log.map(({ msg }) => msg)).toContain('no task is left');
  });

  it('answers no start that came too late, so that the launcher asks the next kilnd', async () => {
    const bench = await startedWithEvents();
    await bench.running('c1');
    const gate = new Gate();
    bench.containers[0]!.gates.destroy = gate;
    const deleted = bench.delete('c1');
    await gate.entered;
    const late = bench.start('c1');
    late.catch(() => {});
    await bench.status();
    await bench.daemon.stop();
    const stop = bench.daemon.stop();
    gate.open();
    expect((await deleted).pid).toBe(4242);
    await expect(late).rejects.toThrow('stopped before it answered');
    await stop;
  });
});

it('nothing is left of a hundred containers', async () => {
  const bench = await startedWithEvents();
  const life = async (id: string) => {
    const client = await bench.running(id);
    await client.kill(9);
    await client.delete();
    client.ttrpc.close();
    await client.ttrpc.closed;
    await bench.delete(id);
  };
  await life('warm-up');
  // What the warm-up is still closing counts too, and may be gone in the end.
  const before = process.getActiveResourcesInfo();
  const added = () => {
    const now = process.getActiveResourcesInfo();
    for (const name of before) if (now.includes(name)) now.splice(now.indexOf(name), 1);
    return now;
  };
  for (let count = 0; count < 25; count++) await Promise.all([0, 1, 2, 3].map((n) => life(`c${count}-${n}`)));
  expect((await bench.status()).containers).toEqual([]);
  expect(readdirSync(join(bench.stateDir, 's'))).toEqual([]);
  // Not by a timer, which would itself be one more. The relays close their ends when they get to run.
  const deadline = Date.now() + 30_000;
  while (added().length > 0 && Date.now() < deadline) await new Promise(setImmediate);
  expect(added()).toEqual([]);
});

describe('a relay', () => {
  interface Said {
    readonly role?: 'keeper' | 'session';
    readonly startedNs?: bigint;
    readonly replayed?: number;
    /** Default: one that kilnd does not know. */
    readonly socketPath?: string;
  }

  /** A connection that says what a relay says first. */
  function relay(bench: Bench, id: string, said: Said = {}): Socket {
    const { role = 'keeper', startedNs = 1_700_000_000_000_000_001n, replayed = 0 } = said;
    const { namespace, bundle, ttrpcAddress } = bench.context(id);
    const header = {
      ...{ protocol: 2, role, socket: said.socketPath ?? unknown(bench), relay_pid: 77, client: 1, replayed },
      ...{ namespace, id, bundle, address: '', ttrpc_address: ttrpcAddress, publish_binary: '', debug: 0 },
      max_shim_version: '',
      launcher_started_ns: startedNs,
    };
    const fields = Object.entries(header).map(([key, value]) => `${key}=${value}\0`);
    const socket = connect(join(bench.stateDir, 'relay.sock'));
    cleanup.defer(() => void socket.destroy());
    socket.write(`${fields.join('')}\0`);
    return socket;
  }

  const unknown = (bench: Bench) => join(bench.stateDir, 's/0011223344556677');
  const socketOf = async (bench: Bench, id: string) => (await bench.start(id))[1].replace('unix://', '');
  const firstWord = async (socket: Socket) => ((await once(socket, 'data')) as [Buffer])[0].toString();

  it('is welcomed, and status shows it', async () => {
    const bench = await startedWithEvents();
    const socketPath = await socketOf(bench, 'c1');
    expect(await firstWord(relay(bench, 'c1', { socketPath }))).toBe('welcome\0');
    expect((await bench.status()).containers).toMatchObject([{ id: 'c1', relayPid: 77 }]);
  });

  it('of an endpoint that this kilnd does not know makes it again, and its session is served', async () => {
    const bench = await startedWithEvents();
    expect(await firstWord(relay(bench, 'unknown'))).toBe('welcome\0');
    expect((await bench.status()).containers).toMatchObject([{ id: 'unknown', hasTask: false, relayPid: 77 }]);
    const client = new TaskClient(relay(bench, 'unknown', { role: 'session', replayed: 1 }), 'unknown');
    cleanup.use(client.ttrpc);
    expect(await client.create()).toEqual({ pid: 4242 });
    expect(bench.contexts[0]?.timeline.at('launcher')).toBe(1_700_000_000_000);
    await client.start();
    await client.kill(9);
  });

  it('whose session comes first makes the endpoint, too', async () => {
    const bench = await startedWithEvents();
    const client = new TaskClient(relay(bench, 'unknown', { role: 'session' }), 'unknown');
    cleanup.use(client.ttrpc);
    expect(await errorOf(client.state())).toBe('NotFound: container unknown does not exist');
    expect(await firstWord(relay(bench, 'unknown'))).toBe('welcome\0');
  });

  it('of a container whose bundle has gone is told to end', async () => {
    const bench = await startedWithEvents();
    const socket = relay(bench, 'unknown');
    rmSync(join(root, 'bundles/unknown'), { recursive: true });
    expect(await firstWord(socket)).toBe('end\0');
  });

  it('that comes after the delete is told to end, and the one of the next start is not', async () => {
    const bench = await startedWithEvents();
    const socketPath = await socketOf(bench, 'c1');
    writeFileSync(socketPath, '');
    await bench.delete('c1', { launcherStartedNs: 1_700_000_000_000_000_050n });
    expect(existsSync(socketPath)).toBe(false);
    const late = { socketPath, startedNs: 1_700_000_000_000_000_001n };
    expect(await firstWord(relay(bench, 'c1', late))).toBe('end\0');
    await bench.start('c1', { launcherStartedNs: 1_700_000_000_000_000_060n });
    expect(await firstWord(relay(bench, 'c1', late))).toBe('end\0');
    expect(await firstWord(relay(bench, 'c1', { ...late, startedNs: 1_700_000_000_000_000_060n }))).toBe('welcome\0');
  });

  it('whose Create was under way when an earlier kilnd was killed has it begun anew, with what was made removed', async () => {
    const bench = new Bench({});
    const left = join(bench.stateDir, 'c/0011223344556677');
    mkdirSync(join(left, 'half-made'), { recursive: true });
    await bench.daemon.start();
    expect(existsSync(left)).toBe(false);
    expect(await firstWord(relay(bench, 'unknown'))).toBe('welcome\0');
    const client = new TaskClient(relay(bench, 'unknown', { role: 'session', replayed: 1 }), 'unknown');
    cleanup.use(client.ttrpc);
    expect(await client.create()).toEqual({ pid: 4242 });
    expect(bench.contexts.map(({ directory }) => directory)).toEqual([left]);
    await client.start();
    await client.kill(9);
  });

  it('of another version is refused, and the log tells', async () => {
    const bench = await startedWithEvents();
    const socket = connect(join(bench.stateDir, 'relay.sock'));
    socket.end('protocol=9\0\0').resume();
    await once(socket, 'close');
    expect(bench.log.filter(({ level }) => level === 'error').map(({ msg }) => msg)).toEqual([
      'a relay cannot be heard',
    ]);
  });
});

describe('idle', () => {
  const idleTimeoutMs = 60_000;

  /** Only the timers are played: sockets and everything else are real. */
  async function startedAtRest() {
    vi.useFakeTimers({ toFake: ['setTimeout', 'clearTimeout'] });
    cleanup.defer(() => void vi.useRealTimers());
    const bench = await startedWithEvents({ idleTimeoutMs });
    let stopped = false;
    void bench.stopped.then(() => {
      stopped = true;
    });
    /** Everything that is under way has been noticed when a later request is answered. */
    const settle = async () => {
      for (let round = 0; round < 10 && !stopped; round++) await bench.status().catch(() => {});
    };
    const rest = async (ms: number) => {
      await settle();
      vi.advanceTimersByTime(ms);
      await settle();
      return stopped ? 'stopped' : 'runs';
    };
    return { bench, rest };
  }

  it('kilnd stops when nothing happens at all', async () => {
    const { bench, rest } = await startedAtRest();
    expect(await rest(idleTimeoutMs - 1)).toBe('runs');
    // The questions of this test count as nothing.
    expect(await rest(1)).toBe('stopped');
    expect(bench.log.map(({ msg }) => msg)).toContain('idle for long enough');
  });

  it('kilnd stops after its last container, and not before', async () => {
    const { bench, rest } = await startedAtRest();
    const client = await bench.running('c1');
    client.ttrpc.close();
    expect(await rest(10 * idleTimeoutMs)).toBe('runs');
    await bench.delete('c1');
    expect(await rest(idleTimeoutMs - 1)).toBe('runs');
    expect(await rest(1)).toBe('stopped');
  });

  it('kilnd waits anew from each start, and stops with an endpoint that containerd never dialled', async () => {
    const { bench, rest } = await startedAtRest();
    expect(await rest(idleTimeoutMs - 1)).toBe('runs');
    const [, address] = await bench.start('c1');
    expect(await rest(idleTimeoutMs - 1)).toBe('runs');
    expect(await rest(1)).toBe('stopped');
    expect(existsSync(address.replace('unix://', ''))).toBe(false);
  });

  it('kilnd stops after a start that failed', async () => {
    const { bench, rest } = await startedAtRest();
    await bench.start('c1', { bundle: join(root, 'nowhere') });
    expect(await rest(idleTimeoutMs)).toBe('stopped');
  });

  it('kilnd stays while containerd holds a connection, and stops when it has gone', async () => {
    const { bench, rest } = await startedAtRest();
    const client = await bench.dial('c1');
    expect((await client.connect()).taskPid).toBe(0);
    expect(await rest(10 * idleTimeoutMs)).toBe('runs');
    client.ttrpc.close();
    // By way of the relay.
    while ((await bench.status()).containers[0]?.connections !== 0);
    expect(await rest(idleTimeoutMs - 1)).toBe('runs');
    await rest(1);
    // It waits for the end of the relay.
    await bench.stopped;
  });

  it('kilnd never stops by itself when the limit is 0', async () => {
    const bench = await startedWithEvents({ idleTimeoutMs: 0 });
    await bench.start('c1');
    await bench.delete('c1');
    expect((await bench.status()).draining).toBe(false);
  });
});

describe('the start of kilnd', () => {
  it('clears the directories and sockets of one that was killed', async () => {
    const bench = new Bench({});
    mkdirSync(join(bench.stateDir, 'c/0123456789abcdef/x'), { recursive: true });
    mkdirSync(join(bench.stateDir, 's'), { recursive: true });
    writeFileSync(join(bench.stateDir, 's/0123456789abcdef'), '');
    await bench.daemon.start();
    expect(existsSync(join(bench.stateDir, 'c/0123456789abcdef'))).toBe(false);
    expect(existsSync(join(bench.stateDir, 's/0123456789abcdef'))).toBe(false);
    expect(bench.log).toMatchObject([
      { level: 'warn', msg: 'cleared what an earlier kilnd left behind', directories: ['0123456789abcdef'] },
    ]);
  });

  it('is refused where another answers already', async () => {
    const bench = await startedWithEvents();
    const second = new Bench({});
    await expect(second.daemon.start()).rejects.toMatchObject({ code: 'already-exists' });
    expect((await bench.status()).pid).toBe(process.pid);
  });
});
