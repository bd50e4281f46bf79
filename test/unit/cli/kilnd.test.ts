import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, mkdtempSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import { connect } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { Readable } from 'node:stream';
import { text } from 'node:stream/consumers';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { kilnVersion } from '../../../src/version.ts';
import { distBin } from '../../support/paths.ts';

// kilnd and kiln as they are installed: `scripts/build` has made them.

let directory: string;
let stateDir: string;
let started: ChildProcess[];
beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'kiln-d-'));
  stateDir = join(directory, 'state');
  started = [];
});
afterEach(async () => {
  for (const child of started) {
    if (child.exitCode !== null || child.signalCode !== null) continue;
    child.kill('SIGKILL');
    await once(child, 'exit');
  }
  rmSync(directory, { recursive: true, force: true });
});

interface Kilnd {
  readonly child: ChildProcess;
  /** All that was said on the ready pipe. */
  readonly said: Promise<string>;
  readonly stderr: Promise<string>;
  readonly ended: Promise<number | NodeJS.Signals>;
}

function environment(extra: NodeJS.ProcessEnv): NodeJS.ProcessEnv {
  return {
    PATH: process.env.PATH,
    KILN_STATE_DIR: stateDir,
    KILN_CACHE_DIR: join(directory, 'cache'),
    KILN_CONFIG: join(directory, 'config.toml'),
    ...extra,
  };
}

/** Starts kilnd as the launcher does, with a pipe on which it says that it is ready. */
function startKilnd(config = '', extra: NodeJS.ProcessEnv = {}): Kilnd {
  writeFileSync(join(directory, 'config.toml'), config);
  const child = spawn(join(distBin, 'kilnd'), [], {
    stdio: ['ignore', 'ignore', 'pipe', 'pipe'],
    env: environment({ KILN_READY_FD: '3', ...extra }),
  });
  started.push(child);
  return {
    child,
    said: text(child.stdio[3] as Readable),
    stderr: text(child.stderr as Readable),
    ended: once(child, 'exit').then(([code, signal]) => (code ?? signal) as number | NodeJS.Signals),
  };
}

/** The same, ready. */
async function running(config = '', extra: NodeJS.ProcessEnv = {}): Promise<Kilnd> {
  const kilnd = startKilnd(config, extra);
  expect(await kilnd.said).toBe('ready\n');
  return kilnd;
}

async function kiln(...args: string[]): Promise<{ code: number; stdout: string; stderr: string }> {
  const child = spawn(join(distBin, 'kiln'), args, { stdio: ['ignore', 'pipe', 'pipe'], env: environment({}) });
  const [stdout, stderr, [code]] = await Promise.all([text(child.stdout), text(child.stderr), once(child, 'exit')]);
  return { code: code as number, stdout, stderr };
}

function log(name = 'kilnd.log'): { level: string; msg: string }[] {
  const lines = readFileSync(join(stateDir, name), 'utf8').trim().split('\n');
  return lines.map((line) => JSON.parse(line) as { level: string; msg: string });
}

describe.skipIf(process.getuid?.() !== 0)('kilnd', () => {
  it('is ready when it says so, and leaves no socket when SIGTERM ends it', async () => {
    const { child, ended } = await running();
    const socket = connect(join(stateDir, 'kilnd.sock'));
    await once(socket, 'connect');
    socket.destroy();
    child.kill('SIGTERM');
    expect(await ended).toBe(0);
    expect(existsSync(join(stateDir, 'kilnd.sock'))).toBe(false);
    expect(log().map(({ msg }) => msg)).toEqual(['kilnd starts', 'stopping', 'stopped']);
  });

  it('has no timeline of a container that it has not started, and says so', async () => {
    await running();
    const { code, stdout, stderr } = await kiln('timeline', 'nobody', '--namespace', 'other');
    expect([code, stdout]).toEqual([1, '']);
    expect(stderr).toContain('kiln: kilnd knows no start of a container nobody in the namespace other');
    expect((await kiln('timeline', '../x')).stderr).toContain('field "id" must be');
    expect((await kiln('timeline', 'c1', '--json', '--html')).stderr).toContain("cannot be used with option '--html'");
  });

  it('with an unknown key in its configuration says which, and ends with 1', async () => {
    const { said, stderr, ended } = startKilnd('[vm]\nmemory_mb = 1\n');
    const message = await said;
    expect(message).toMatch(/^error: .*config\.toml: unknown key vm\.memory_mb = 1, did you mean memory_mib\?/);
    expect(await ended).toBe(1);
    expect(await stderr).toBe(`kilnd: ${message.slice('error: '.length)}`);
  });

  it('with a configuration file that is not there says so', async () => {
    const { said, ended } = startKilnd('', { KILN_CONFIG: join(directory, 'nowhere.toml') });
    expect(await said).toContain('nowhere.toml: no such configuration file');
    expect(await ended).toBe(1);
  });

  it('with a state folder that it cannot make says so', async () => {
    writeFileSync(join(directory, 'file'), '');
    const { said, ended } = startKilnd('', { KILN_STATE_DIR: join(directory, 'file/state') });
    expect(await said).toMatch(/^error: .*ENOTDIR/);
    expect(await ended).toBe(1);
  });

  it('with a state folder whose socket path would be too long says so', async () => {
    const { said, ended } = startKilnd('', { KILN_STATE_DIR: join(directory, 'x'.repeat(100)) });
    expect(await said).toMatch(/^error: the socket path .* the system's limit is 107/);
    expect(await ended).toBe(1);
  });

  it('refuses at once to be the second one of a state folder', async () => {
    await running();
    const second = startKilnd();
    expect(await second.said).toBe(
      `error: another kilnd runs with the state folder ${stateDir} (give this one a state folder of its own with KILN_STATE_DIR)\n`,
    );
    expect(await second.ended).toBe(1);
    expect((await kiln('status')).code).toBe(0);
  });

  it('is one, when many are started at once', async () => {
    const all = Array.from({ length: 4 }, () => startKilnd());
    const said = await Promise.all(all.map((kilnd) => kilnd.said));
    expect(said.filter((message) => message === 'ready\n').length).toBe(1);
    expect(said.filter((message) => message.startsWith('error: another kilnd runs')).length).toBe(3);
  });

  it('follows one that is just ending', async () => {
    const first = await running();
    first.child.kill('SIGTERM');
    const second = await running();
    expect(await first.ended).toBe(0);
    expect(JSON.parse((await kiln('status')).stdout).pid).toBe(second.child.pid);
  });

  it('follows one that was killed', async () => {
    const first = await running();
    first.child.kill('SIGKILL');
    await first.ended;
    const second = await running();
    expect(JSON.parse((await kiln('status')).stdout).pid).toBe(second.child.pid);
  });

  it('ends by itself when it has nothing to do', async () => {
    const { ended } = await running('[daemon]\nidle_timeout_s = 1\n');
    expect(await ended).toBe(0);
    expect(log().map(({ msg }) => msg)).toContain('idle for long enough');
  });

  it('opens its log anew at SIGHUP, and lives on', async () => {
    const { child, ended } = await running();
    renameSync(join(stateDir, 'kilnd.log'), join(stateDir, 'kilnd.log.1'));
    child.kill('SIGHUP');
    // Whoever is answered after the signal is answered by a kilnd that has handled it.
    await kiln('status');
    child.kill('SIGTERM');
    expect(await ended).toBe(0);
    expect(log('kilnd.log.1').map(({ msg }) => msg)).toEqual(['kilnd starts']);
    expect(log().map(({ msg }) => msg)).toEqual(['stopping', 'stopped']);
  });

  it('that is told to stop by three at once stops once', async () => {
    const { child, ended } = await running();
    child.kill('SIGTERM');
    child.kill('SIGINT');
    await kiln('stop');
    expect(await ended).toBe(0);
    expect(log().filter(({ msg }) => msg === 'stopped').length).toBe(1);
  });

  it('started by hand, without a pipe, works as well', async () => {
    writeFileSync(join(directory, 'config.toml'), '[daemon]\nidle_timeout_s = 1\n');
    const child = spawn(join(distBin, 'kilnd'), [], { stdio: 'ignore', env: environment({}) });
    started.push(child);
    expect((await once(child, 'exit'))[0]).toBe(0);
  });

  it('is described by `kiln status` and ended by `kiln stop`', async () => {
    const { child, ended } = await running();
    const status = await kiln('status');
    expect(status).toMatchObject({ code: 0, stderr: '' });
    const templates = { restored: 0, restoresFailed: 0, built: 0, buildsFailed: 0, damaged: 0 };
    const expected = { version: kilnVersion, pid: child.pid, draining: false, containers: [], templates, pool: [] };
    expect(JSON.parse(status.stdout)).toEqual(expected);
    const stop = await kiln('stop');
    expect(stop).toMatchObject({ code: 0, stderr: '' });
    expect(JSON.parse(stop.stdout)).toEqual(expected);
    expect(await ended).toBe(0);
  });
});

describe('kiln', () => {
  it.each(['status', 'stop'])('%s without a kilnd says that there is none, and ends with 1', async (verb) => {
    const { code, stdout, stderr } = await kiln(verb);
    expect(code).toBe(1);
    expect(stdout).toBe('');
    expect(stderr).toMatch(/^kiln: kilnd is not running: nothing listens on .*kilnd\.sock \(.*KILN_STATE_DIR\)\n$/);
  });

  it("--version is Kiln's", async () => {
    expect(await kiln('--version')).toEqual({ code: 0, stdout: `${kilnVersion}\n`, stderr: '' });
  });

  it('with a verb that it does not know shows the ones that it does', async () => {
    const { code, stdout, stderr } = await kiln('strat');
    expect(code).toBe(3);
    expect(stderr).toContain("unknown command 'strat'");
    expect(stdout).toContain('status');
  });
});
