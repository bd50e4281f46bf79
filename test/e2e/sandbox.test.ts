import { existsSync, readdirSync, readlinkSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { NamespaceMode } from '../../gen/kubernetes/pod.ts';
import { TtrpcError } from '../../src/rpc/ttrpc/index.ts';
import { NetworkNamespace } from '../../src/sys/netns.ts';
import { busyboxImage } from '../support/images.ts';
import { TestNetwork } from '../support/network.ts';
import { cniPlugins, runtime, underKiln } from '../support/paths.ts';
import { Sandboxes } from '../support/sandboxes.ts';
import { useScene } from '../support/use-scene.ts';
import { waitForFile } from '../support/victims.ts';
import { signal, waitForEnd } from '../support/wait-for-end.ts';

// containerd's sandbox API without CRI: what its own clients ask of its sandbox controller, and that of the runtime.

const waiting = ['sh', '-c', 'trap "exit 7" TERM; while :; do usleep 20000; done'];

describe.runIf(underKiln)('a sandbox of the sandbox API of containerd 2.1', () => {
  const network = new TestNetwork();
  // containerd serves its controllers only with the one of CRI.
  const scene = useScene({
    version: '2.1',
    network,
    cri: {
      ...{ cniBin: cniPlugins(), cniConfig: join(network.dir, 'net.d') },
      ...{ sandboxImage: busyboxImage.name, handler: 'tested', runtimeType: runtime },
    },
  });
  let sandboxes: Sandboxes;
  let netns: NetworkNamespace;
  let netnsPath: string;
  beforeAll(() => {
    sandboxes = new Sandboxes(scene);
    netns = NetworkNamespace.create();
    netnsPath = `/proc/${process.pid}/fd/${netns.fd}`;
  });
  afterAll(() => {
    sandboxes?.[Symbol.dispose]();
    netns?.[Symbol.dispose]();
    network[Symbol.dispose]();
  });

  const memberFlags = (sandbox: string) => {
    const annotations = { 'io.kubernetes.cri.container-type': 'container', 'io.kubernetes.cri.sandbox-id': sandbox };
    return Object.entries(annotations).flatMap(([name, value]) => ['--annotation', `${name}=${value}`]);
  };
  const inside = async (sandbox: string, ...command: string[]) => {
    const result = await scene.run(scene.id('member'), command, { flags: ['--rm', ...memberFlags(sandbox)] });
    expect(result).toMatchObject({ code: 0, stderr: '' });
    return result.stdout.toString().trim();
  };
  const bootId = (sandbox: string) => inside(sandbox, 'cat', '/proc/sys/kernel/random/boot_id');
  const killKilnd = async () => {
    const pids = scene.kilndPids();
    expect(pids.length).toBeGreaterThan(0);
    for (const pid of pids) signal(pid, 'SIGKILL');
    for (const pid of pids) await waitForEnd(pid, 20_000);
  };
  const vmOf = async (id: string) => {
    const { info } = await sandboxes.status(id, true);
    return (JSON.parse(info.info ?? '') as { vm: { pid: number } }).vm.pid;
  };

  it('is a virtual machine in the namespace of its network, which takes containers, and leaves nothing', async () => {
    const id = scene.id('sandbox');
    await using events = await scene.events();
    await sandboxes.create(id, {
      netnsPath,
      config: {
        hostname: 'web-0',
        dnsConfig: { servers: ['10.0.0.53'], searches: ['svc'], options: [] },
        linux: { sysctls: { 'net.ipv4.ip_forward': '1' }, resources: { memoryLimitInBytes: 64n << 20n } },
      },
    });
    expect(await sandboxes.status(id)).toMatchObject({ state: 'SANDBOX_NOTREADY' });
    const { pid, createdAt } = await sandboxes.start(id);
    expect(readlinkSync(`/proc/${pid}/ns/net`)).toBe(netns.identity);
    expect(await sandboxes.status(id)).toMatchObject({ pid, createdAt, state: 'SANDBOX_READY' });

    const script = 'cat /etc/hostname /etc/resolv.conf /proc/sys/net/ipv4/ip_forward; echo added >> /etc/hosts';
    expect(await inside(id, 'sh', '-c', script)).toBe('web-0\nsearch svc\nnameserver 10.0.0.53\n1');
    expect(await inside(id, 'tail', '-n1', '/etc/hosts')).toBe('added');
    const boot = await bootId(id);
    const { info } = await sandboxes.status(id, true);
    expect(JSON.parse(info.info ?? '')).toMatchObject({
      sandboxID: id,
      pid,
      processStatus: 'running',
      vm: { bootId: boot },
    });
    const { metrics } = await sandboxes.metrics(id);
    expect(metrics).toMatchObject({ id, data: { typeUrl: expect.stringMatching(/cgroups\.v[12]\.Metrics$/) } });

    const client = await sandboxes.dial(id);
    try {
      await client.ping();
      // Which containerd asks for itself, and hands to nobody.
      expect((await client.platform()).platform).toEqual({ os: 'linux', architecture: 'amd64', variant: '' });
      expect(await client.create().catch((error: TtrpcError) => error.message)).toBe(`sandbox ${id} already exists`);
      const other = await client.status(false, 'other').catch((error: TtrpcError) => error.message);
      expect(other).toBe('sandbox other does not exist');
      const end = sandboxes.wait(id);
      await sandboxes.stop(id, 2);
      expect((await end).exitStatus).toBe(0);
      expect(await client.ping().catch((error) => error instanceof TtrpcError)).toBe(true);
    } finally {
      client.ttrpc.close();
    }
    await sandboxes.stop(id);
    expect(await sandboxes.status(id)).toMatchObject({ pid, createdAt, state: 'SANDBOX_NOTREADY' });
    expect((await sandboxes.wait(id)).exitStatus).toBe(0);
    const late = await scene.run(scene.id(), ['true'], { flags: memberFlags(id) });
    expect(late.stderr).toContain(`the pod ${id} has ended`);
    await sandboxes.shutdown(id);
    expect(existsSync(sandboxes.bundle(id))).toBe(false);
    const seen = events.lines.all.flatMap((line) => / (\/sandboxes\/\S+)/.exec(line)?.[1] ?? []);
    expect(seen).toEqual(['/sandboxes/create', '/sandboxes/start', '/sandboxes/exit', '/sandboxes/exit']);
  });

  it.each([
    ['options of another type', { options: { typeUrl: 'a.b.C', value: Buffer.from('x') } }, 'its options are a.b.C'],
    [
      'options that cannot be read',
      { options: { typeUrl: 'runtime.v1.PodSandboxConfig', value: Buffer.from([0x42, 0x7f]) } },
      'its options cannot be read as runtime.v1.PodSandboxConfig',
    ],
    ['a network namespace that is not there', { netnsPath: '/run/netns/nowhere' }, '/run/netns/nowhere does not exist'],
    ['no network namespace but a file', { netnsPath: '/etc/passwd' }, 'cannot start'],
    [
      "the host's network",
      { config: { linux: { securityContext: { namespaceOptions: { network: NamespaceMode.NODE } } } } },
      "cannot share the host's network",
    ],
    ['an annotation that is none', { config: { annotations: { 'io.kiln.vcpus': 'many' } } }, 'io.kiln.vcpus="many"'],
    [
      'a parameter that its kernel does not have',
      { config: { linux: { sysctls: { 'net.ipv4.nonsense': '1' } } } },
      'net.ipv4.nonsense',
    ],
  ])('with %s is refused, and nothing is left', async (_what, options, reason) => {
    const id = scene.id('refused');
    await expect(sandboxes.create(id, options)).rejects.toThrow(reason);
    await expect(sandboxes.start(id)).rejects.toThrow('unable to find sandbox');
    await expect(sandboxes.wait(id)).rejects.toThrow('not found');
    await sandboxes.stop(id);
    expect(existsSync(sandboxes.bundle(id))).toBe(false);
    const left = ['c', 's', 't'].flatMap((name) => readdirSync(join(scene.stateDir, name)));
    expect(left).toEqual([]);
  });

  it('outlives kilnd in each phase of its life, and containerd, and its end is told by whoever comes', async () => {
    const id = scene.id('sandbox');
    // In the middle of its creation: its directory is there.
    const creating = sandboxes.create(id, { netnsPath, config: { hostname: 'web-1' } });
    await waitForFile(join(scene.stateDir, 'c'));
    await expect.poll(() => readdirSync(join(scene.stateDir, 'c')).length, { interval: 5 }).toBe(1);
    await killKilnd();
    await creating;
    // Between its creation and its start.
    const { createdAt } = await sandboxes.status(id);
    await killKilnd();
    expect(await sandboxes.status(id)).toMatchObject({ createdAt, state: 'SANDBOX_NOTREADY' });
    const { pid } = await sandboxes.start(id);
    const boot = await bootId(id);
    const member = scene.id('member');
    await scene.start(member, waiting, { flags: memberFlags(id) });
    // While it runs, and somebody waits for its end.
    const end = sandboxes.wait(id);
    await killKilnd();
    expect(await sandboxes.status(id)).toMatchObject({ pid, createdAt, state: 'SANDBOX_READY' });
    expect(await bootId(id)).toBe(boot);
    expect(await inside(id, 'cat', '/etc/hostname')).toBe('web-1');
    end.catch(() => undefined);
    await scene.containerd.restart();
    expect(await sandboxes.status(id)).toMatchObject({ pid, createdAt, state: 'SANDBOX_READY' });
    const again = sandboxes.wait(id);
    signal(await vmOf(id), 'SIGKILL');
    const { exitStatus, exitedAt } = await again;
    // This kilnd is not the parent of the virtual machine.
    expect(exitStatus).toBe(255);
    const ended = { pid, createdAt, exitedAt, state: 'SANDBOX_NOTREADY' };
    expect(await sandboxes.status(id)).toMatchObject(ended);
    // After its end.
    await killKilnd();
    expect(await sandboxes.status(id)).toMatchObject(ended);
    expect(await sandboxes.wait(id)).toEqual({ exitStatus: 255, exitedAt });
    await expect.poll(async () => (await scene.tasks()).map(({ status }) => status)).toEqual(['STOPPED']);
    await scene.remove(member);
    await sandboxes.stop(id);
    await sandboxes.shutdown(id);
  });

  it('is stopped and shut down also when kilnd is killed meanwhile', async () => {
    const id = scene.id('sandbox');
    await sandboxes.run(id);
    const member = scene.id('member');
    await scene.start(member, waiting, { flags: memberFlags(id) });
    const end = sandboxes.wait(id);
    const stopping = sandboxes.stop(id);
    await killKilnd();
    await stopping;
    // Of one that had ended when the next kilnd came, nobody knows how.
    expect([0, 255]).toContain((await end).exitStatus);
    expect(await sandboxes.status(id)).toMatchObject({ state: 'SANDBOX_NOTREADY' });
    await expect.poll(async () => (await scene.tasks()).map(({ status }) => status)).toEqual(['STOPPED']);
    const ending = sandboxes.shutdown(id);
    await killKilnd();
    await ending;
    await scene.remove(member);
  });
});
