/** What CRI-O asks of an OCI runtime, through conmon: test/support/subreaper.c is in conmon's place here. */
import { randomBytes } from 'node:crypto';
import { existsSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { NetworkNamespace } from '../../src/sys/netns.ts';
import { type Bundle, type OciStage, useOciStage } from '../support/oci-stage.ts';
import { mustRun } from '../support/spawn.ts';
import { signal } from '../support/wait-for-end.ts';

/** Ends with SIGTERM. */
const waiting = ['sh', '-c', 'trap "exit 9" TERM; while :; do sleep 1000 & wait $!; done'];
const mib = 2 ** 20;
const bootId = '/proc/sys/kernel/random/boot_id';
const podResources = 'io.kubernetes.cri-o.PodLinuxResources';

/** As an exec's process stands in a file. */
const processOf = (args: readonly string[]) => ({ args, cwd: '/', env: ['PATH=/bin'], user: { uid: 0, gid: 0 } });

/** A pod of CRI-O: its id, and the namespace that CRI-O has made for it. */
class CrioPod implements Disposable {
  readonly id = randomBytes(32).toString('hex');
  readonly #network = NetworkNamespace.create();
  readonly #stage: OciStage;

  constructor(stage: OciStage) {
    this.#stage = stage;
  }

  get networkNamespace(): string {
    return `/proc/${process.pid}/fd/${this.#network.fd}`;
  }

  #annotations(type: 'sandbox' | 'container', id: string) {
    return {
      'io.container.manager': 'cri-o',
      'io.kubernetes.cri-o.ContainerID': id,
      'io.kubernetes.cri-o.ContainerType': type,
      'io.kubernetes.cri-o.SandboxID': this.id,
    };
  }

  /** What a spec of CRI-O's says of namespaces. */
  namespaces(pid: { readonly path?: string } = {}) {
    const named = (type: string) => ({ type, path: `/run/${type}ns/${this.id}` });
    const network = { type: 'network', path: this.networkNamespace };
    return [{ type: 'pid', ...pid }, network, named('ipc'), named('uts'), { type: 'mount' }];
  }

  /** Of the infra container. */
  sandbox(resources = 'null', namespaces: readonly object[] = this.namespaces()): Promise<Bundle> {
    const annotations = { ...this.#annotations('sandbox', this.id), [podResources]: resources };
    const sysctl = { 'net.ipv4.ip_unprivileged_port_start': '0' };
    const over = { hostname: 'web-0', linux: { namespaces, sysctl } };
    return this.#stage.bundle({ args: ['/pause'], annotations, over });
  }

  /** RunPodSandbox. */
  async run(resources?: string) {
    return this.#startNew(this.id, await this.sandbox(resources));
  }

  bundle(id: string, linux: object = {}, args: readonly string[] = waiting): Promise<Bundle> {
    const shm = { destination: '/dev/shm', type: 'bind', source: '/run/shm-of-pod', options: ['rw', 'bind'] };
    const annotations = this.#annotations('container', id);
    const over = { hostname: 'web-0', linux: { namespaces: this.namespaces(), ...linux } };
    return this.#stage.bundle({ args, annotations, mounts: [shm], over });
  }

  /** CreateContainer and StartContainer. */
  async start(id: string, bundle?: Bundle) {
    return this.#startNew(id, bundle ?? (await this.bundle(id)));
  }

  async #startNew(id: string, bundle: Bundle) {
    const created = await this.#stage.create(id, bundle);
    for (const stream of [created.program.stdout, created.program.stderr]) stream.resume();
    await this.#stage.must(['start', id]);
    return created;
  }

  [Symbol.dispose](): void {
    this.#network[Symbol.dispose]();
  }
}

describe('CRI-O', () => {
  const stage = useOciStage();

  /** As Exec and ExecSync ask: the process in a file. */
  async function exec(id: string, ...args: string[]): Promise<string> {
    const file = join(stage.dir, 'process.json');
    writeFileSync(file, JSON.stringify(processOf(args)));
    return (await stage.must(['exec', '--process', file, id])).trim();
  }

  it('asks what runtime it is', async () => {
    expect(await stage.must(['--version'])).toMatch(/^[0-9]+[.]/);
    expect(JSON.parse(await stage.must(['features']))).toMatchObject({
      ociVersionMin: '1.0.0',
      mountOptions: expect.arrayContaining(['rro']),
    });
  });

  it('has the containers of a pod in one virtual machine, which is as large as the pod may be', async () => {
    using pod = new CrioPod(stage);
    await using infra = (await pod.run('{"memory_limit_in_bytes":201326592}')).program;
    await using one = (await pod.start('one')).program;
    await using two = (await pod.start('two')).program;
    const [boot, kib] = (
      await exec('one', 'sh', '-c', `cat ${bootId}; awk '/MemTotal/ { print $2 }' /proc/meminfo`)
    ).split('\n');
    expect(await exec('two', 'cat', bootId)).toBe(boot);
    expect(Number(kib)).toBeLessThan(320 * 1024);
    await exec('one', 'touch', '/dev/shm/of-one', '/of-one');
    expect(
      await exec('two', 'sh', '-c', 'hostname; ls /dev/shm; cat /proc/sys/net/ipv4/ip_unprivileged_port_start'),
    ).toBe('web-0\nof-one\n0');
    expect(await stage.run(['exec', 'two', 'ls', '/of-one'])).toMatchObject({ code: 1 });

    const resources = {
      memory: { limit: 33554432, swap: 33554432 },
      cpu: { shares: 512, quota: 100000, period: 100000 },
      pids: { limit: 50 },
    };
    await stage.must(['update', '--resources', '-', 'one'], { stdin: JSON.stringify(resources) });
    await stage.must(['kill', 'one', 'TERM']);
    expect(await one.exit).toBe(9);
    expect(await stage.state('one')).toMatchObject({ status: 'stopped' });
    await stage.must(['delete', '--force', 'one']);
    await using again = (await pod.start('one')).program;
    expect(await exec('one', 'cat', bootId)).toBe(boot);

    // What conmon does to the process of an ExecSync whose time is over.
    const file = join(stage.dir, 'process.json');
    const pidFile = join(stage.dir, 'exec.pid');
    writeFileSync(file, JSON.stringify(processOf(['sleep', '1234'])));
    const detached = [stage.kiln, 'exec', '--detach', '--process', file, '--pid-file', pidFile, 'two'];
    // What it leaves behind keeps its stdio open.
    await mustRun('sh', ['-c', 'exec "$@" >/dev/null 2>&1', 'sh', ...detached], { env: stage.env });
    expect(await stage.must(['ps', 'two'])).toContain('sleep 1234');
    signal(Number(readFileSync(pidFile, 'utf8')), 'SIGKILL');
    await expect.poll(() => stage.must(['ps', 'two']), { timeout: 20_000 }).not.toContain('sleep 1234');

    const hungry = await pod.bundle('hungry', { resources: { memory: { limit: 15 * mib, swap: 15 * mib } } }, [
      ...['dd', 'if=/dev/zero', 'of=/dev/null', 'bs=60M'],
    ]);
    await using starved = (await pod.start('hungry', hungry)).program;
    expect(await starved.exit).toBe(137);
    expect(existsSync(join(hungry.directory, 'oom'))).toBe(true);

    // StopPodSandbox ends the containers first, RemovePodSandbox removes them.
    for (const [id, program] of [
      ['one', again],
      ['two', two],
    ] as const) {
      await stage.must(['kill', id, 'KILL']);
      expect(await program.exit).toBe(137);
    }
    await stage.must(['kill', pod.id, 'TERM']);
    expect(await infra.exit).toBe(0);
    for (const id of ['one', 'two', 'hungry', pod.id]) await stage.must(['delete', '--force', id]);
  });

  it('is told what a container of a pod cannot have', async () => {
    using pod = new CrioPod(stage);
    using other = new CrioPod(stage);
    const refused = async (id: string, bundle: Bundle) => {
      const result = await stage.run(['create', '--bundle', bundle.directory, id]);
      expect(result.code).toBe(1);
      return result.stderr;
    };
    // As for hostIPC: a mount of the host's own.
    const ofHost = join(stage.dir, 'ipc-of-host');
    writeFileSync(ofHost, '');
    await mustRun('mount', ['--bind', '/proc/self/ns/ipc', ofHost]);
    try {
      const namespaces = pod.namespaces().map((one) => (one.type === 'ipc' ? { ...one, path: ofHost } : one));
      const sharing = await refused(pod.id, await pod.sandbox('null', namespaces));
      expect(sharing).toContain("cannot share the host's IPC objects");
    } finally {
      await mustRun('umount', [ofHost]);
    }

    const lonely = await refused('lonely', await pod.bundle('lonely'));
    expect(lonely).toContain(`there is no pod ${pod.id}`);
    expect(lonely).toContain('drop_infra_ctr = false');

    await using infra = (await pod.run()).program;
    const debugging = await pod.bundle('debugging', { namespaces: pod.namespaces({ path: '/run/pidns/of-target' }) });
    expect(await refused('debugging', debugging)).toContain('joining a pid namespace is not supported yet');
    const foreign = await pod.bundle('foreign', { namespaces: other.namespaces() });
    expect(await refused('foreign', foreign)).toContain("is not that of the container's pod");
    // As shareProcessNamespace asks for: the infra container's.
    const { pid } = await stage.state(pod.id);
    const withInfra = await pod.bundle('member', { namespaces: pod.namespaces({ path: `/proc/${pid}/ns/pid` }) });
    await using member = (await pod.start('member', withInfra)).program;
    expect(await exec('member', 'cat', '/proc/1/comm')).not.toBe('sh');
    for (const id of ['member', pod.id]) await stage.must(['delete', '--force', id]);
    expect([await member.exit, await infra.exit]).toEqual([137, 137]);
  });
});
