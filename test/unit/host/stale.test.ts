import { spawn } from 'node:child_process';
import { once } from 'node:events';
import {
  closeSync,
  constants,
  mkdirSync,
  mkdtempSync,
  openSync,
  readFileSync,
  rmSync,
  writeFileSync,
  writeSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, expect, test, vi } from 'vitest';
import { type HelperProcess, startHelper } from '../../../src/host/helper-process.ts';
import { readLoggerRecords, writeLoggerRecord } from '../../../src/host/logger-record.ts';
import { killProcessesOf } from '../../../src/host/stale.ts';
import { Lines, stream } from '../../support/spawn.ts';

let folder: string;
let started: HelperProcess[];
beforeEach(() => {
  folder = mkdtempSync(path.join(tmpdir(), 'kiln-s'));
  started = [];
});
afterEach(async () => {
  for (const helper of started) await helper.kill();
  rmSync(folder, { recursive: true, force: true });
});

async function helperOf(directory: string): Promise<HelperProcess> {
  mkdirSync(directory, { recursive: true });
  const helper = await startHelper({
    program: 'sleep',
    args: ['1000'],
    directory,
    logName: 'log',
    title: 'sleep',
    hint: '',
  });
  started.push(helper);
  // It has its environment a moment after it runs.
  await vi.waitFor(() => expect(readFileSync(`/proc/${helper.pid}/environ`, 'utf8')).not.toBe(''), { interval: 1 });
  return helper;
}

const isAlive = (pid: number) => {
  try {
    process.kill(pid, 0);
    return true;
  } catch {
    return false;
  }
};

test('the helpers of every sandbox below a folder are ended', async () => {
  const helpers = [
    await helperOf(`${folder}/c/one`),
    await helperOf(`${folder}/c/one`),
    await helperOf(`${folder}/c/2`),
  ];
  const killed = await killProcessesOf(`${folder}/c`);
  expect([...killed].sort()).toEqual(helpers.map(({ pid }) => pid).sort());
  for (const helper of helpers) expect(await helper.exited).toEqual({ code: null, signal: 'SIGKILL' });
  expect(await killProcessesOf(`${folder}/c`)).toEqual([]);
});

test('the helpers of another Kiln live on, also where its folder begins with the same letters', async () => {
  const others = [await helperOf(`${folder}/c2/one`), await helperOf(`${folder}/other/c/one`)];
  expect(await killProcessesOf(`${folder}/c`)).toEqual([]);
  for (const { pid } of others) expect(isAlive(pid)).toBe(true);
});

test('a process that only has a sandbox’s file open or among its arguments lives on', async () => {
  await helperOf(`${folder}/c/one`);
  const reader = spawn('tail', ['-f', `${folder}/c/one/log`], { stdio: 'ignore' });
  await once(reader, 'spawn');
  try {
    expect(await killProcessesOf(`${folder}/c`)).toHaveLength(1);
    expect(isAlive(reader.pid!)).toBe(true);
  } finally {
    reader.kill();
    await once(reader, 'exit');
  }
});

test('a helper that has become another program is found just the same', async () => {
  const directory = `${folder}/c/one`;
  mkdirSync(directory, { recursive: true });
  const helper = await startHelper({
    program: 'sh',
    args: ['-c', 'exec 3>&- sleep 1000'],
    directory,
    logName: 'log',
    title: 'sh',
    hint: '',
    statusPipe: true,
  });
  started.push(helper);
  await helper.status;
  expect(await killProcessesOf(`${folder}/c`)).toEqual([helper.pid]);
});

/** Another process that has a container's stdio open towards a logger, as kilnd has. It says when. */
function startOwner(directory: string, logger: string) {
  const stdio = path.resolve(import.meta.dirname, '../../../src/shim/stdio.ts');
  const script = `
    const { openStdio } = await import(${JSON.stringify(stdio)});
    const uri = 'binary://' + ${JSON.stringify(logger)};
    const paths = { stdin: '', stdout: uri, stderr: uri, terminal: false };
    const stdio = await openStdio(paths, { id: 'c1', namespace: 'default', directory: ${JSON.stringify(directory)} });
    stdio.stdout.write('before ', () => console.log('open'));
    setInterval(() => {}, 1000);`;
  return stream(process.execPath, ['--no-warnings', '--input-type=module', '-e', script]);
}

function makeLogger(script: string): string {
  const file = `${folder}/logger`;
  writeFileSync(file, `#!/bin/sh\nexec 5>&-\n${script}\n`, { mode: 0o755 });
  return file;
}

test('a logger outlives a kilnd that is killed, reads on, and is ended after it has read all', async () => {
  const directory = `${folder}/c/one/execs/two`;
  mkdirSync(directory, { recursive: true });
  await using owner = startOwner(directory, makeLogger(`cat <&3 >${folder}/out; exit 0`));
  await new Lines(owner.stdout).waitFor((line) => line === 'open', 'open');
  const [logger] = readLoggerRecords(`${folder}/c`);
  // As the relay does.
  const held = ['stdout', 'stderr'].map((name) => openSync(`${directory}/logger-${name}`, constants.O_RDWR));
  owner.kill('SIGKILL');
  await owner.exit;
  const writer = openSync(`${directory}/logger-stdout`, constants.O_WRONLY | constants.O_NONBLOCK);
  writeSync(writer, 'after');
  expect(isAlive(logger!.pid)).toBe(true);
  const killed = killProcessesOf(`${folder}/c`);
  for (const fd of [...held, writer]) closeSync(fd);
  expect(await killed).toEqual([logger!.pid]);
  expect(readFileSync(`${folder}/out`, 'utf8')).toBe('before after');
});

test('a logger that ends neither with its streams nor by SIGTERM is killed', async () => {
  const directory = `${folder}/c/one`;
  mkdirSync(directory, { recursive: true });
  await using owner = startOwner(directory, makeLogger('trap "" TERM; while :; do sleep 1000; done'));
  await new Lines(owner.stdout).waitFor((line) => line === 'open', 'open');
  owner.kill('SIGKILL');
  await owner.exit;
  const [logger] = readLoggerRecords(`${folder}/c`);
  expect(await killProcessesOf(`${folder}/c`, 100)).toContain(logger!.pid);
  expect(await killProcessesOf(`${folder}/c`)).toEqual([]);
});

test('a process that has the pid of a logger of before lives on', async () => {
  const directory = `${folder}/c/one`;
  mkdirSync(directory, { recursive: true });
  const stranger = spawn('sleep', ['1000'], { stdio: 'ignore', detached: true });
  await once(stranger, 'spawn');
  try {
    writeLoggerRecord(directory, stranger.pid!);
    const file = `${directory}/logger.json`;
    const record = JSON.parse(readFileSync(file, 'utf8')) as Record<string, unknown>;
    for (const other of [{ startTime: '1' }, { bootId: 'another boot' }]) {
      writeFileSync(file, JSON.stringify({ ...record, ...other }));
      expect(await killProcessesOf(`${folder}/c`)).toEqual([]);
    }
    for (const broken of ['', '{"pid":', '{"pid":-1}', 'null']) {
      writeFileSync(file, broken);
      expect(await killProcessesOf(`${folder}/c`)).toEqual([]);
    }
    expect(isAlive(stranger.pid!)).toBe(true);
    writeFileSync(file, JSON.stringify(record));
    expect(await killProcessesOf(`${folder}/c`, 100)).toEqual([stranger.pid]);
  } finally {
    stranger.kill('SIGKILL');
  }
});
