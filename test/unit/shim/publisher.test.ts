import { once } from 'node:events';
import { mkdtempSync, rmSync } from 'node:fs';
import { createServer, type Server, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { TaskCreate, TaskDelete, TaskExit, TaskStart } from '../../../gen/containerd/events.ts';
import { type Envelope, ForwardRequest } from '../../../gen/containerd/events_service.ts';
import { type CallContext, statusCode, TtrpcError, TtrpcServer } from '../../../src/rpc/ttrpc/index.ts';
import { EventPublisher, type PublisherOptions } from '../../../src/shim/publisher.ts';
import type { TaskEvent } from '../../../src/shim/topics.ts';

/** A real ttrpc server in the place of containerd's. */
class Containerd implements AsyncDisposable {
  readonly received: (Envelope & { metadata: string | undefined })[] = [];
  readonly #waiters: (() => void)[] = [];
  readonly #server: Server;
  readonly #ttrpc: TtrpcServer;
  readonly #sockets = new Set<Socket>();
  /** What Forward does after it has taken note of an event. */
  answer: (count: number, context: CallContext) => Promise<void> = async () => {};

  private constructor() {
    this.#ttrpc = new TtrpcServer({
      'containerd.services.events.ttrpc.v1.Events': {
        Forward: async (payload, context) => {
          const { envelope } = ForwardRequest.decode(payload);
          if (envelope === undefined) throw new TtrpcError(statusCode.InvalidArgument, 'no envelope');
          this.received.push({ ...envelope, metadata: context.metadata.get('containerd-namespace-ttrpc') });
          for (const wake of this.#waiters.splice(0)) wake();
          await this.answer(this.received.length, context);
          return Buffer.alloc(0);
        },
      },
    });
    this.#server = createServer((socket) => {
      this.#sockets.add(socket);
      this.#ttrpc.serve(socket);
    });
  }

  static async listen(path: string): Promise<Containerd> {
    const containerd = new Containerd();
    containerd.#server.listen(path);
    await once(containerd.#server, 'listening');
    return containerd;
  }

  get connections(): number {
    return this.#sockets.size;
  }

  hangUp(): void {
    for (const socket of this.#sockets) socket.destroy();
  }

  async hasReceived(count: number): Promise<void> {
    while (this.received.length < count) await new Promise<void>((resolve) => this.#waiters.push(resolve));
  }

  get topics(): string[] {
    return this.received.map(({ topic }) => topic);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#ttrpc.close(0);
    this.#server.close();
    await once(this.#server, 'close');
  }
}

let folder: string;
let address: string;
let logged: string[];
let stack: AsyncDisposableStack;

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'kiln-publisher-'));
  address = join(folder, 'containerd.sock.ttrpc');
  logged = [];
  stack = new AsyncDisposableStack();
});

afterEach(async () => {
  await stack.disposeAsync();
  rmSync(folder, { recursive: true });
});

const log = {
  warn: (_fields: object, message: string) => void logged.push(`warn: ${message}`),
  error: (_fields: object, message: string) => void logged.push(`error: ${message}`),
};

function publisherTo(options: Partial<PublisherOptions> = {}): EventPublisher {
  return stack.use(new EventPublisher({ address, log, retryMs: { first: 1, longest: 5 }, ...options }));
}

const listen = async (): Promise<Containerd> => stack.use(await Containerd.listen(address));

const start = (pid: number): TaskEvent => ({ type: 'TaskStart', message: { containerId: 'c1', pid } });

const pidOf = ({ event }: Envelope): number => TaskStart.decode(event?.value ?? Buffer.alloc(0)).pid;

describe('events', () => {
  test('arrive with topic, type, namespace and the time they were published', async () => {
    const containerd = await listen();
    const publisher = publisherTo({ address: `unix://${address}` });
    const exitedAt = { seconds: 1n, nanos: 2 };
    const before = Date.now();
    publisher.publish('ns1', {
      type: 'TaskCreate',
      message: { ...TaskCreate.create(), containerId: 'c1', bundle: '/b', pid: 7 },
    });
    publisher.publish('ns1', start(7));
    publisher.publish('ns2', {
      type: 'TaskExit',
      message: { containerId: 'c1', id: 'c1', pid: 7, exitStatus: 137, exitedAt },
    });
    publisher.publish('ns2', {
      type: 'TaskDelete',
      message: { containerId: 'c1', id: '', pid: 7, exitStatus: 137, exitedAt },
    });
    expect(await publisher.flush(10_000)).toBe(true);
    expect(containerd.received.map(({ topic, event }) => [topic, event?.typeUrl])).toEqual([
      ['/tasks/create', 'containerd.events.TaskCreate'],
      ['/tasks/start', 'containerd.events.TaskStart'],
      ['/tasks/exit', 'containerd.events.TaskExit'],
      ['/tasks/delete', 'containerd.events.TaskDelete'],
    ]);
    expect(containerd.received.map(({ namespace, metadata }) => [namespace, metadata])).toEqual([
      ['ns1', 'ns1'],
      ['ns1', 'ns1'],
      ['ns2', 'ns2'],
      ['ns2', 'ns2'],
    ]);
    const values = containerd.received.map(({ event }) => event?.value ?? Buffer.alloc(0));
    expect(TaskCreate.decode(values[0]!)).toMatchObject({ containerId: 'c1', bundle: '/b', pid: 7 });
    expect(TaskExit.decode(values[2]!)).toMatchObject({ id: 'c1', exitStatus: 137, exitedAt });
    expect(TaskDelete.decode(values[3]!)).toMatchObject({ exitStatus: 137, exitedAt });
    for (const { timestamp } of containerd.received) {
      const atMs = Number(timestamp?.seconds) * 1000 + (timestamp?.nanos ?? 0) / 1e6;
      expect(atMs).toBeGreaterThanOrEqual(before);
      expect(atMs).toBeLessThanOrEqual(Date.now());
    }
    expect(containerd.connections).toBe(1);
    expect(logged).toEqual([]);
  });

  test('are sent one at a time, in the order they were published', async () => {
    const containerd = await listen();
    const open = { now: 0, most: 0 };
    containerd.answer = async () => {
      open.now += 1;
      open.most = Math.max(open.most, open.now);
      await new Promise(setImmediate);
      open.now -= 1;
    };
    const publisher = publisherTo();
    for (let pid = 1; pid <= 500; pid += 1) publisher.publish('ns', start(pid));
    expect(publisher.pending).toBe(500);
    expect(await publisher.flush(10_000)).toBe(true);
    expect(containerd.received.map(pidOf)).toEqual(Array.from({ length: 500 }, (_, index) => index + 1));
    expect(open.most).toBe(1);
  });

  test('published from the answer of the last one are sent too', async () => {
    const containerd = await listen();
    const publisher = publisherTo();
    for (let pid = 1; pid <= 20; pid += 1) {
      publisher.publish('ns', start(pid));
      await publisher.flush(10_000);
      for (let turn = 0; turn < pid; turn += 1) await Promise.resolve();
    }
    await containerd.hasReceived(20);
    expect(publisher.pending).toBe(0);
  });

  test('wait for a containerd that is not there yet', async () => {
    const publisher = publisherTo();
    publisher.publish('ns', start(1));
    publisher.publish('ns', start(2));
    expect(await publisher.flush(20)).toBe(false);
    const containerd = await listen();
    await containerd.hasReceived(2);
    expect(await publisher.flush(10_000)).toBe(true);
    expect(containerd.received.map(pidOf)).toEqual([1, 2]);
    expect(logged).toEqual(['warn: containerd does not take events: they wait until it does']);
  });

  test('go to the next containerd after a restart, none lost', async () => {
    const publisher = publisherTo();
    const first = await Containerd.listen(address);
    publisher.publish('ns', start(1));
    expect(await publisher.flush(10_000)).toBe(true);
    await first[Symbol.asyncDispose]();
    publisher.publish('ns', start(2));
    publisher.publish('ns', start(3));
    const second = await listen();
    expect(await publisher.flush(10_000)).toBe(true);
    expect(second.received.map(pidOf)).toEqual([2, 3]);
  });

  test('whose connection breaks before the answer are sent again before later ones', async () => {
    const containerd = await listen();
    containerd.answer = async (count) => {
      if (count === 1) containerd.hangUp();
    };
    const publisher = publisherTo();
    publisher.publish('ns', start(1));
    publisher.publish('ns', start(2));
    expect(await publisher.flush(10_000)).toBe(true);
    expect(containerd.received.map(pidOf)).toEqual([1, 1, 2]);
    expect(containerd.connections).toBe(2);
  });

  test('that containerd refuses are logged and left behind', async () => {
    const containerd = await listen();
    containerd.answer = async (count) => {
      if (count === 1) throw new TtrpcError(statusCode.InvalidArgument, 'bad topic');
    };
    const publisher = publisherTo();
    publisher.publish('ns', start(1));
    publisher.publish('ns', start(2));
    expect(await publisher.flush(10_000)).toBe(true);
    expect(containerd.received.map(pidOf)).toEqual([1, 2]);
    expect(containerd.connections).toBe(1);
    expect(logged).toEqual(['error: event dropped: containerd refused it']);
  });

  test('that containerd never answers are left behind after five attempts', async () => {
    const containerd = await listen();
    containerd.answer = async (_count, { signal }) => {
      const event = containerd.received.at(-1);
      if (event !== undefined && pidOf(event) === 1) await once(signal, 'abort');
    };
    const publisher = publisherTo({ sendTimeoutMs: 100 });
    publisher.publish('ns', start(1));
    publisher.publish('ns', start(2));
    expect(await publisher.flush(30_000)).toBe(true);
    const pids = containerd.received.map(pidOf);
    // How often each came depends on how loaded the machine is; the order does not.
    expect(pids.filter((pid) => pid === 1).length).toBeLessThanOrEqual(5);
    expect(pids).toEqual(pids.toSorted());
    expect(pids.at(-1)).toBe(2);
    expect(logged).toContain('error: event dropped: containerd did not take it in 5 attempts');
  });

  test('beyond the capacity are dropped, the oldest kept, and the loss is logged', async () => {
    const publisher = publisherTo({ capacity: 3 });
    for (let pid = 1; pid <= 5; pid += 1) publisher.publish('ns', start(pid));
    expect(publisher.pending).toBe(3);
    const containerd = await listen();
    expect(await publisher.flush(10_000)).toBe(true);
    expect(containerd.received.map(pidOf)).toEqual([1, 2, 3]);
    expect(logged).toContain('error: event dropped: queue is full or closed');
    expect(logged).toContain('error: events dropped: the queue was full');
  });
});

describe('close', () => {
  test('ends the wait for a containerd that is away, and logs what is lost', async () => {
    const publisher = publisherTo({ retryMs: { first: 60_000, longest: 60_000 } });
    publisher.publish('ns', start(1));
    await publisher.close();
    expect(publisher.pending).toBe(0);
    expect(logged).toContain('error: events lost at the end');
    publisher.publish('ns', start(2));
    expect(publisher.pending).toBe(0);
    await publisher.close();
  });

  test('ends a call that is under way', async () => {
    const containerd = await listen();
    containerd.answer = async (_count, { signal }) => void (await once(signal, 'abort'));
    const publisher = publisherTo();
    publisher.publish('ns', start(1));
    await containerd.hasReceived(1);
    await publisher.close();
    expect(publisher.pending).toBe(0);
  });

  test('of a publisher with nothing to do says nothing', async () => {
    const publisher = publisherTo();
    expect(await publisher.flush(10_000)).toBe(true);
    await publisher.close();
    expect(logged).toEqual([]);
  });
});
