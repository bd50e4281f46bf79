import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdirSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { type HelperProcess, startHelper } from '../../../src/host/helper-process.ts';
import { killProcessesOf } from '../../../src/host/stale.ts';

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
