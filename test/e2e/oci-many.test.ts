/** Many containers at once, of which most are only created: what an orchestrator does after the host has started. */
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { expect, it } from 'vitest';
import { hierarchiesIn, hostMounts } from '../../src/host/cgroups.ts';
import { useOciStage } from '../support/oci-stage.ts';
import { waitForEnd } from '../support/wait-for-end.ts';

const atOnce = 50;
const started = 3;

/** For each command, all of which share the machine's processors. */
const timeout = 600_000;

const stage = useOciStage();

it(`creates ${atOnce} containers at once, starts some, and leaves nothing of any`, { timeout: 1_800_000 }, async () => {
  await using programs = new AsyncDisposableStack();
  const containers = await Promise.all(
    Array.from({ length: atOnce }, async () => {
      const id = stage.id();
      const cgroup = `kiln-${stage.dir.split('/').at(-1)}-${id}`;
      const args = ['sh', '-c', 'cat /proc/sys/kernel/random/boot_id > /boot-id; exit 3'];
      return { id, cgroup, bundle: await stage.bundle({ args, cgroupsPath: `/${cgroup}` }) };
    }),
  );
  const hierarchies = hierarchiesIn(hostMounts);
  const groups = () => {
    const paths = hierarchies.flatMap(({ directory }) => containers.map(({ cgroup }) => join(directory, cgroup)));
    return paths.filter((path) => existsSync(path));
  };

  // All of them, so that what fails leaves none that is still being made.
  const ends = await Promise.allSettled(
    containers.map(async ({ id, bundle }) => {
      const { program, pid } = await stage.create(id, bundle, { timeout });
      programs.use(program);
      program.stdout.resume();
      program.stderr.resume();
      return { id, bundle, program, pid };
    }),
  );
  expect(ends.flatMap((end) => (end.status === 'rejected' ? [end.reason] : []))).toEqual([]);
  const created = ends.flatMap((end) => (end.status === 'fulfilled' ? [end.value] : []));
  expect(new Set(created.map(({ pid }) => pid)).size).toBe(atOnce);
  for (const { id, pid } of created) expect(await stage.state(id)).toMatchObject({ status: 'created', pid });
  expect(groups()).toHaveLength(atOnce * hierarchies.length);

  const [running, waiting] = [created.slice(0, started), created.slice(started)];
  await Promise.all(running.map(({ id }) => stage.must(['start', id], { timeout })));
  for (const { id, program } of running) {
    expect(await program.exit).toBe(3);
    expect(await stage.state(id)).toMatchObject({ status: 'stopped', pid: 0 });
  }
  const kernels = running.map(({ bundle }) => readFileSync(join(bundle.rootfs, 'boot-id'), 'utf8'));
  expect(new Set(kernels).size).toBe(started);
  for (const { bundle } of waiting) expect(existsSync(join(bundle.rootfs, 'boot-id'))).toBe(false);

  await Promise.all(created.map(({ id }) => stage.must(['delete', '--force', id], { timeout })));
  expect(await Promise.all(waiting.map(({ program }) => program.exit))).toEqual(waiting.map(() => 137));
  for (const { pid } of created) await waitForEnd(pid, timeout);
  expect(readdirSync(stage.root)).toEqual([]);
  expect(groups()).toEqual([]);
});
