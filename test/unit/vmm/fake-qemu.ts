/**
 * Plays QEMU: notes its arguments in a file beside itself and does what the mode says. It runs as a process of its own,
 * under the driver's eyes: everything but the machine is real.
 */
import { appendFileSync, existsSync, readFileSync } from 'node:fs';
import { createServer, type Socket } from 'node:net';
import { createInterface } from 'node:readline';

const cidInUse =
  'qemu-system-x86_64: -device vhost-vsock-device: vhost-vsock: unable to set guest cid: Address already in use';

export function main(mode: string, self: string): void {
  const args = process.argv.slice(2);
  const startsFile = `${self}.starts`;
  appendFileSync(startsFile, `${JSON.stringify(args)}\n`);
  const starts = readFileSync(startsFile, 'utf8').split('\n').length - 1;
  const [name, detail = ''] = mode.split('=');
  answerOnSerialPort(args, detail === 'deaf');
  switch (name) {
    case 'exit':
      end('qemu-system-x86_64: cannot set up guest memory', 1);
      break;
    case 'cid-in-use':
      // The first N starts fail.
      if (starts <= Number(detail)) end(cidInUse, 1);
      else answer(args, (socket) => serve(socket, 'running'));
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
      answer(args, (socket) => serve(socket, name ?? ''), 'go on listening');
  }
}

/** The agent at the virtio-serial port, if there is one: answers each host that comes after what it has left behind. */
function answerOnSerialPort(args: string[], deaf: boolean): void {
  const path = /id=agent,path=([^,]+)/.exec(args.join(' '))?.[1];
  if (path === undefined) return;
  createServer((socket) => {
    socket.on('error', () => {});
    socket.once('data', (line) => {
      if (!deaf) socket.write(`left behind${line}hello`);
    });
  }).listen(path);
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

/** Answers every command; `status` is what query-status says. */
function serve(socket: Socket, status: string): void {
  socket.on('error', () => {});
  const send = (message: object) => socket.write(`${JSON.stringify(message)}\n`);
  send({ QMP: { version: {}, capabilities: [] } });
  createInterface({ input: socket }).on('line', (line) => {
    const { execute, id, arguments: args } = JSON.parse(line);
    if (execute === 'query-status') send({ return: { status: statusNow() ?? status }, id });
    else if (execute === 'ringbuf-read') send({ return: 'Kernel panic - not syncing\r\n', id });
    else if (execute === 'blockdev-reopen' && args.options[0].file === 'ro7-file') {
      send({ error: { class: 'GenericError', desc: 'no reopen today' }, id });
    } else send({ return: {}, id });
    appendFileSync(`${process.argv[1]}.commands`, `${line}\n`);
  });
}
