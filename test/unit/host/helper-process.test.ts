import { mkdtempSync, readFileSync, readlinkSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest';
import { adoptHelper, type HelperOptions, type HelperProcess, startHelper } from '../../../src/host/helper-process.ts';
import { ProcessHandle } from '../../../src/sys/pidfd.ts';
import { waitpid } from '../../../src/sys/process.ts';

let directory: string;
let started: HelperProcess[];
beforeEach(() => {
  directory = mkdtempSync(path.join(tmpdir(), 'kiln-h'));
  started = [];
});
afterEach(async () => {
  for (const helper of started) await helper.kill();
  rmSync(directory, { recursive: true, force: true });
});

async function start(program: string, args: string[] = [], extra: Partial<HelperOptions> = {}): Promise<HelperProcess> {
  const helper = await startHelper({
    program,
    args,
    directory,
    logName: 'log',
    title: 'the program',
    hint: 'install it',
    ...extra,
  });
  started.push(helper);
  return helper;
}

const shell = (script: string, extra: Partial<HelperOptions> = {}) => start('sh', ['-c', script], extra);

/** Says so on fd 3 when it is ready, so that a test need not wait a while. */
async function readyShell(script: string): Promise<HelperProcess> {
  const helper = await shell(`${script}\nexec sleep 1000 3>&-`, { statusPipe: true });
  await helper.status;
  return helper;
}

describe('a helper', () => {
  test('leads a session of its own, in the root directory, with no descriptors but its own', async () => {
    const helper = await readyShell('');
    const stat = readFileSync(`/proc/${helper.pid}/stat`, 'utf8').replace(/^.*\) /, '');
    expect(stat.split(' ').slice(2, 4)).toEqual([String(helper.pid), String(helper.pid)]);
    expect(readlinkSync(`/proc/${helper.pid}/cwd`)).toBe('/');
    const fds = [0, 1, 2].map((fd) => readlinkSync(`/proc/${helper.pid}/fd/${fd}`));
    expect(fds).toEqual(['/dev/null', path.join(directory, 'log'), path.join(directory, 'log')]);
  });

  test('that ends while it is put into its control group keeps its pid until it is there', async () => {
    let stateInGroup = '';
    const add = async (pid: number) => {
      const state = () => readFileSync(`/proc/${pid}/stat`, 'utf8').replace(/^.*\) /, '')[0] ?? '';
      await vi.waitFor(() => expect(state()).toBe('Z'), { interval: 5 });
      await delay(50);
      stateInGroup = state();
    };
    const helper = await shell('exit 3', { controlGroup: { add } });
    expect(stateInGroup).toBe('Z');
    expect(await helper.exited).toEqual({ code: 3, signal: null });
  });

  test('is killed when it cannot be put into its control group', async () => {
    let pid = 0;
    const add = async (of: number) => {
      pid = of;
      await delay(10);
      throw new Error('no room');
    };
    await expect(shell('exec sleep 1000', { controlGroup: { add } })).rejects.toThrow('no room');
    expect(() => readFileSync(`/proc/${pid}/stat`)).toThrow();
  });

  test('gets nothing of kilnd’s environment but PATH, and the directory it works for', async () => {
    const helper = await readyShell('');
    const names = readFileSync(`/proc/${helper.pid}/environ`, 'utf8').split('\0').filter(Boolean);
    expect(names.filter((it) => !it.startsWith('PWD=')).sort()).toEqual([
      `KILN_SANDBOX_DIR=${directory}`,
      `PATH=${process.env.PATH}`,
    ]);
  });

  test('does not inherit the protection from the OOM killer', async () => {
    const helper = await readyShell('');
    expect(readFileSync(`/proc/${helper.pid}/oom_score_adj`, 'utf8').trim()).toBe('0');
  });

  test('tells its exit code', async () => {
    expect(await (await shell('exit 7')).exited).toEqual({ code: 7, signal: null });
  });

  test('tells the signal that ended it', async () => {
    expect(await (await shell('kill -TERM $$')).exited).toEqual({ code: null, signal: 'SIGTERM' });
  });

  test('is gone when kill resolves, also for a second and a late caller', async () => {
    const helper = await readyShell('trap "" TERM INT HUP');
    const kills = [helper.kill(), helper.kill()];
    await kills[1];
    expect(() => process.kill(helper.pid, 0)).toThrow(/ESRCH/);
    await kills[0];
    await helper.kill();
    expect(await helper.exited).toEqual({ code: null, signal: 'SIGKILL' });
  });

  test('reports on its status pipe until it closes that', async () => {
    const helper = await shell('printf "one " >&3; printf two >&3; exec sleep 1000 3>&-', { statusPipe: true });
    expect(await helper.status).toBe('one two');
  });

  test('has reported what it wrote before it died with its status pipe open', async () => {
    const helper = await shell('printf "half" >&3; kill -9 $$', { statusPipe: true });
    expect(await helper.status).toBe('half');
    expect(await (await shell('exit')).status).toBe('');
  });
});

describe('the last words', () => {
  test('are the last five lines of stdout and stderr', async () => {
    const helper = await shell('for i in 1 2 3; do echo out $i; echo err $i >&2; done; exit 1');
    await helper.exited;
    expect(helper.lastWords()).toBe('err 1; out 2; err 2; out 3; err 3');
  });

  test('are those of the last start, not of one before', async () => {
    await (await shell('echo old')).exited;
    const helper = await shell('echo new');
    await helper.exited;
    expect(helper.lastWords()).toBe('new');
  });

  test('stay short when the log is long', async () => {
    const helper = await shell('head -c 1000000 /dev/zero | tr "\\0" x; echo; echo end');
    await helper.exited;
    expect(helper.lastWords()).toMatch(/^x{2043}; end$/);
  });

  test('come from a log that is cut to its end each time it is long', async () => {
    const log = path.join(directory, 'log');
    // It goes on when the file was cut and its end written back; a line in between would come before that end.
    const helper = await shell(`
      for round in 1 2 3; do
        head -c 2000000 /dev/zero | tr "\\0" x; echo
        while size=$(stat -c %s ${log}); [ "$size" -gt 1048576 ] || [ "$size" -lt 65536 ]; do sleep 0.01; done
        echo "end of $round"
      done`);
    await helper.exited;
    expect(helper.lastWords()).toMatch(/end of 3$/);
    // The loop went on at the limit at the latest.
    expect(statSync(log).size).toBeLessThan((1 << 20) + 100);
  });

  test('are empty without output, and when the directory is gone', async () => {
    const helper = await shell('');
    await helper.exited;
    expect(helper.lastWords()).toBe('');
    rmSync(directory, { recursive: true });
    expect(helper.lastWords()).toBe('');
  });

  test('are for root’s eyes only', async () => {
    await (await shell('echo secret')).exited;
    expect(statSync(path.join(directory, 'log')).mode & 0o777).toBe(0o600);
  });
});

describe('a program that cannot be run', () => {
  const refused = (program: string, code: string) => ({
    code: 'failed-precondition',
    message: `cannot run the program "${program}": ${code}`,
    hint: 'install it',
  });

  test('is named when it is not there, by path or by name', async () => {
    await expect(start('/no/such/program')).rejects.toMatchObject(refused('/no/such/program', 'ENOENT'));
    await expect(start('no-such-program')).rejects.toMatchObject(refused('no-such-program', 'ENOENT'));
  });

  test('is named when it is no program', async () => {
    const file = path.join(directory, 'file');
    writeFileSync(file, 'just text');
    await expect(start(file)).rejects.toMatchObject(refused(file, 'EACCES'));
    await expect(start(directory)).rejects.toMatchObject(refused(directory, 'EACCES'));
  });

  test('is named when its arguments are too long', async () => {
    await expect(start('true', ['x'.repeat(1 << 22)])).rejects.toMatchObject(refused('true', 'E2BIG'));
  });
});

test('a helper that kilnd has no descriptor for is ended, since nobody would know it', async () => {
  let pid = 0;
  const open = vi.spyOn(ProcessHandle, 'open').mockImplementation((opened) => {
    pid = opened;
    throw new Error('EMFILE');
  });
  try {
    await expect(start('sleep', ['1000'])).rejects.toThrow('EMFILE');
  } finally {
    open.mockRestore();
  }
  // Dead, and a zombie of this process.
  await vi.waitFor(() => expect(readFileSync(`/proc/${pid}/stat`, 'utf8')).toMatch(/\) Z /));
  waitpid(pid);
});

describe('a helper that is taken over', () => {
  const adopt = (helper: HelperProcess) => adoptHelper(helper.identity!, { directory, logName: 'log' });

  test('is the same process, whose last words and end are known, though not how it ended', async () => {
    const helper = await readyShell('echo words');
    const adopted = adopt(helper);
    expect(adopted?.pid).toBe(helper.pid);
    expect(adopted?.identity).toEqual(helper.identity);
    expect(adopted?.lastWords()).toBe('words');
    await adopted?.kill();
    expect(await adopted?.exited).toEqual({ code: null, signal: null });
    expect((await helper.exited).signal).toBe('SIGKILL');
    await adopted?.kill();
  });

  test('that has ended is none', async () => {
    const helper = await readyShell('');
    await helper.kill();
    expect(adopt(helper)).toBeUndefined();
  });

  test('whose pid is another process’s by now is none, and that one lives on', async () => {
    const helper = await readyShell('');
    for (const other of [{ startTime: '1' }, { bootId: 'another boot' }]) {
      expect(adoptHelper({ ...helper.identity!, ...other }, { directory, logName: 'log' })).toBeUndefined();
    }
    process.kill(helper.pid, 0);
  });
});
