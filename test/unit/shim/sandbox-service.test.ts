import { afterEach, describe, expect, it } from 'vitest';
import { NamespaceMode, PodSandboxConfig } from '../../../gen/kubernetes/pod.ts';
import { KilnError } from '../../../src/errors.ts';
import type { SandboxClient } from '../../support/sandbox-client.ts';
import { id, SandboxBench } from './sandbox-bench.ts';
import { Gate } from './scripted-container.ts';
import { errorOf } from './task-client.ts';

const benches: SandboxBench[] = [];
function bench(): SandboxBench {
  const made = new SandboxBench();
  benches.push(made);
  return made;
}
afterEach(async () => {
  for (const made of benches.splice(0)) await made.server.close(0);
});

const exitedAt = { seconds: 1_700_000_000n, nanos: 123_000_000 };
const missing = 'NotFound: sandbox s1 does not exist';

/** Each method but CreateSandbox. */
const others: readonly (readonly [string, (client: SandboxClient, of?: string) => Promise<unknown>])[] = [
  ['StartSandbox', (client, of) => client.start(of)],
  ['StopSandbox', (client, of) => client.stop(0, of)],
  ['WaitSandbox', (client, of) => client.wait(of)],
  ['SandboxStatus', (client, of) => client.status(false, of)],
  ['PingSandbox', (client, of) => client.ping(of)],
  ['SandboxMetrics', (client, of) => client.metrics(of)],
];

describe('the life of a sandbox', () => {
  it('is told as it goes', async () => {
    const { client, service } = bench();
    expect(service.busy).toBe(false);
    await client.create();
    expect(service.busy).toBe(true);
    const created = await client.status();
    expect(created).toMatchObject({ sandboxId: id, pid: 4242, state: 'SANDBOX_NOTREADY', info: {} });
    const { pid, createdAt } = await client.start();
    expect(pid).toBe(4242);
    expect(createdAt).toEqual(created.createdAt);
    expect(await client.status()).toMatchObject({ state: 'SANDBOX_READY', createdAt, exitedAt: undefined });
    await client.ping();
    const waiting = client.wait();
    await client.stop();
    expect(await waiting).toEqual({ exitStatus: 0, exitedAt });
    expect(await client.wait()).toEqual({ exitStatus: 0, exitedAt });
    expect(await client.status()).toMatchObject({ pid: 4242, state: 'SANDBOX_NOTREADY', createdAt, exitedAt });
    expect(await errorOf(client.ping())).toBe('FailedPrecondition: container s1 has ended');
    await client.shutdown();
    expect(service.busy).toBe(false);
    expect(await errorOf(client.status())).toBe(missing);
  });

  it('ends by itself for whoever waits, be it before its start', async () => {
    const { client, sandbox } = bench();
    await client.create();
    const waiting = client.wait();
    sandbox.end(255);
    expect(await waiting).toEqual({ exitStatus: 255, exitedAt });
    expect((await client.status()).state).toBe('SANDBOX_NOTREADY');
    expect(await errorOf(client.start())).toBe('FailedPrecondition: cannot start container s1: it is stopped');
  });

  it('is ended in the time that StopSandbox gives it, and once', async () => {
    const made = bench();
    await made.running();
    await made.client.stop(7);
    await made.client.stop();
    expect(made.sandbox.calls).toEqual(['start', 'stop 7000', 'stop undefined']);
  });

  it('says for the operator what it is made of', async () => {
    const made = bench();
    await made.running();
    const { info } = await made.client.status(true);
    expect(JSON.parse(info.info ?? '')).toEqual({ sandboxID: id, pid: 4242, vm: { vmm: 'scripted' } });
  });

  it('has the statistics of what stands for it', async () => {
    const made = bench();
    await made.running();
    const { metrics } = await made.client.metrics();
    expect(metrics?.id).toBe(id);
    expect(metrics?.data?.typeUrl).toMatch(/^io\.containerd\.cgroups\.v[12]\.Metrics$/);
    expect(metrics?.timestamp?.seconds).toBeGreaterThan(1_700_000_000n);
  });

  it('runs on Linux, for the processor that this is', async () => {
    const { client } = bench();
    const { platform } = await client.platform();
    expect(platform).toEqual({
      os: 'linux',
      architecture: process.arch === 'x64' ? 'amd64' : process.arch,
      variant: '',
    });
    expect(await errorOf(client.platform('s2'))).toBe('NotFound: sandbox s2 does not exist');
  });
});

describe('a request that makes no sense', () => {
  it.each(others)('%s of a sandbox that was not created, or is not this one, is refused', async (_name, call) => {
    const made = bench();
    expect(await errorOf(call(made.client))).toBe(missing);
    await made.running();
    expect(await errorOf(call(made.client, 's2'))).toBe('NotFound: sandbox s2 does not exist');
    expect(made.sandbox.calls).toEqual(['start']);
  });

  it('is a second CreateSandbox, or one for another', async () => {
    const { client } = bench();
    expect(await errorOf(client.create({ sandboxId: 's2' }))).toBe(
      'InvalidArgument: this endpoint serves sandbox s1, not s2',
    );
    await client.create();
    expect(await errorOf(client.create())).toBe('AlreadyExists: sandbox s1 already exists');
  });

  it('is a second StartSandbox', async () => {
    const made = bench();
    await made.running();
    expect(await errorOf(made.client.start())).toBe('FailedPrecondition: cannot start container s1: it is running');
  });

  it.each([
    [
      'of another type',
      { typeUrl: 'x.y.Z', value: Buffer.from('a') },
      'its options are x.y.Z, not runtime.v1.PodSandboxConfig',
    ],
    [
      'that are broken',
      { typeUrl: 'runtime.v1.PodSandboxConfig', value: Buffer.from([0x42, 0x7f]) },
      'its options cannot be read as runtime.v1.PodSandboxConfig',
    ],
  ])('is one with options %s, and it leaves nothing', async (_what, options, reason) => {
    const made = bench();
    expect(await errorOf(made.client.create({ options }))).toBe(`InvalidArgument: sandbox s1: ${reason}`);
    expect(made.request).toBeUndefined();
    expect([made.service.busy, made.saved]).toEqual([false, []]);
    expect(made.log.map(({ level, msg }) => [level, msg])).toEqual([['error', 'CreateSandbox failed']]);
    await made.client.shutdown();
    await made.client.create();
  });
});

describe('CreateSandbox', () => {
  it('hands on what CRI says of the pod', async () => {
    const made = bench();
    const config = PodSandboxConfig.fromPartial({
      hostname: 'web-0',
      annotations: { 'io.kiln.vcpus': '2', 'example.com/x': 'y' },
      dnsConfig: { servers: ['10.0.0.53'], searches: ['svc'], options: ['ndots:5'] },
      linux: {
        cgroupParent: '/kubepods/pod1',
        sysctls: { 'net.ipv4.ip_forward': '1' },
        securityContext: {
          namespaceOptions: { network: NamespaceMode.NODE, pid: NamespaceMode.CONTAINER, ipc: NamespaceMode.POD },
        },
        resources: { memoryLimitInBytes: 7n, cpuQuota: 8n, cpuPeriod: 9n, cpuShares: 10n },
      },
    });
    const options = {
      typeUrl: 'runtime.v1.PodSandboxConfig',
      value: Buffer.from(PodSandboxConfig.encode(config).finish()),
    };
    await made.client.create({ bundlePath: '/b', netnsPath: '/run/netns/n', annotations: { a: 'b' }, options });
    expect(made.request).toEqual({
      ...{ id, bundle: '/b', networkNamespace: '/run/netns/n' },
      pod: {
        hostname: 'web-0',
        annotations: { a: 'b', 'io.kiln.vcpus': '2', 'example.com/x': 'y' },
        sysctls: { 'net.ipv4.ip_forward': '1' },
        cgroupParent: '/kubepods/pod1',
        namespaces: { network: 'node', pid: 'container', ipc: 'pod' },
        userNamespace: false,
        resources: { memoryLimit: 7n, cpuQuota: 8n, cpuPeriod: 9n, cpuShares: 10n },
        dns: { servers: ['10.0.0.53'], searches: ['svc'], options: ['ndots:5'] },
      },
    });
  });

  it('without options asks for a pod of defaults', async () => {
    const made = bench();
    await made.client.create();
    expect(made.request).toMatchObject({ networkNamespace: undefined, pod: { hostname: '', userNamespace: false } });
    expect(made.request?.pod.namespaces).toEqual({ network: 'pod', pid: 'pod', ipc: 'pod' });
  });

  it('knows a user namespace from none', async () => {
    const made = bench();
    const config = PodSandboxConfig.fromPartial({
      linux: { securityContext: { namespaceOptions: { usernsOptions: { mode: NamespaceMode.POD } } } },
    });
    const value = Buffer.from(PodSandboxConfig.encode(config).finish());
    await made.client.create({ options: { typeUrl: 'runtime.v1.PodSandboxConfig', value } });
    expect(made.request?.pod.userNamespace).toBe(true);
  });

  it('that fails can be tried again', async () => {
    const made = bench();
    made.creation = new Gate();
    made.creation.fail(new KilnError('resource-exhausted', 'the host is too small'));
    expect(await errorOf(made.client.create())).toBe('ResourceExhausted: the host is too small');
    expect([made.service.busy, made.saved]).toEqual([false, []]);
    made.creation = undefined;
    await made.running();
  });

  it('is given up by ShutdownSandbox, which leaves nothing', async () => {
    const made = bench();
    made.creation = new Gate();
    const creating = errorOf(made.client.create());
    await made.creation.entered;
    await made.client.shutdown();
    expect(await creating).toBe('Canceled: sandbox s1 was shut down during CreateSandbox');
    expect([made.service.busy, made.saved]).toEqual([false, []]);
  });

  it('whose client has gone meanwhile is undone', async () => {
    const made = bench();
    made.creation = new Gate();
    const gone = made.connect();
    const creating = errorOf(gone.create());
    await made.creation.entered;
    gone.ttrpc.close();
    await creating;
    await expect.poll(() => made.service.busy).toBe(false);
    expect(made.saved).toEqual([]);
  });
});

describe('a sandbox that is gone', () => {
  it('can be shut down once more', async () => {
    const made = bench();
    await made.running();
    await made.client.shutdown();
    await made.client.shutdown();
    expect(made.sandbox.calls).toEqual(['start', 'destroy']);
    expect(made.saved.at(-1)).toBeUndefined();
  });

  it('is not gone while it cannot be released', async () => {
    const made = bench();
    await made.running();
    made.sandbox.gates.destroy = new Gate();
    made.sandbox.gates.destroy.fail(new KilnError('internal', 'EBUSY: jail'));
    expect(await errorOf(made.client.shutdown())).toContain('EBUSY: jail');
    expect(made.service.busy).toBe(true);
    delete made.sandbox.gates.destroy;
    await made.client.shutdown();
    expect(made.service.busy).toBe(false);
  });

  it("tells the launcher's delete how it ended, whoever has ended it", async () => {
    const stopped = bench();
    await stopped.running();
    await stopped.client.stop();
    await stopped.client.shutdown();
    expect(await stopped.service.forceDelete()).toMatchObject({ pid: 4242, exit: { status: 0 } });
    const living = bench();
    await living.running();
    expect(await living.service.forceDelete()).toMatchObject({ pid: 4242, exit: { status: 137 } });
    expect(living.service.busy).toBe(false);
    expect(await errorOf(living.client.create())).toBe('Unavailable: sandbox s1 is being deleted');
    expect(await bench().service.forceDelete()).toBeUndefined();
  });

  it('is none for delete that cannot be released; the log says why', async () => {
    const made = bench();
    await made.running();
    made.sandbox.gates.destroy = new Gate();
    made.sandbox.gates.destroy.fail(new Error('EBUSY'));
    expect(await made.service.forceDelete()).toBeUndefined();
    expect(made.log.at(-1)).toMatchObject({ level: 'error', msg: 'cannot release everything of the sandbox' });
  });
});

describe('a sandbox of an earlier kilnd', () => {
  const state = { createdAtMs: 1_600_000_000_000 };
  const createdAt = { seconds: 1_600_000_000n, nanos: 0 };
  const before = { pid: 77, ready: true };

  it('goes on as it was created', async () => {
    const first = bench();
    await first.running();
    const made = bench();
    made.sandbox.state = { kind: 'running' };
    await made.service.restore(first.saved.at(-1)!, before, Promise.resolve(made.sandbox));
    expect((await made.client.status()).createdAt).toEqual((await first.client.status()).createdAt);
    expect(await made.client.status()).toMatchObject({ pid: 4242, state: 'SANDBOX_READY' });
    expect(await errorOf(made.client.create())).toBe('AlreadyExists: sandbox s1 already exists');
  });

  it('has a status while it is taken over, and everything else waits', async () => {
    const made = bench();
    const { promise, resolve } = Promise.withResolvers<typeof made.sandbox>();
    const restoring = made.service.restore(state, before, promise);
    expect(made.service.busy).toBe(true);
    expect(await made.client.status(true)).toMatchObject({ pid: 77, state: 'SANDBOX_READY', createdAt });
    const waiting = made.client.wait();
    const ping = made.client.ping();
    made.sandbox.state = { kind: 'running' };
    resolve(made.sandbox);
    await restoring;
    await ping;
    made.sandbox.end(137);
    expect(await waiting).toEqual({ exitStatus: 137, exitedAt });
  });

  it('that cannot be taken over is none', async () => {
    const made = bench();
    await made.service.restore(state, before, Promise.reject(new Error('deleted')));
    expect(await errorOf(made.client.wait())).toBe(missing);
    expect(made.log[0]).toMatchObject({ level: 'error', msg: 'cannot take the sandbox over' });
    await made.client.shutdown();
  });

  it('is not created, nor started, twice when the requests come again', async () => {
    const made = bench();
    made.sandbox.state = { kind: 'running' };
    await made.service.restore(state, before, Promise.resolve(made.sandbox));
    await made.connect(1).create();
    expect(await made.connect(1).start()).toMatchObject({ pid: 4242, createdAt });
    expect(made.sandbox.calls).toEqual([]);
  });

  it('is created and started when the requests come again that nobody has begun', async () => {
    const made = bench();
    await made.connect(1).create();
    await made.connect(1).start();
    expect(made.sandbox.calls).toEqual(['start']);
  });
});
