import { readFileSync } from 'node:fs';
import { mkdir, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { writableSlots } from '../../src/vmm/vmm.ts';
import { containerdVersions, underKiln } from '../support/paths.ts';
import type { RunContainerOptions, Scene } from '../support/scene.ts';
import { Lines } from '../support/spawn.ts';
import { useScene } from '../support/use-scene.ts';
import { helpersOf } from '../support/victims.ts';
import { signal, waitForEnd } from '../support/wait-for-end.ts';

/** Lives until it is told to end; its exit status then is 7. */
const waiting = ['sh', '-c', 'trap "exit 7" TERM; while :; do usleep 20000; done'];

function annotated(type: 'sandbox' | 'container', podId: string): RunContainerOptions {
  const annotations = { 'io.kubernetes.cri.container-type': type, 'io.kubernetes.cri.sandbox-id': podId };
  return { flags: Object.entries(annotations).flatMap(([name, value]) => ['--annotation', `${name}=${value}`]) };
}

async function startPod(scene: Scene): Promise<string> {
  const id = scene.id('pod');
  await scene.start(id, ['pause'], annotated('sandbox', id));
  return id;
}

async function startMember(
  scene: Scene,
  podId: string,
  command: readonly string[] = waiting,
  flags: readonly string[] = [],
): Promise<string> {
  const id = scene.id('member');
  await scene.start(id, command, { flags: [...(annotated('container', podId).flags ?? []), ...flags] });
  return id;
}

async function inside(scene: Scene, id: string, ...command: string[]): Promise<string> {
  const execId = scene.id('exec');
  return (await scene.ctr(['task', 'exec', '--fifo-dir', scene.fifoDir, '--exec-id', execId, id, ...command])).trim();
}

async function bootId(scene: Scene, id: string): Promise<string> {
  return inside(scene, id, 'cat', '/proc/sys/kernel/random/boot_id');
}

async function statuses(scene: Scene): Promise<Record<string, string>> {
  return Object.fromEntries((await scene.tasks()).map(({ id, status }) => [id, status]));
}

async function sortedTasks(scene: Scene) {
  return (await scene.tasks()).sort((one, other) => one.pid - other.pid);
}

/** Resolves when the task is seen as stopped. */
async function stopped(scene: Scene, id: string): Promise<void> {
  await expect.poll(async () => (await statuses(scene))[id], { timeout: 60_000 }).toBe('STOPPED');
}

async function killKilnd(scene: Scene): Promise<void> {
  const pids = scene.kilndPids();
  expect(pids.length).toBeGreaterThan(0);
  for (const pid of pids) signal(pid, 'SIGKILL');
  for (const pid of pids) await waitForEnd(pid, 20_000);
}

describe.runIf(underKiln).each(containerdVersions)('a pod under containerd %s', (version) => {
  const scene = useScene({ version });

  it('is one virtual machine in which containers come and go', async () => {
    const pod = await startPod(scene);
    const one = await startMember(scene, pod);
    const two = await startMember(scene, pod);
    const boot = await bootId(scene, one);
    expect(await bootId(scene, two)).toBe(boot);

    // Each has a root filesystem and processes of its own, and all are in one network.
    await inside(scene, one, 'sh', '-c', 'echo one > /of');
    expect(await inside(scene, two, 'ls', '/of', '/etc/passwd').catch(String)).toContain('No such file');
    const networks = [one, two].map((id) => inside(scene, id, 'readlink', '/proc/self/ns/net'));
    expect(new Set(await Promise.all(networks)).size).toBe(1);
    const hosts = (await scene.tasks()).map(({ pid }) => readFileSync(`/proc/${pid}/net/dev`, 'utf8'));
    expect(hosts).toHaveLength(3);

    // The end of one is nobody else's.
    await scene.ctr(['task', 'kill', '--signal', 'SIGTERM', one]);
    await stopped(scene, one);
    await scene.remove(one);
    expect(await statuses(scene)).toEqual({ [pod]: 'RUNNING', [two]: 'RUNNING' });
    for (let round = 0; round < 3; round += 1) {
      const id = scene.id('again');
      const result = await scene.run(id, ['cat', '/proc/sys/kernel/random/boot_id'], {
        flags: ['--rm', ...(annotated('container', pod).flags ?? [])],
      });
      expect(result).toMatchObject({ code: 0, stdout: Buffer.from(`${boot}\n`) });
    }
    expect(await bootId(scene, two)).toBe(boot);
    await scene.remove(two);
    await scene.remove(pod);
  });

  it('ends with whatever is in it when what stands for it ends', async () => {
    const pod = await startPod(scene);
    const member = await startMember(scene, pod);
    await using events = await scene.events();
    await scene.ctr(['task', 'kill', '--signal', 'SIGKILL', pod]);
    await stopped(scene, pod);
    await stopped(scene, member);
    expect(events.of(member).find(({ topic }) => topic === '/tasks/exit')?.event).toMatchObject({ exit_status: 137 });
    const late = await scene.run(scene.id(), ['true'], annotated('container', pod));
    expect(late.code).not.toBe(0);
    expect(late.stderr).toContain(`the pod ${pod} has ended`);
    await scene.remove(member);
    await scene.remove(pod);
  });

  it('is needed by a container that wants to be in it', async () => {
    const result = await scene.run(scene.id(), ['true'], annotated('container', 'nowhere'));
    expect(result.code).not.toBe(0);
    expect(result.stderr).toContain('there is no pod nowhere');
  });

  it('outlives a kilnd that is killed, and goes on taking containers', async () => {
    const pod = await startPod(scene);
    const [one, two] = [await startMember(scene, pod), await startMember(scene, pod)];
    const before = await sortedTasks(scene);
    const boot = await bootId(scene, one);
    await inside(scene, one, 'sh', '-c', 'echo kept > /note');
    await killKilnd(scene);
    expect(await bootId(scene, two)).toBe(boot);
    expect(await sortedTasks(scene)).toEqual(before);
    expect(await inside(scene, one, 'cat', '/note')).toBe('kept');
    const three = await startMember(scene, pod);
    expect(await bootId(scene, three)).toBe(boot);
    await scene.remove(one);
    await killKilnd(scene);
    expect(await bootId(scene, three)).toBe(boot);
    await scene.ctr(['task', 'kill', '--signal', 'SIGTERM', two]);
    await stopped(scene, two);
    for (const id of [two, three, pod]) await scene.remove(id);
  });

  it('ends when its virtual machine is killed', async () => {
    const pod = await startPod(scene);
    const member = await startMember(scene, pod);
    for (const pid of await helpersOf(scene, pod, 'qemu-system')) signal(pid, 'SIGKILL');
    await stopped(scene, pod);
    await stopped(scene, member);
    for (const id of [member, pod]) await scene.remove(id);
  });
});

describe.runIf(underKiln)('a pod', () => {
  const scene = useScene({ version: '2.1' });

  it('takes containers at once, as many as it has drive slots, and can end while some start and programs run', async () => {
    const pod = await startPod(scene);
    const volume = join(scene.dir, 'volume');
    await mkdir(volume);
    await writeFile(join(volume, 'note'), 'of the host');
    const mount = ['--mount', `type=bind,src=${volume},dst=/v,options=rbind:ro`];
    const members = await Promise.all(writableSlots.map(() => startMember(scene, pod, waiting, mount)));
    const notes = members.map((id) => inside(scene, id, 'cat', '/v/note'));
    expect(new Set(await Promise.all(notes))).toEqual(new Set(['of the host']));
    const late = await scene.run(scene.id(), ['true'], annotated('container', pod));
    expect(late.code).not.toBe(0);
    expect(late.stderr).toContain('the VM has no free writable drive slot');

    // One that has left makes room for the next.
    const [first = '', second = ''] = members;
    await scene.remove(first);
    const next = scene.id('next');
    const starting = scene.run(next, waiting, { flags: ['--detach', ...(annotated('container', pod).flags ?? [])] });
    const exec = ['task', 'exec', '--fifo-dir', scene.fifoDir, '--exec-id', 'long', second];
    const running = scene.containerd.ctrStream([...exec, 'sh', '-c', 'echo up; sleep 1000']);
    await new Lines(running.stdout).waitFor((line) => line === 'up', 'up');
    await scene.ctr(['task', 'kill', '--signal', 'SIGKILL', pod]);
    expect(await running.exit).not.toBe(0);
    const started = await starting;
    if (started.code !== 0)
      expect(started.stderr).toMatch(/pod .* has ended|VM ended|connection to the guest|not found/);
    for (const id of [...members.slice(1), pod]) await stopped(scene, id);
    await scene.containerd.ctr(['task', 'rm', '--force', next]);
    await scene.containerd.ctr(['container', 'rm', next]);
    for (const id of [...members.slice(1), pod]) await scene.remove(id);
  });
});
