/** Virtual machines that wait for containers. */
import { execFileSync } from 'node:child_process';
import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { PoolStatus } from '../../src/cli/pool.ts';
import type { ShelfStatus } from '../../src/sandbox/pool.ts';
import { hasKvm } from '../support/failure.ts';
import { execIn } from '../support/fault-notes.ts';
import { distBin, underKiln } from '../support/paths.ts';
import { shiftedClock } from '../support/shifted-clock.ts';
import { startKilnd } from '../support/start-kilnd.ts';
import { useScene } from '../support/use-scene.ts';
import { signal, waitForEnd } from '../support/wait-for-end.ts';

describe.runIf(underKiln)('a pool', () => {
  const scene = useScene({ version: '2.1' });
  beforeEach(() => scene.configure('[pool]\nmin = 2\nmax = 4\n'));
  // What waits is no leftover, but ends with kilnd.
  afterEach(() => scene.stopKilnd());

  const kiln = (...args: string[]): string =>
    execFileSync(join(distBin, 'kiln'), args, { env: { ...process.env, ...scene.kilnEnv }, encoding: 'utf8' });
  const shelf = (): ShelfStatus | undefined => (JSON.parse(kiln('pool', '--json')) as PoolStatus).pool[0];

  /** Waits until so many wait: kilnd tells of it when it is asked. */
  async function waiting(count: number): Promise<void> {
    for (let seen = shelf(); seen?.waiting !== count; seen = shelf()) await sleep(50);
  }

  const bootId = async (): Promise<string> => {
    const { code, stdout, stderr } = await scene.run(scene.id(), ['cat', '/proc/sys/kernel/random/boot_id']);
    expect([code, stderr]).toEqual([0, '']);
    return stdout.toString().trim();
  };

  /** The processes of virtual machines that wait, or have waited. */
  function machines(): number[] {
    const folder = join(scene.stateDir, 'p');
    const found = execFileSync('sh', ['-c', `grep -lsa "KILN_SANDBOX_DIR=${folder}/" /proc/[0-9]*/environ || true`]);
    return found
      .toString()
      .split('\n')
      .filter(Boolean)
      .map((file) => Number(file.split('/')[2]));
  }

  /** What of the memory that QEMU translates code to is in use, in MiB: the largest that can be written and executed. */
  function translatedMib(pid: number): number {
    const parts = readFileSync(`/proc/${pid}/smaps`, 'utf8').split(/^(?=[0-9a-f]+-[0-9a-f]+ )/m);
    const used = parts.filter((part) => / rwxp /.test(part)).map((part) => Number(/^Rss: +(\d+)/m.exec(part)?.[1]));
    return Math.max(...used) / 1024;
  }

  it('has a virtual machine ready for each container, which is its alone, and fills up again', async () => {
    const first = await bootId();
    await waiting(2);
    const ids = [first, await bootId(), await bootId()];
    await waiting(2);
    ids.push(await bootId());
    expect(new Set(ids).size).toBe(4);
    expect(shelf()).toMatchObject({ hits: 3, misses: 1, died: 0 });
    expect(kiln('pool')).toMatch(/^template .*hit rate.*\n\w{16} .* 75 % /);
    const id = scene.id();
    await scene.start(id, ['sleep', '1000']);
    expect(kiln('timeline', id)).toMatch(/^vm-taken /m);
    await scene.remove(id);
  });

  it('whose virtual machine dies, or answers no more, while it waits: the container starts all the same', async () => {
    await bootId();
    await waiting(2);
    const [dead = 0] = machines();
    signal(dead, 'SIGKILL');
    await waitForEnd(dead, 20_000);
    await bootId();
    await waiting(2);
    const [silent = 0] = machines();
    for (const pid of machines()) signal(pid, 'SIGSTOP');
    await bootId();
    await waitForEnd(silent, 20_000);
    expect(shelf()).toMatchObject({ died: 3 });
  });

  it('that is left by a kilnd that was killed is ended, but for what a container has taken, and filled anew', async () => {
    await bootId();
    await waiting(2);
    const id = scene.id();
    await scene.start(id, ['sleep', '1000']);
    await waiting(2);
    const before = machines();
    expect(before.length).toBe(3);
    for (const pid of scene.kilndPids()) {
      signal(pid, 'SIGKILL');
      await waitForEnd(pid, 20_000);
    }
    expect((await execIn(scene, id, ['echo', 'here'])).stdout.toString()).toBe('here\n');
    await waiting(2);
    expect(machines().filter((pid) => before.includes(pid)).length).toBe(1);
    await scene.remove(id);
    expect(machines().filter((pid) => before.includes(pid))).toEqual([]);
  });

  it.skipIf(hasKvm)('has what QEMU has translated until a container is idle, which goes on all the same', async () => {
    await scene.configure('[pool]\nmin = 1\nmax = 1\n[vm]\ntranslation_idle_s = 1\n');
    await bootId();
    await waiting(1);
    // For whose making that is long enough.
    const [pooled = 0] = machines();
    await sleep(5000);
    expect(translatedMib(pooled)).toBeGreaterThan(20);
    const id = scene.id();
    await scene.start(id, ['sleep', '1000']);
    for (let round = 0; round < 3; round += 1) {
      await expect.poll(() => translatedMib(pooled), { timeout: 60_000 }).toBeLessThan(10);
      expect((await execIn(scene, id, ['echo', 'here'])).stdout.toString()).toBe('here\n');
    }
    // What else would wake the guest.
    const settings = ['vm/compaction_proactiveness', 'vm/stat_interval', 'kernel/watchdog'];
    const read = await execIn(scene, id, ['cat', ...settings.map((name) => `/proc/sys/${name}`)]);
    expect(read.stdout.toString()).toBe('0\n10\n0\n');
    await scene.remove(id);
  });

  it('while which waits the wall clock jumps by hours: containers have the time that is then, also one that runs', async () => {
    const clock = shiftedClock(scene.dir, 'kilnd.mjs');
    // The launcher passes no such environment on, so kilnd is there before it.
    await using daemon = await startKilnd({ ...scene.kilnEnv, ...clock.env });
    const running = scene.id();
    await scene.start(running, ['sleep', '1000']);
    // The machine's clock, this test's too, does not jump.
    const errorS = ({ stdout }: { readonly stdout: Buffer }, hours: number): number => {
      return Math.abs(Number(stdout.toString()) - hours * 3600 - Date.now() / 1000);
    };
    for (const hours of [5, -3, 0]) {
      await waiting(2);
      const { hits } = shelf() ?? { hits: 0 };
      await clock.jumpTo(hours * 3600);
      expect(errorS(await scene.run(scene.id(), ['date', '+%s']), hours)).toBeLessThan(10);
      expect(shelf()).toMatchObject({ hits: hits + 1, died: 0 });
      // kilnd looks for a jump every 5 s.
      const timeOfRunning = async () => errorS(await execIn(scene, running, ['date', '+%s']), hours);
      await expect.poll(timeOfRunning, { timeout: 30_000 }).toBeLessThan(10);
    }
    await scene.remove(running);
    await scene.stopKilnd();
    expect(await daemon.exit).toBe(0);
  });

  it('ends with kilnd, and leaves no directory', async () => {
    await bootId();
    await waiting(2);
    await scene.stopKilnd();
    expect(machines()).toEqual([]);
    expect(readdirSync(join(scene.stateDir, 'p'))).toEqual([]);
  });
});
