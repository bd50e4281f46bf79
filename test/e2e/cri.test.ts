import { readFileSync } from 'node:fs';
import { mkdir } from 'node:fs/promises';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it, vi } from 'vitest';
import {
  ContainerState,
  type ContainerStatsResponse,
  type ContainerStatusResponse,
  type CreateContainerResponse,
  type ExecSyncResponse,
  PodSandboxState,
  type PodSandboxStatusResponse,
  type PortForwardResponse,
  type RunPodSandboxResponse,
} from '../../gen/kubernetes/cri.ts';
import { NamespaceMode } from '../../gen/kubernetes/pod.ts';
import { Cri, portForwardClient } from '../support/cri.ts';
import { busyboxImage, imageArchive } from '../support/images.ts';
import { TestNetwork } from '../support/network.ts';
import { cniPlugins, runtime, underKiln } from '../support/paths.ts';
import { useScene } from '../support/use-scene.ts';

// What a kubelet asks of containerd, and containerd's CRI plugin of the runtime.

const gateway = '10.89.0.1';

const sandboxers = underKiln ? (['podsandbox', 'shim'] as const) : (['podsandbox'] as const);

describe.each(sandboxers)('a pod of CRI under containerd 2.1, by the sandboxer %s', (sandboxer) => {
  const network = new TestNetwork();
  const scene = useScene({
    version: '2.1',
    network,
    cri: {
      ...{ cniBin: cniPlugins(), cniConfig: join(network.dir, 'net.d') },
      ...{ sandboxImage: busyboxImage.name, handler: 'tested', runtimeType: runtime },
      sandboxer,
    },
  });
  let cri: Cri;
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

  const empty = { annotations: {}, labels: {} };

  it('has containers that come and go in one network, with logs, execs, statistics and limits', async () => {
    const namespaceOptions = {
      network: NamespaceMode.POD,
      pid: NamespaceMode.CONTAINER,
      ipc: NamespaceMode.POD,
      usernsOptions: undefined,
    };
    const config = {
      ...empty,
      metadata: { name: 'web', uid: scene.id('uid'), namespace: 'default', attempt: 0 },
      hostname: 'web-0',
      logDirectory: join(scene.dir, 'logs'),
      dnsConfig: { servers: ['10.0.0.53'], searches: [], options: [] },
      linux: {
        cgroupParent: `/kt-${scene.id('cri')}`,
        sysctls: {},
        securityContext: { namespaceOptions },
        resources: { memoryLimitInBytes: 256n << 20n, cpuPeriod: 100_000n, cpuQuota: 50_000n, cpuShares: 0n },
      },
    };
    const { podSandboxId } = await cri.call<RunPodSandboxResponse>((client, done) =>
      client.runPodSandbox({ config, runtimeHandler: 'tested' }, done),
    );
    const start = async (name: string, script: string) => {
      const container = {
        metadata: { name, attempt: 0 },
        image: { image: busyboxImage.name },
        command: ['sh', '-c', script],
        logPath: `${name}.log`,
        linux: {
          resources: { memoryLimitInBytes: 64n << 20n, cpuPeriod: 0n, cpuQuota: 0n, cpuShares: 0n },
          securityContext: { namespaceOptions },
        },
      };
      const request = { podSandboxId, config: container, sandboxConfig: config };
      const { containerId } = await cri.call<CreateContainerResponse>((client, done) =>
        client.createContainer(request, done),
      );
      await cri.call((client, done) => client.startContainer({ containerId }, done));
      return containerId;
    };
    const exec = async (containerId: string, ...cmd: string[]) => {
      const answer = await cri.call<ExecSyncResponse>((client, done) =>
        client.execSync({ containerId, cmd, timeout: 60n }, done),
      );
      return `${answer.stdout}${answer.stderr}`.trim();
    };
    const waiting = 'trap "exit 3" TERM; while :; do usleep 20000; done';

    const one = await start('one', `echo hello; touch /dev/shm/of-one; ${waiting}`);
    const two = await start('two', waiting);
    expect(await exec(two, 'hostname')).toBe('web-0');
    expect(await exec(two, 'ls', '/dev/shm')).toBe('of-one');
    expect(await exec(two, 'cat', '/etc/resolv.conf')).toBe('nameserver 10.0.0.53');
    expect(await exec(two, 'ping', '-c', '1', '-W', '5', gateway)).toContain('1 packets received');
    const status = await cri.call<PodSandboxStatusResponse>((client, done) =>
      client.podSandboxStatus({ podSandboxId }, done),
    );
    expect(status.status?.state).toBe(PodSandboxState.SANDBOX_READY);
    expect(await exec(one, 'ip', '-o', 'addr')).toContain(`${status.status?.network?.ip}/24`);
    expect(readFileSync(join(scene.dir, 'logs', 'one.log'), 'utf8')).toContain('stdout F hello');

    // What is at all addresses of the pod, and so at 127.0.0.1, where port-forward looks.
    await exec(two, 'sh', '-c', 'nc -ll -p 7 -e cat >/dev/null 2>&1 &');
    const forward = async (port: number) => {
      const { url } = await cri.call<PortForwardResponse>((client, done) =>
        client.portForward({ podSandboxId, port: [port] }, done),
      );
      return network.run(process.execPath, ['-e', portForwardClient, `${url}?port=${port}`, 'hello']);
    };
    await vi.waitFor(async () => expect(await forward(7)).toMatchObject({ stdout: Buffer.from('hello') }), {
      timeout: 30_000,
    });
    expect((await forward(8)).stderr).toContain('connection refused');

    const { stats } = await cri.call<ContainerStatsResponse>((client, done) =>
      client.containerStats({ containerId: two }, done),
    );
    expect(Number(stats?.memory?.workingSetBytes?.value)).toBeGreaterThan(0);
    const linux = { memoryLimitInBytes: 96n << 20n, cpuPeriod: 0n, cpuQuota: 0n, cpuShares: 0n };
    await cri.call((client, done) => client.updateContainerResources({ containerId: two, linux }, done));
    expect(await exec(two, 'cat', '/sys/fs/cgroup/memory.max')).toBe(String(96 << 20));

    await cri.call((client, done) => client.stopContainer({ containerId: one, timeout: 30n }, done));
    const ended = await cri.call<ContainerStatusResponse>((client, done) =>
      client.containerStatus({ containerId: one }, done),
    );
    expect(ended.status).toMatchObject({ state: ContainerState.CONTAINER_EXITED, exitCode: 3 });
    await cri.call((client, done) => client.removeContainer({ containerId: one }, done));
    const again = await start('again', waiting);
    expect(await exec(again, 'cat', '/proc/sys/kernel/random/boot_id')).toBe(
      await exec(two, 'cat', '/proc/sys/kernel/random/boot_id'),
    );
    await cri.call((client, done) => client.stopPodSandbox({ podSandboxId }, done));
    await cri.call((client, done) => client.removePodSandbox({ podSandboxId }, done));
  });
});
