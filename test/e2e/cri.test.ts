import { readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { mkdir } from 'node:fs/promises';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it, onTestFinished, vi } from 'vitest';
import { ContainerState, PodSandboxState } from '../../gen/kubernetes/cri.ts';
import { NamespaceMode, type NamespaceOption, type PodSandboxConfig } from '../../gen/kubernetes/pod.ts';
import { hierarchiesIn, hostMounts, removeGroup, wordsOf } from '../../src/host/cgroups.ts';
import { Cri, type CriPod, noResources, portForwardClient, usualNamespaces } from '../support/cri.ts';
import { busyboxImage, imageArchive } from '../support/images.ts';
import { TestNetwork } from '../support/network.ts';
import { type ContainerdVersion, cniPlugins, containerdVersions, runtime, underKiln } from '../support/paths.ts';
import type { Scene } from '../support/scene.ts';
import { useScene } from '../support/use-scene.ts';

// What a kubelet asks of containerd, and containerd's CRI plugin of the runtime.

const gateway = '10.89.0.1';
const handler = 'tested';
const image = busyboxImage.name;
const waiting = 'trap "exit 3" TERM; while :; do usleep 20000; done';
const mib = 2n ** 20n;

/** A scene with CRI, and who speaks to it. */
function useCri(version: ContainerdVersion, sandboxer?: 'shim') {
  const network = new TestNetwork();
  const scene = useScene({
    version,
    network,
    cri: {
      ...{ cniBin: cniPlugins(), cniConfig: join(network.dir, 'net.d') },
      ...{ sandboxImage: image, handler, runtimeType: runtime, ...(sandboxer && { sandboxer }) },
    },
  });
  let cri: Cri | undefined;
  beforeAll(async () => {
    const ranges = [[{ subnet: '10.89.0.0/24' }]];
    const ipam = { type: 'host-local', dataDir: network.ipamDir, ranges, routes: [{ dst: '0.0.0.0/0' }] };
    network.configure({ name: 'kt', plugins: [{ type: 'bridge', bridge: 'kt-br0', isGateway: true, ipam }] });
    const stdin = await imageArchive(busyboxImage);
    const imported = await scene.containerd.ctr(['image', 'import', '-'], { stdin, namespace: 'k8s.io' });
    expect(imported).toMatchObject({ code: 0 });
    await mkdir(join(scene.dir, 'logs'));
    cri = new Cri(scene.containerd.address);
  });
  afterAll(() => {
    cri?.[Symbol.dispose]();
    network[Symbol.dispose]();
  });
  return { scene, network, cri: () => cri as Cri };
}

function podConfig(scene: Scene, cgroupParent: string): PodSandboxConfig {
  return {
    metadata: { name: 'web', uid: scene.id('uid'), namespace: 'default', attempt: 0 },
    hostname: 'web-0',
    logDirectory: join(scene.dir, 'logs'),
    dnsConfig: { servers: ['10.0.0.53'], searches: [], options: [] },
    labels: {},
    annotations: {},
    linux: {
      cgroupParent,
      sysctls: {},
      securityContext: { namespaceOptions: usualNamespaces },
      resources: { ...noResources, memoryLimitInBytes: 256n * mib, cpuPeriod: 100_000n, cpuQuota: 50_000n },
    },
  };
}

/** The directories of a group in the hierarchies of the host. */
function directoriesOf(group: string): string[] {
  return hierarchiesIn(hostMounts).map(({ directory }) => join(directory, group));
}

/** Lets a group have so many bytes more than it has now. */
function limitMemory(group: string, moreBytes: number): void {
  const hierarchy = hierarchiesIn(hostMounts).find(({ controllers }) => controllers.includes('memory'));
  if (hierarchy === undefined) throw new Error('the host cannot limit memory');
  const [usage, limit] =
    hierarchy.version === 1 ? ['memory.usage_in_bytes', 'memory.limit_in_bytes'] : ['memory.current', 'memory.max'];
  const file = (name: string) => join(hierarchy.directory, group, name);
  writeFileSync(file(limit), String(Number(readFileSync(file(usage), 'utf8')) + moreBytes));
}

/** A pod's control group, which is kubelet's: here it is removed as kubelet does it. When `use` is over, nobody is in it. */
async function withGroup(scene: Scene, use: (group: string) => Promise<void>): Promise<void> {
  const group = `/kt-${process.pid}-${scene.id('cri')}`;
  // After the scene has ended what a failed test has left.
  onTestFinished(async () => {
    for (const directory of directoriesOf(group)) await removeGroup(directory);
  });
  await use(group);
  const sandboxes = directoriesOf(group).flatMap((directory) => readdirSync(directory).filter(isSandboxId));
  expect(sandboxes).toEqual([]);
}

function isSandboxId(name: string): boolean {
  return /^[0-9a-f]{64}$/.test(name);
}

async function exited(pod: CriPod, containerId: string) {
  const state = async () => (await pod.containerStatus(containerId))?.state;
  await expect.poll(state, { timeout: 60_000 }).toBe(ContainerState.CONTAINER_EXITED);
  return pod.containerStatus(containerId);
}

const ways: [ContainerdVersion, 'shim'?][] = containerdVersions.map((version) => [version]);
if (underKiln) ways.push(['2.1', 'shim']);

describe.each(ways)('a pod of CRI under containerd %s, sandboxer: %s', (version, sandboxer) => {
  const { scene, network, cri } = useCri(version, sandboxer);

  it('has containers that come and go in one network, with logs, execs, statistics and limits', async () => {
    await withGroup(scene, async (group) => {
      const pod = await cri().run(podConfig(scene, group), handler);
      const start = (name: string, script: string) =>
        pod.start({ name, image, command: ['sh', '-c', script], resources: { memoryLimitInBytes: 64n * mib } });
      const one = await start('one', `echo hello; touch /dev/shm/of-one; ${waiting}`);
      const two = await start('two', waiting);
      expect(await pod.exec(two, 'hostname')).toBe('web-0');
      expect(await pod.exec(two, 'ls', '/dev/shm')).toBe('of-one');
      const ipc = await pod.exec(one, 'readlink', '/proc/self/ns/ipc');
      expect(await pod.exec(two, 'readlink', '/proc/self/ns/ipc')).toBe(ipc);
      expect(await pod.exec(two, 'cat', '/etc/resolv.conf')).toBe('nameserver 10.0.0.53');
      expect(await pod.exec(two, 'ping', '-c', '1', '-W', '5', gateway)).toContain('1 packets received');
      const status = await pod.status();
      expect(status?.state).toBe(PodSandboxState.SANDBOX_READY);
      expect(await pod.exec(one, 'ip', '-o', 'addr')).toContain(`${status?.network?.ip}/24`);
      expect(readFileSync(join(scene.dir, 'logs', 'one-0.log'), 'utf8')).toContain('stdout F hello');

      // What is at all addresses of the pod, and so at 127.0.0.1, where port-forward looks.
      await pod.exec(two, 'sh', '-c', 'nc -ll -p 7 -e cat >/dev/null 2>&1 &');
      const forward = async (port: number) => {
        const url = await pod.portForward(port);
        return network.run(process.execPath, ['-e', portForwardClient, `${url}?port=${port}`, 'hello']);
      };
      const forwarded = async () => expect(await forward(7)).toMatchObject({ stdout: Buffer.from('hello') });
      await vi.waitFor(forwarded, { timeout: 30_000 });
      expect((await forward(8)).stderr).toContain('connection refused');

      const containers = await pod.containerStats();
      expect(containers.map(({ attributes }) => attributes?.id).sort()).toEqual([one, two].sort());
      for (const { cpu, memory } of containers) {
        expect(cpu?.usageCoreNanoSeconds?.value).toBeGreaterThan(0n);
        expect(memory?.workingSetBytes?.value).toBeGreaterThan(0n);
        expect(memory?.workingSetBytes?.value).toBeLessThan(64n * mib);
      }
      // 1.6 has no statistics of pods.
      if (version !== '1.6') {
        const linux = (await pod.stats())?.linux;
        expect(linux?.cpu?.usageCoreNanoSeconds?.value).toBeGreaterThan(0n);
        expect(linux?.memory?.workingSetBytes?.value).toBeGreaterThan(underKiln ? 8n * mib : 0n);
        expect(linux?.network?.defaultInterface?.name).toBe('eth0');
        expect(linux?.network?.defaultInterface?.rxBytes?.value).toBeGreaterThan(0n);
        expect(linux?.network?.defaultInterface?.txBytes?.value).toBeGreaterThan(0n);
        expect(linux?.process?.processCount?.value).toBeGreaterThanOrEqual(2n);
        expect(linux?.containers).toHaveLength(2);
      }
      await pod.update(two, { memoryLimitInBytes: 96n * mib, cpuQuota: 20_000n, cpuPeriod: 100_000n });
      expect(await pod.exec(two, 'cat', '/sys/fs/cgroup/memory.max', '/sys/fs/cgroup/cpu.max')).toBe(
        `${96n * mib}\n20000 100000`,
      );

      await pod.stop(one);
      expect(await pod.containerStatus(one)).toMatchObject({ state: ContainerState.CONTAINER_EXITED, exitCode: 3 });
      await pod.removeContainer(one);
      const again = await start('again', waiting);
      const boot = await pod.exec(two, 'cat', '/proc/sys/kernel/random/boot_id');
      expect(await pod.exec(again, 'cat', '/proc/sys/kernel/random/boot_id')).toBe(boot);
      await pod.remove();
    });
  });
});

describe.runIf(underKiln)('a pod of CRI', () => {
  const { scene, cri } = useCri('2.1');

  it('is in the control group that CRI gives it, and tells why it has ended when that is full', async () => {
    await withGroup(scene, async (group) => {
      const pod = await cri().run(podConfig(scene, group), handler);
      const one = await pod.start({ name: 'one', image, command: ['sh', '-c', waiting] });
      for (const directory of directoriesOf(join(group, pod.id))) {
        const programs = wordsOf(directory, 'cgroup.procs').map((pid) =>
          readFileSync(`/proc/${pid}/comm`, 'utf8').trim(),
        );
        expect(programs.sort()).toEqual(['kiln-standin', 'kiln-standin', 'kiln-volumes', 'qemu-system-x86']);
      }
      // A limit as kubelet sets it, which the guest exceeds although it has the memory.
      limitMemory(group, 16 * 2 ** 20);
      // Whether it ends with an error or with a status is containerd's business.
      await pod.exec(one, 'dd', 'if=/dev/zero', 'of=/dev/null', 'bs=150M', 'count=1').catch(() => {});
      expect(await exited(pod, one)).toMatchObject({ exitCode: 137 });
      const state = async () => (await pod.status())?.state;
      await expect.poll(state, { timeout: 30_000 }).toBe(PodSandboxState.SANDBOX_NOTREADY);
      await pod.remove();
    });
  });

  it('lets containers share processes, with the pod or with one of its containers', async () => {
    await withGroup(scene, async (group) => {
      const pod = await cri().run(podConfig(scene, group), handler);
      const shared = { ...usualNamespaces, pid: NamespaceMode.POD };
      const start = (name: string, namespaces: NamespaceOption, argument: string) =>
        pod.start({ name, image, namespaces, command: ['sh', '-c', `${waiting} # ${argument}`] });
      const processes = (id: string) => pod.exec(id, 'ps', '-o', 'pid,args');
      const one = await start('one', shared, 'of-one');
      const two = await start('two', shared, 'of-two');
      const alone = await start('alone', usualNamespaces, 'of-alone');
      const seen = await processes(two);
      expect(seen).toContain('of-one');
      expect(seen).toContain('of-two');
      expect(seen).not.toContain('of-alone');
      expect(seen).toMatch(/^ *1 .*tini/m);
      expect(await processes(alone)).not.toContain('of-one');

      // As `kubectl debug --target` has it. It ends with the first process of the one that it looks into.
      const debug = await start(
        'debug',
        { ...usualNamespaces, pid: NamespaceMode.TARGET, targetId: alone },
        'of-debug',
      );
      expect(await processes(debug)).toMatch(/^ *1 .*of-alone/m);
      expect(await processes(alone)).toContain('of-debug');

      // A signal by its number in the shared namespace; the end of one is nobody else's.
      const [, pid = ''] = /^ *(\d+) sh -c .*of-one/m.exec(seen) ?? [];
      await pod.exec(two, 'kill', '-TERM', pid);
      expect(await exited(pod, one)).toMatchObject({ exitCode: 3 });
      expect(await processes(two)).not.toContain('of-one');
      const again = await start('again', shared, 'of-again');
      expect(await processes(two)).toContain('of-again');
      await pod.stop(two);
      expect(await pod.containerStatus(two)).toMatchObject({ exitCode: 3 });
      expect(await processes(again)).not.toContain('of-two');
      await pod.stop(alone);
      expect(await pod.containerStatus(alone)).toMatchObject({ exitCode: 3 });
      expect(await exited(pod, debug)).toMatchObject({ exitCode: 137 });
      await pod.remove();
    });
  });

  it('tells why a container has ended, and gets it again', async () => {
    await withGroup(scene, async (group) => {
      const pod = await cri().run(podConfig(scene, group), handler);
      const other = await pod.start({ name: 'other', image, command: ['sh', '-c', waiting] });
      // More than its limit, and more than the virtual machine has left.
      const greedy = { name: 'greedy', image, command: ['dd', 'if=/dev/zero', 'of=/dev/null', 'bs=300M'] };
      const limited = await pod.start({ ...greedy, resources: { memoryLimitInBytes: 16n * mib } });
      expect(await exited(pod, limited)).toMatchObject({ reason: 'OOMKilled', exitCode: 137 });
      // The same without a limit: then it is the virtual machine's memory that runs out.
      const unlimited = await pod.start({ ...greedy, attempt: 1 });
      expect(await exited(pod, unlimited)).toMatchObject({ reason: 'OOMKilled', exitCode: 137 });
      // The first process of a namespace takes no such signal of its own: a child's end, which it hands on.
      const crash = 'sh -c "kill -SEGV \\$\\$"; exit $?';
      const crashed = await pod.start({ name: 'crash', image, command: ['sh', '-c', crash] });
      expect(await exited(pod, crashed)).toMatchObject({ reason: 'Error', exitCode: 139 });
      const failed = await pod.start({ name: 'crash', attempt: 1, image, command: ['sh', '-c', 'exit 9'] });
      expect(await exited(pod, failed)).toMatchObject({ reason: 'Error', exitCode: 9 });
      const done = await pod.start({ name: 'crash', attempt: 2, image, command: ['true'] });
      expect(await exited(pod, done)).toMatchObject({ reason: 'Completed', exitCode: 0 });
      expect(await pod.containerStatus(other)).toMatchObject({ state: ContainerState.CONTAINER_RUNNING });
      expect(await pod.exec(other, 'echo', 'lives')).toBe('lives');
      await pod.remove();
    });
  });
});
