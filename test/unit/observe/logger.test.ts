import { mkdirSync, mkdtempSync, readFileSync, renameSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { KilnError } from '../../../src/errors.ts';
import { LogFile } from '../../../src/observe/log-file.ts';
import { createLogger, loggerTo } from '../../../src/observe/logger.ts';
import { TaskLog } from '../../../src/observe/task-log.ts';

let folder: string;

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'kiln-log-'));
});

afterEach(() => {
  rmSync(folder, { recursive: true });
});

const linesOf = (path: string): Record<string, unknown>[] =>
  readFileSync(path, 'utf8')
    .trimEnd()
    .split('\n')
    .map((line) => JSON.parse(line) as Record<string, unknown>);

describe('the daemon log', () => {
  test('has one JSON object a line, on disk as soon as it is logged', () => {
    using log = createLogger({ stateDir: folder, level: 'info' });
    log.logger.debug('not this');
    log.logger.info({ container: 'c1' }, 'started');
    expect(log.path).toBe(join(folder, 'kilnd.log'));
    expect(linesOf(log.path)).toEqual([
      { level: 'info', time: expect.stringMatching(/^\d{4}-.*Z$/), pid: process.pid, container: 'c1', msg: 'started' },
    ]);
  });

  test('tells an error with its code and its cause', () => {
    using log = createLogger({ stateDir: folder, level: 'info' });
    log.logger.error(new KilnError('not-found', 'no kernel', { cause: new Error('ENOENT') }));
    expect(linesOf(log.path)[0]).toMatchObject({
      err: { code: 'not-found', message: expect.stringContaining('ENOENT') },
      msg: 'no kernel',
    });
  });

  test.each([
    ['info', 'info', ['info', 'warn', 'error'], ['info', 'warning', 'error']],
    ['info', 'debug', ['info', 'warn', 'error'], ['debug', 'info', 'warning', 'error']],
    ['trace', 'debug', ['trace', 'debug', 'info', 'warn', 'error'], ['debug', 'info', 'warning', 'error']],
    ['debug', 'warning', ['debug', 'info', 'warn', 'error'], ['warning', 'error']],
    ['warn', 'info', ['warn', 'error'], ['warning', 'error']],
  ] as const)("at level %s, of a task at containerd's level %s", (level, taskLevel, inFile, inTaskLog) => {
    const fifo = join(folder, 'log');
    writeFileSync(fifo, '');
    using log = createLogger({ stateDir: folder, level });
    using taskLog = new TaskLog(folder, 'c1');
    const logger = log.forTask(taskLog, taskLevel);
    for (const name of ['trace', 'debug', 'info', 'warn', 'error'] as const) logger[name]('said');
    expect(linesOf(log.path).map((line) => line.level)).toEqual(inFile);
    expect(
      Array.from(readFileSync(fifo, 'utf8').matchAll(/level=(\w+) msg=said id=c1\n/g), ([, name]) => name),
    ).toEqual(inTaskLog);
  });

  test("tells each task what its own loggers and their children say, an error's causes with it", () => {
    using log = createLogger({ stateDir: folder, level: 'info' });
    const tasks = ['one', 'two'].map((name) => {
      const bundle = join(folder, name);
      mkdirSync(bundle);
      writeFileSync(join(bundle, 'log'), '');
      return { said: () => readFileSync(join(bundle, 'log'), 'utf8'), log: new TaskLog(bundle, name) };
    });
    const [one, two] = tasks.map((task) =>
      log.forTask(task.log, 'info').child({ namespace: 'n' }).child({ execId: 'e' }),
    );
    one?.warn({ err: new Error('no room', { cause: new Error('ENOSPC') }) }, 'not written down');
    two?.info('up');
    log.logger.info('nobody hears');
    for (const task of tasks) task.log.close();
    expect(tasks.map(({ said }) => said().replace(/^time=\S+ /, ''))).toEqual([
      'level=warning msg="not written down: no room: ENOSPC" id=one\n',
      'level=info msg=up id=two\n',
    ]);
    expect(linesOf(log.path).map(({ msg, namespace, execId }) => [msg, namespace, execId])).toEqual([
      ['not written down', 'n', 'e'],
      ['up', 'n', 'e'],
      ['nobody hears', undefined, undefined],
    ]);
  });

  test('never has an environment in it', () => {
    const lines: string[] = [];
    const logger = loggerTo({ write: (line) => lines.push(line) }, 'info');
    logger.info({ env: ['A=secret'] }, 'one');
    logger.info({ process: { env: ['A=secret'], args: ['sh'] } }, 'two');
    logger.info({ request: { spec: { process: { env: ['A=secret'] } } } }, 'three');
    expect(lines).toHaveLength(3);
    expect(lines.join('')).not.toContain('secret');
    expect(lines[1]).toContain('"args":["sh"]');
  });

  test('goes on in a new file after a rotation', () => {
    using log = createLogger({ stateDir: folder, level: 'info' });
    log.logger.info('before');
    renameSync(log.path, `${log.path}.1`);
    log.logger.info('between');
    log.reopen();
    log.logger.info('after');
    expect(linesOf(`${log.path}.1`).map(({ msg }) => msg)).toEqual(['before', 'between']);
    expect(linesOf(log.path).map(({ msg }) => msg)).toEqual(['after']);
  });

  test('survives a full disk', () => {
    symlinkSync('/dev/full', join(folder, 'kilnd.log'));
    using log = createLogger({ stateDir: folder, level: 'info' });
    expect(() => log.logger.info('lost')).not.toThrow();
  });
});

describe('LogFile', () => {
  test('tells how many lines were lost once there is room again', () => {
    const path = join(folder, 'log');
    symlinkSync('/dev/full', path);
    using file = new LogFile(path, (dropped) => `lost ${dropped}`);
    file.write('one\n');
    file.write('two\n');
    expect(file.dropped).toBe(2);
    rmSync(path);
    file.reopen();
    file.write('three\n');
    expect(file.dropped).toBe(0);
    expect(readFileSync(path, 'utf8')).toBe('lost 2\nthree\n');
  });

  test('keeps the open file when it cannot be opened anew', () => {
    const path = join(folder, 'log');
    using file = new LogFile(path, String);
    const moved = `${path}.1`;
    renameSync(path, moved);
    symlinkSync(join(folder, 'none', 'log'), path);
    expect(() => file.reopen()).toThrow('ENOENT');
    file.write('kept\n');
    expect(readFileSync(moved, 'utf8')).toBe('kept\n');
  });

  test('drops what is written after it was closed', () => {
    const file = new LogFile(join(folder, 'log'), String);
    file.close();
    file.close();
    file.write('late\n');
    expect(file.dropped).toBe(1);
  });
});
