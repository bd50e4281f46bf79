import { execFileSync, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { closeSync, existsSync, fstatSync, mkdtempSync, readFileSync, rmSync, writeSync } from 'node:fs';
import { connect } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { bytesInPipe, pipe2 } from '../../../src/sys/pipe.ts';
import { duplicate, setWindowSize, socketFromDevice } from '../../../src/sys/terminal.ts';
import { listenForPeers, receiveFd } from '../../../src/sys/unix-fd.ts';
import { compileFakeConsole } from '../agent/agent.ts';
import { hasGcc } from '../native/harness.ts';

let directory: string;
const opened: number[] = [];
beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'kiln-fd-'));
});
afterEach(() => {
  for (const fd of opened.splice(0)) closeSync(fd);
  rmSync(directory, { recursive: true });
});

function listen(): { path: string; listener: number } {
  const path = join(directory, 'socket');
  const listener = listenForPeers(path);
  opened.push(listener);
  return { path, listener };
}

describe('a descriptor that another process sends', () => {
  it('is not there before somebody has sent it', () => {
    const { path, listener } = listen();
    expect(existsSync(path)).toBe(true);
    expect(() => receiveFd(listener)).toThrow(expect.objectContaining({ code: 'EAGAIN', syscall: 'accept4' }));
  });

  it('is not there while somebody has connected and sends nothing', async () => {
    const { path, listener } = listen();
    const socket = connect(path);
    await once(socket, 'connect');
    expect(() => receiveFd(listener)).toThrow(expect.objectContaining({ code: 'EAGAIN', syscall: 'recvmsg' }));
    socket.destroy();
  });

  it('is missed in a message that has none, and in a connection that was closed', async () => {
    const { path, listener } = listen();
    const talker = connect(path);
    await new Promise((written) => talker.write('just text', written));
    expect(() => receiveFd(listener)).toThrow('a message came without a file descriptor');
    talker.on('error', () => {});
    const silent = connect(path);
    silent.end();
    await once(silent, 'finish');
    expect(() => receiveFd(listener)).toThrow('a message came without a file descriptor');
    for (const socket of [talker, silent]) socket.destroy();
  });

  it('cannot be sent to a path that is too long, in use, or in no directory', () => {
    expect(() => listenForPeers(join(directory, 'x'.repeat(108)))).toThrow(/is too long/);
    const { path } = listen();
    expect(() => listenForPeers(path)).toThrow(expect.objectContaining({ code: 'EADDRINUSE', path }));
    expect(() => listenForPeers(join(directory, 'no/such'))).toThrow(expect.objectContaining({ code: 'ENOENT' }));
  });

  it.skipIf(!hasGcc)('can be received when the sender has gone, and is not inherited', () => {
    const program = join(directory, 'fake-console');
    compileFakeConsole(program);
    const { path, listener } = listen();
    execFileSync(program, [path, 'true']);
    const master = receiveFd(listener);
    opened.push(master);
    expect(fstatSync(master).isCharacterDevice()).toBe(true);
    const flags = /^flags:\s+(\d+)$/m.exec(readFileSync(`/proc/self/fdinfo/${master}`, 'utf8'))?.[1];
    // O_CLOEXEC of open(2).
    expect(Number.parseInt(flags ?? '0', 8) & 0o2000000).not.toBe(0);
  });
});

describe.skipIf(!hasGcc)('a terminal', () => {
  /** A program that has a terminal, and the terminal's master. */
  function terminal(script: string): number {
    const program = join(directory, 'fake-console');
    compileFakeConsole(program);
    const { path, listener } = listen();
    execFileSync(program, [path, 'sh', '-c', script]);
    const master = receiveFd(listener);
    opened.push(master);
    return master;
  }

  it('has the size that is set, in columns and rows, as its program sees it', async () => {
    const master = terminal('read -r line; stty size');
    setWindowSize(master, 132, 43);
    writeSync(master, 'go\n');
    const reader = socketFromDevice(duplicate(master), 'read');
    let output = '';
    reader.on('data', (data) => {
      output += data;
    });
    // EIO is how the end of a terminal looks.
    const [error] = await once(reader, 'error');
    expect(error).toMatchObject({ code: 'EIO' });
    expect(output).toBe('go\r\n43 132\r\n');
  });

  it('can be read into memory of our own, and written as a stream', async () => {
    const master = terminal('stty -echo; echo ready; read -r line; echo "got $line"');
    let output = '';
    const memory = Buffer.alloc(4096);
    const ready = Promise.withResolvers<void>();
    const reader = socketFromDevice(duplicate(master), 'read', {
      buffer: () => memory,
      callback: (length) => {
        output += memory.toString('utf8', 0, length);
        ready.resolve();
        return true;
      },
    });
    // 'close' follows the error that is the end; `once` would take that for one.
    reader.on('error', () => {});
    const closed = new Promise((resolve) => reader.on('close', resolve));
    reader.resume();
    await ready.promise;
    const writer = socketFromDevice(duplicate(master), 'write');
    writer.write('a line\n');
    await closed;
    writer.destroy();
    expect(output).toBe('ready\r\ngot a line\r\n');
  });

  it('is all that has a size', () => {
    const pipe = pipe2();
    opened.push(pipe.read, pipe.write);
    expect(() => setWindowSize(pipe.read, 80, 24)).toThrow(expect.objectContaining({ code: 'ENOTTY' }));
    expect(() => duplicate(99_999)).toThrow(expect.objectContaining({ code: 'EBADF', syscall: 'fcntl' }));
  });
});

it('a duplicate is the same open file, and lives on by itself', () => {
  const pipe = pipe2();
  opened.push(pipe.read);
  const copy = duplicate(pipe.write);
  closeSync(pipe.write);
  writeSync(copy, 'still open');
  expect(bytesInPipe(pipe.read)).toBe(10);
  closeSync(copy);
});

it('bytes in a pipe can be counted without being read', () => {
  const pipe = pipe2();
  opened.push(pipe.read);
  expect(bytesInPipe(pipe.read)).toBe(0);
  writeSync(pipe.write, Buffer.alloc(65536));
  expect(bytesInPipe(pipe.read)).toBe(65536);
  closeSync(pipe.write);
  expect(bytesInPipe(pipe.read)).toBe(65536);
  expect(spawnSync('head', ['-c', '36'], { stdio: [pipe.read, 'pipe', 'inherit'] }).stdout.length).toBe(36);
  expect(() => bytesInPipe(99_999)).toThrow(expect.objectContaining({ code: 'EBADF', syscall: 'ioctl' }));
});
