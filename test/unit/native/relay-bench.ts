/**
 * A real launcher and the real relay that it forks, with a kilnd that is played in this process: it can die between any
 * two bytes and come back. Where the relay starts kilnd, it runs `bin/kilnd`, a script that does
 * what the test says.
 */
import { execFileSync } from 'node:child_process';
import { once } from 'node:events';
import { mkdirSync, readFileSync } from 'node:fs';
import net from 'node:net';
import path from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { type DecodedFrame, encodeFrame, FrameDecoder, messageType } from '../../../src/rpc/ttrpc/index.ts';
import { ControlServer } from '../../../src/shim/control/server.ts';
import { parseRelayHeader, type RelayHeader } from '../../../src/shim/relay/header.ts';
import { Installation, isAlive, kill } from './harness.ts';

export type WholeFrame = Extract<DecodedFrame, { kind: 'frame' }>;

/** Things that come, and who waits for the next. */
export class Queue<T> {
  readonly #items: T[] = [];
  readonly #waiting: ((item: T) => void)[] = [];

  push(item: T): void {
    const next = this.#waiting.shift();
    if (next === undefined) this.#items.push(item);
    else next(item);
  }

  next(): Promise<T> {
    const item = this.#items.shift();
    return item === undefined ? new Promise((resolve) => this.#waiting.push(resolve)) : Promise.resolve(item);
  }

  get size(): number {
    return this.#items.length;
  }
}

/** One end of a connection that carries frames. */
export class Frames {
  readonly socket: net.Socket;
  readonly received = new Queue<WholeFrame>();
  readonly closed: Promise<void>;
  readonly decoder = new FrameDecoder();

  constructor(socket: net.Socket) {
    this.socket = socket;
    socket.on('error', () => {});
    socket.on('data', (chunk) => {
      for (const frame of this.decoder.push(chunk)) if (frame.kind === 'frame') this.received.push(frame);
    });
    this.closed = new Promise((resolve) => socket.once('close', () => resolve()));
    socket.on('end', () => socket.destroy());
  }

  send(streamId: number, type: number, data: Uint8Array | string, flags = 0): void {
    this.socket.write(encodeFrame({ streamId, type, flags }, Buffer.from(data)));
  }

  request(streamId: number, data: Uint8Array | string): void {
    this.send(streamId, messageType.request, data);
  }

  respond(streamId: number, data: Uint8Array | string): void {
    this.send(streamId, messageType.response, data);
  }
}

/** A Request message of the task service. */
export function call(method: string, payload = ''): Buffer {
  const field = (number: number, value: string) =>
    Buffer.concat([Uint8Array.of((number << 3) | 2, Buffer.byteLength(value)), Buffer.from(value)]);
  return Buffer.concat([field(1, 'containerd.task.v2.Task'), field(2, method), field(3, payload)]);
}

export class FakeSession extends Frames {
  readonly header: RelayHeader;

  constructor(socket: net.Socket, header: RelayHeader) {
    super(socket);
    this.header = header;
  }
}

export class FakeKeeper {
  readonly header: RelayHeader;
  readonly socket: net.Socket;
  readonly answers = new Queue<string>();
  readonly closed: Promise<void>;

  constructor(socket: net.Socket, header: RelayHeader) {
    this.socket = socket;
    this.header = header;
    let partial = '';
    socket.on('data', (chunk) => {
      const messages = (partial + chunk.toString()).split('\0');
      partial = messages.pop() ?? '';
      for (const message of messages) this.answers.push(message);
    });
    this.closed = new Promise((resolve) => socket.once('close', () => resolve()));
    socket.on('end', () => socket.destroy());
  }

  say(...messages: string[]): void {
    this.socket.write(messages.map((message) => `${message}\0`).join(''));
  }

  async ask(message: string): Promise<string> {
    this.say(message);
    return this.answers.next();
  }
}

/** One life of kilnd. */
export class FakeKilnd {
  readonly keepers = new Queue<FakeKeeper>();
  readonly sessions = new Queue<FakeSession>();
  readonly relays: net.Server;
  readonly #sockets = new Set<net.Socket>();
  #control: ControlServer | undefined;
  welcomes = true;

  private constructor() {
    this.relays = net.createServer((socket) => this.#accept(socket));
  }

  static async listen(bench: RelayBench): Promise<FakeKilnd> {
    const kilnd = new FakeKilnd();
    const socket = path.join(bench.stateDir, 'relay.sock');
    execFileSync('rm', ['-f', socket]);
    kilnd.relays.listen(socket);
    await once(kilnd.relays, 'listening');
    kilnd.#control = await ControlServer.listen(bench.stateDir, async (request) => {
      if (request.kind !== 'start') return { exitCode: 0, stdout: Buffer.alloc(0) };
      const relaySocket = bench.socketOf(request.id);
      return { exitCode: 0, stdout: Buffer.from(`unix://${relaySocket}`), relaySocket };
    });
    return kilnd;
  }

  #accept(socket: net.Socket): void {
    this.#sockets.add(socket);
    socket.on('error', () => {});
    let bytes = Buffer.alloc(0);
    const onData = (chunk: Buffer) => {
      bytes = Buffer.concat([bytes, chunk]);
      const parsed = parseRelayHeader(bytes);
      if (parsed === undefined) return;
      socket.off('data', onData);
      socket.pause();
      if (parsed.rest.length > 0) socket.unshift(parsed.rest);
      if (parsed.header.role === 'keeper') {
        const keeper = new FakeKeeper(socket, parsed.header);
        if (this.welcomes) keeper.say('welcome');
        this.keepers.push(keeper);
      } else {
        this.sessions.push(new FakeSession(socket, parsed.header));
      }
      socket.resume();
    };
    socket.on('data', onData);
  }

  /** A death that the next life follows at once. */
  drop(): void {
    for (const socket of this.#sockets) socket.destroy();
    this.#sockets.clear();
  }

  /** As the kernel does it for a process that is killed: what was sent arrives, then every connection ends. */
  async die(): Promise<void> {
    this.relays.close();
    await this.#control?.close();
    for (const socket of this.#sockets) socket.destroySoon();
  }
}

export class RelayBench extends Installation {
  readonly #relays = new Set<number>();
  readonly #clients: Frames[] = [];
  readonly #starts = net.createServer({ allowHalfOpen: true });
  /** Each `bin/kilnd` that a relay starts: what is written to it goes to its ready pipe, and its end is its end. */
  readonly starts = new Queue<net.Socket>();

  constructor(compiled: string) {
    super(compiled);
    mkdirSync(this.stateDir, { mode: 0o711 });
    mkdirSync(path.join(this.stateDir, 's'));
    const socket = path.join(this.folder, 'starts');
    this.#starts.on('connection', (start) => this.starts.push(start.on('error', () => {})));
    this.#starts.listen(socket);
    this.installKilnd(
      [
        `#!${process.execPath}`,
        "import { connect } from 'node:net';",
        "import { writeSync } from 'node:fs';",
        `const test = connect(${JSON.stringify(socket)});`,
        "test.on('data', (said) => writeSync(3, said)).on('end', () => process.exit(1)).on('error', () => process.exit(1));",
      ].join('\n'),
    );
  }

  socketOf(id: string): string {
    return path.join(this.stateDir, 's', id);
  }

  /** The launcher's `start`; resolves when the relay has reached kilnd. */
  async startRelay(kilnd: FakeKilnd, id = 'one'): Promise<FakeKeeper> {
    const outcome = await this.launch(['-namespace', 'default', '-address', '/run/c.sock', '-id', id, 'start']);
    if (outcome.text !== `unix://${this.socketOf(id)}`) throw new Error(`the launcher said ${outcome.text}`);
    const keeper = await kilnd.keepers.next();
    this.#relays.add(keeper.header.relayPid);
    return keeper;
  }

  /** A connection of containerd. */
  async dial(id = 'one'): Promise<Frames> {
    const socket = net.connect(this.socketOf(id));
    await once(socket, 'connect');
    const client = new Frames(socket);
    this.#clients.push(client);
    return client;
  }

  override [Symbol.dispose](): void {
    for (const { socket } of this.#clients) socket.destroy();
    for (const pid of this.#relays) kill(pid);
    this.#starts.close();
    super[Symbol.dispose]();
  }
}

/** Resolves when a process that is not our child has ended; the kernel has no event for that. */
export async function gone(pid: number): Promise<void> {
  while (isAlive(pid) && !/^State:\tZ/m.test(readOrEmpty(`/proc/${pid}/status`))) await delay(2);
}

function readOrEmpty(file: string): string {
  try {
    return readFileSync(file, 'utf8');
  } catch {
    return '';
  }
}

/** Bytes that are the process's alone. */
export function privateBytes(pid: number): number {
  const rollup = readFileSync(`/proc/${pid}/smaps_rollup`, 'utf8');
  return [...rollup.matchAll(/^Private_(?:Clean|Dirty): +(\d+) kB$/gm)].reduce(
    (sum, [, kib]) => sum + Number(kib) * 1024,
    0,
  );
}
