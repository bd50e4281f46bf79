import { type ChildProcess, execFileSync, spawn } from 'node:child_process';
import { once } from 'node:events';
import {
  mkdirSync,
  mkdtempSync,
  rmdirSync,
  rmSync,
  symlinkSync,
  truncateSync,
  unlinkSync,
  writeFileSync,
} from 'node:fs';
import { createServer } from 'node:net';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import {
  assertNothingLeft,
  findLeft,
  type HostSnapshot,
  type LeftoverKind,
  snapshotHost,
} from '../support/leftovers.ts';

let dir: string;
let stateDir: string;
let cacheDir: string;
let snapshot: HostSnapshot;
let cleanups: (() => unknown)[];

beforeEach(() => {
  dir = mkdtempSync('/tmp/kt-');
  stateDir = join(dir, 'k');
  cacheDir = join(dir, 'c');
  mkdirSync(stateDir);
  mkdirSync(cacheDir);
  cleanups = [];
  snapshot = snapshotHost({ stateDir, cacheDir, containerdDir: join(dir, 'cd') });
});

afterEach(async () => {
  for (const cleanup of cleanups.reverse()) await cleanup();
  rmSync(dir, { recursive: true });
});

async function start(file: string, args: string[], env: NodeJS.ProcessEnv = {}, cwd = '/'): Promise<ChildProcess> {
  const child = spawn(file, args, { env, cwd, stdio: 'ignore' });
  await once(child, 'spawn');
  cleanups.push(async () => {
    if (child.exitCode !== null || child.signalCode !== null) return;
    child.kill('SIGKILL');
    await once(child, 'exit');
  });
  return child;
}

/** Checks that there is exactly one leftover, of this kind, whose description holds `text`; then that it can go. */
async function expectLeftover(kind: LeftoverKind, text: string): Promise<void> {
  // A process that has just been started shows itself when its execve(2) is through, of which there is no event.
  const left = await vi.waitFor(() => {
    const found = findLeft(snapshot);
    expect(found.map((item) => item.kind)).toEqual([kind]);
    return found;
  });
  expect(left[0]?.what).toContain(text);
  await expect(assertNothingLeft(snapshot, { within: 0 })).rejects.toThrow(`${kind}: `);
  for (const cleanup of cleanups.reverse()) await cleanup();
  cleanups = [];
  await assertNothingLeft(snapshot);
}

describe('the search for leftovers', () => {
  it('finds nothing on a clean machine', async () => {
    await assertNothingLeft(snapshot, { within: 0 });
  });

  it('finds a process whose environment names the state folder', async () => {
    await start('/bin/sleep', ['1000'], { KILN_STATE_DIR: stateDir });
    await expectLeftover('process', 'sleep 1000');
  });

  it('finds a process whose command line names the state folder', async () => {
    await start('/bin/sh', ['-c', `sleep 1000; : ${stateDir}/sandboxes/x`]);
    const left = findLeft(snapshot);
    expect(left[0]?.kind).toBe('process');
    // The shell's child carries no name of ours: it has to be ended by its group.
    const [shell] = left;
    for (const child of execFileSync('pgrep', ['-P', String(shell?.pid)], { encoding: 'utf8' })
      .trim()
      .split('\n')) {
      process.kill(Number(child), 'SIGKILL');
    }
  });

  it('finds a process that works in the state folder', async () => {
    await start('/bin/sleep', ['1001'], {}, stateDir);
    await expectLeftover('process', 'sleep 1001');
  });

  it('finds a relay, also where kilnd may live', async () => {
    const program = join(dir, 'kiln-relay');
    symlinkSync('/bin/sleep', program);
    await start(program, ['1006'], { KILN_STATE_DIR: stateDir });
    writeFileSync(join(stateDir, 'relay.sock'), '');
    cleanups.push(() => unlinkSync(join(stateDir, 'relay.sock')));
    await vi.waitFor(() => expect(findLeft(snapshot, true).map(({ kind }) => kind)).toEqual(['process']));
  });

  it('finds a new stand-in that no longer names any folder', async () => {
    const program = join(dir, 'kiln-standin');
    symlinkSync('/bin/sleep', program);
    const child = spawn(program, ['1002'], { argv0: 'kiln-standin', env: {}, stdio: 'ignore' });
    await once(child, 'spawn');
    cleanups.push(async () => {
      child.kill('SIGKILL');
      await once(child, 'exit');
    });
    await expectLeftover('process', String(child.pid));
  });

  it('finds a child of kilnd that names no folder, also where kilnd may live', async () => {
    const script = join(dir, 'kilnd');
    // It says its number itself: before that it may still be this script.
    writeFileSync(script, "env -i /bin/sh -c 'echo $$; exec /bin/sleep 1005' & wait", { mode: 0o755 });
    const child = spawn('/bin/sh', [script], {
      env: { ...process.env, KILN_STATE_DIR: stateDir },
      stdio: ['ignore', 'pipe', 'ignore'],
    });
    const [sleeper] = (await once(child.stdout, 'data')) as [Buffer];
    cleanups.push(async () => {
      process.kill(Number(sleeper), 'SIGKILL');
      await once(child, 'exit');
    });
    const left = findLeft(snapshot, true);
    expect(left.map((item) => item.pid)).toEqual([Number(sleeper)]);
  });

  it('leaves a QEMU alone that somebody else runs', async () => {
    const child = spawn('/bin/sleep', ['1006'], { argv0: 'qemu-system-x86_64', env: {}, stdio: 'ignore' });
    await once(child, 'spawn');
    try {
      expect(findLeft(snapshot)).toEqual([]);
    } finally {
      child.kill('SIGKILL');
      await once(child, 'exit');
    }
  });

  it("leaves another Kiln's processes alone", async () => {
    const program = join(dir, 'kiln-standin');
    symlinkSync('/bin/sleep', program);
    // argv[0] must not lie in the folders that are searched.
    const child = spawn(program, ['1003'], {
      argv0: 'kiln-standin',
      env: { KILN_STATE_DIR: '/run/kiln' },
      stdio: 'ignore',
    });
    await once(child, 'spawn');
    try {
      expect(findLeft(snapshot)).toEqual([]);
    } finally {
      child.kill('SIGKILL');
      await once(child, 'exit');
    }
  });

  it('lets kilnd live where it may, and only there', async () => {
    const program = join(dir, 'kilnd');
    symlinkSync('/bin/sleep', program);
    await start(program, ['1004'], { KILN_STATE_DIR: stateDir });
    expect(findLeft(snapshot, true)).toEqual([]);
    await expectLeftover('process', 'kilnd');
  });

  it('finds what a living kilnd keeps open of a sandbox', async () => {
    const file = join(stateDir, 'disk.img');
    writeFileSync(file, '');
    const script = join(dir, 'kilnd');
    writeFileSync(script, 'exec 9<"$1"; rm "$1"; echo up; read -r _', { mode: 0o755 });
    const child = spawn('/bin/sh', [script, file], {
      env: { KILN_STATE_DIR: stateDir },
      stdio: ['pipe', 'pipe', 'ignore'],
    });
    await once(child.stdout, 'data');
    const left = findLeft(snapshot, true);
    child.stdin.end();
    await once(child, 'exit');
    expect(left).toEqual([{ kind: 'open-file', what: `${file} (deleted) in kilnd ${child.pid}` }]);
  });

  it('finds a mount', async () => {
    const point = join(stateDir, 'export');
    mkdirSync(point);
    execFileSync('mount', ['-t', 'tmpfs', 'kt', point]);
    cleanups.push(() => execFileSync('umount', [point]));
    await expectLeftover('mount', point);
  });

  it('finds a Unix socket whose file is gone', async () => {
    const path = join(stateDir, 'vm.sock');
    const server = createServer().listen(path);
    await once(server, 'listening');
    unlinkSync(path);
    cleanups.push(() => new Promise((resolve) => server.close(resolve)));
    await expectLeftover('socket', path);
  });

  it('finds a file of a sandbox, but not logs and locks', async () => {
    writeFileSync(join(stateDir, 'kilnd.log'), '');
    writeFileSync(join(stateDir, 'kilnd.lock'), '');
    mkdirSync(join(stateDir, 'sandboxes'));
    expect(findLeft(snapshot)).toEqual([]);
    mkdirSync(join(stateDir, 'sandboxes', 'x'));
    cleanups.push(() => rmdirSync(join(stateDir, 'sandboxes', 'x')));
    await expectLeftover('file', 'sandboxes/x');
  });

  it('finds half an image in the cache, but not whole ones', async () => {
    mkdirSync(join(cacheDir, 'layers'));
    writeFileSync(join(cacheDir, 'layers', `${'0123456789abcdef'.repeat(4)}.erofs`), '');
    expect(findLeft(snapshot)).toEqual([]);
    const half = join(cacheDir, 'layers', 'x.erofs.tmp');
    writeFileSync(half, '');
    cleanups.push(() => unlinkSync(half));
    await expectLeftover('file', half);
  });

  it("finds a bundle in containerd's folder", async () => {
    const bundle = join(dir, 'cd', 'state', 'io.containerd.runtime.v2.task', 'default', 'x');
    mkdirSync(bundle, { recursive: true });
    cleanups.push(() => rmdirSync(bundle));
    await expectLeftover('file', bundle);
  });

  it('finds a network namespace', async () => {
    const name = `kt-${process.pid}`;
    execFileSync('ip', ['netns', 'add', name]);
    cleanups.push(() => execFileSync('ip', ['netns', 'delete', name]));
    const left = findLeft(snapshot);
    expect(new Set(left.map((item) => item.kind))).toEqual(new Set(['netns']));
    expect(left[0]?.what).toContain(name);
  });

  it('finds a tap', async () => {
    const name = `kt${process.pid % 100_000}`;
    execFileSync('ip', ['tuntap', 'add', name, 'mode', 'tap']);
    cleanups.push(() => execFileSync('ip', ['link', 'delete', name]));
    await expectLeftover('interface', name);
  });

  it('finds a cgroup', async () => {
    const root = execFileSync('sh', ['-c', 'ls -d /sys/fs/cgroup/pids /sys/fs/cgroup 2>/dev/null | head -n 1'], {
      encoding: 'utf8',
    }).trim();
    const path = join(root, `kiln-${process.pid}`);
    mkdirSync(path);
    cleanups.push(() => rmdirSync(path));
    await expectLeftover('cgroup', path);
  });

  it('finds a loop device', async () => {
    const file = join(cacheDir, 'image.erofs');
    writeFileSync(file, '');
    truncateSync(file, 1024 * 1024);
    const device = execFileSync('losetup', ['--find', '--show', file], { encoding: 'utf8' }).trim();
    cleanups.push(() => execFileSync('losetup', ['--detach', device]));
    await expectLeftover('loop', device);
  });
});
