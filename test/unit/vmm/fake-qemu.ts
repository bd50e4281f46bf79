/**
 * Plays QEMU: notes its arguments in a file beside itself and does what the mode says. It runs as a process of its own,
 * under the driver's eyes: everything but the machine is real.
 */
import { appendFileSync, existsSync, readFileSync } from 'node:fs';
import { connect, createServer, type Socket } from 'node:net';
import { createInterface } from 'node:readline';

/** All that this QEMU knows of a VM beside its memory: longer than what fits a socket at once. */
export const savedState = Buffer.alloc(500_000, 'QEVM\0\xff\n');

const cidInUse =
  'qemu-system-x86_64: -device vhost-vsock-device: vhost-vsock: unable to set guest cid: Address already in use';

export function main(mode: string, self: string): void {
  const args = process.argv.slice(2);
  const startsFile = `${self}.starts`;
  appendFileSync(startsFile, `${JSON.stringify(args)}\n`);
  const starts = readFileSync(startsFile, 'utf8').split('\n').length - 1;
  const [name, detail = ''] = mode.split('=');
  const serial = answerOnSerialPort(args, detail === 'deaf');
  switch (name) {
    case 'exit':
      end('qemu-system-x86_64: cannot set up guest memory', 1);
      break;
    case 'no-plugins':
      if (args.includes('-plugin')) end('qemu-system-x86_64: Could not load plugin /it.so: no such interface', 1);
      else answer(args, (socket) => serve(socket, { status: 'running' }));
      break;
    case 'cid-in-use':
      // The first N starts fail.
      if (starts <= Number(detail)) end(cidInUse, 1);
      else answer(args, (socket) => serve(socket, { status: 'running' }));
      break;
    case 'close':
      // As real QEMU does: the control connection is gone before the process.
      answer(args, (socket) => {
        socket.end();
        socket.once('close', () => end('qemu-system-x86_64: too late to say', 1));
        socket.resume();
      });
      break;
    case 'rubbish':
      answer(args, (socket) => socket.write('220 mail.example.org ESMTP\n'));
      break;
    case 'silent':
      answer(args, (socket) => socket.resume());
      break;
    case 'idle':
      setInterval(() => {}, 1 << 30);
      break;
    default:
      answer(args, (socket) => serve(socket, { status: name ?? '', detail, serial }), 'go on listening');
  }
}

interface SerialPort {
  /** Those that are there. */
  readonly hosts: ReadonlySet<Socket>;
  /** The agent runs, if it did not before. */
  readonly run: () => void;
}

/** The agent at the virtio-serial port, if there is one: answers each host that comes after what it has left behind. */
function answerOnSerialPort(args: string[], deaf: boolean): SerialPort {
  const hosts = new Set<Socket>();
  const { promise: running, resolve: run } = Promise.withResolvers<void>();
  if (!args.includes('-incoming')) run();
  const fd = /id=agent,fd=(\d+)/.exec(args.join(' '))?.[1];
  if (fd === undefined) return { hosts, run };
  createServer((socket) => {
    hosts.add(socket);
    socket.on('close', () => hosts.delete(socket));
    socket.on('error', () => {});
    socket.once('data', (said) => {
      // It may have been said again already.
      const [line] = String(said).split('\n');
      if (!deaf) void running.then(() => socket.write(`left behind${line}\nhello`));
    });
  }).listen({ fd: Number(fd) });
  return { hosts, run };
}

function end(words: string, code: number): void {
  process.stderr.write(`${words}\n`);
  process.exitCode = code;
}

/** Takes the first connection on the listening descriptor that it was given, or all, as real QEMU one after the other. */
function answer(args: string[], use: (socket: Socket) => void, then?: 'go on listening'): void {
  const chardev = args.find((arg) => arg.startsWith('socket,id=qmp,')) ?? '';
  const fd = Number(/fd=(\d+)/.exec(chardev)?.[1]);
  const server = createServer((socket) => {
    if (then === undefined) server.close();
    use(socket);
  }).listen({ fd });
}

/** What a test has written into the file beside the program since. */
function statusNow(): string | undefined {
  const file = `${process.argv[1]}.status`;
  return existsSync(file) ? readFileSync(file, 'utf8') : undefined;
}

/** Leaves a word beside the program: as a file for who waits for it, or as a line of what was said. */
function note(name: string, line = ''): void {
  appendFileSync(`${process.argv[1]}.${name}`, line);
}

interface Vm {
  /** What query-status says. */
  readonly status: string;
  /** What goes wrong. */
  readonly detail?: string;
  readonly serial?: SerialPort;
}

/** Answers every command. */
function serve(socket: Socket, vm: Vm): void {
  socket.on('error', () => {});
  const send = (message: object) => socket.write(`${JSON.stringify(message)}\n`);
  const migration = new Migration(vm, (event) => {
    note('commands', `${JSON.stringify(event)}\n`);
    send(event);
  });
  send({ QMP: { version: {}, capabilities: [] } });
  const lines = createInterface({ input: socket });
  // It repeats the socket's.
  lines.on('error', () => {});
  lines.on('line', (line) => {
    note('commands', `${line}\n`);
    const { execute, id, arguments: args } = JSON.parse(line);
    const accept = (answer: unknown = {}) => send({ return: answer, id });
    const refuse = (desc: string) => send({ error: { class: 'GenericError', desc }, id });
    if (execute === 'query-status') accept({ status: statusNow() ?? vm.status });
    else if (execute === 'ringbuf-read') accept('Kernel panic - not syncing\r\n');
    else if (execute === 'blockdev-reopen' && args.options[0].file === 'ro7-file') refuse('no reopen today');
    else if (execute === 'migrate-set-capabilities') {
      migration.capabilities = args.capabilities;
      accept();
    } else if (execute === 'migrate') {
      if (vm.detail === 'refuses') refuse("State blocked by non-migratable device 'vsock'");
      else migration.save(args.uri, accept);
    } else if (execute === 'migrate-incoming') {
      if (vm.detail === 'babbles') socket.write('220 mail.example.org ESMTP\n');
      else if (!process.argv.includes('defer')) refuse("'-incoming' was not specified on the command line");
      else migration.load(args.uri, accept, refuse);
    } else accept();
  });
}

/** Saving and restoring, in the order in which QEMU 7.2 does and says it; with `eleven`, of files what QEMU 11 says. */
class Migration {
  capabilities: readonly { capability: string; state: boolean }[] = [];
  readonly #vm: Vm;
  readonly #tell: (event: object) => void;
  #loads = false;

  constructor(vm: Vm, tell: (event: object) => void) {
    this.#vm = vm;
    this.#tell = tell;
  }

  #say(status: string): void {
    if (this.capabilities.some(({ capability, state }) => capability === 'events' && state)) {
      this.#tell({ event: 'MIGRATION', data: { status } });
    }
  }

  save(uri: string, accept: () => void): void {
    const { detail } = this.#vm;
    this.#say('setup');
    if (detail === 'reaches-nobody') {
      accept();
      this.#say('failed');
      return;
    }
    const connection = connect(uri.replace(/^unix:/, ''), () => {
      accept();
      this.#say('active');
      if (detail === undefined || detail === '') {
        connection.write(savedState, () => {
          this.#say('completed');
          connection.end();
        });
        return;
      }
      connection.write(savedState.subarray(0, 1000), () => {
        if (detail === 'stalls') note('stalled');
        if (detail === 'ends') process.exit(1);
        if (detail !== 'fails') return;
        this.#say('failed');
        connection.end();
      });
    });
    connection.on('error', () => {});
    connection.on('close', () => note('hung-up'));
    connection.resume();
  }

  load(uri: string, accept: () => void, refuse: (desc: string) => void): void {
    const { detail, serial } = this.#vm;
    const isEleven = detail === 'eleven';
    if (this.#loads || uri.startsWith(isEleven ? 'fd:' : 'file:')) {
      refuse(
        isEleven
          ? 'fd: migration to a file is not supported. Use file: instead.'
          : `unknown migration protocol: ${uri}`,
      );
      // After that, QEMU 11 is of no use any more.
      this.#loads ||= isEleven;
      return;
    }
    this.#loads = true;
    note('hosts-at-load', String(serial?.hosts.size));
    this.#say('setup');
    accept();
    this.#say('active');
    if (detail === 'stalls') note('stalled');
    else if (
      readFileSync(uri.startsWith('fd:') ? Number(uri.slice(3)) : uri.replace(/^file:/, '')).equals(savedState)
    ) {
      // It takes its time, so that whoever does not wait for it is early.
      setTimeout(() => {
        if (detail !== 'paused') this.#tell({ event: 'RESUME' });
        if (detail === 'panics') this.#tell({ event: 'GUEST_PANICKED' });
        this.#say('completed');
        serial?.run();
      }, 20);
    } else {
      this.#say('failed');
      process.stderr.write('qemu: Not a migration stream\nqemu: load of migration failed: Invalid argument\n');
      process.exit(1);
    }
  }
}
