import { once } from 'node:events';
import { closeSync, existsSync, mkdirSync, readdirSync, readFileSync, statSync, symlinkSync } from 'node:fs';
import net from 'node:net';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import type { ControlGroup } from '../../../../src/host/control-group.ts';
import { CounterSums } from '../../../../src/observe/counter-sums.ts';
import { loggerTo } from '../../../../src/observe/logger.ts';
import { createFirecracker, type FirecrackerOptions } from '../../../../src/vmm/firecracker/driver.ts';
import { clearJail } from '../../../../src/vmm/firecracker/jail.ts';
import { claimUid } from '../../../../src/vmm/firecracker/jail-uids.ts';
import { readOnlySlots, type Vm, type VmConfig, type VmRecord, writableSlots } from '../../../../src/vmm/vmm.ts';
import { parking, playedTaps, Workspace } from '../workspace.ts';
import { FakeKernel } from './fake-kernel.ts';

/** The driver, with Firecracker played by a program of ours; for the real one see test/integration/vmm. */
let workspace: Workspace;
let vms: Vm[];
let kernel: FakeKernel;
let log: Record<string, unknown>[];
const logger = loggerTo({ write: (line) => void log.push(JSON.parse(line)) }, 'trace');
beforeEach(() => {
  workspace = new Workspace();
  vms = [];
  kernel = new FakeKernel();
  log = [];
});
afterEach(async () => {
  for (const vm of vms) await vm.kill();
  workspace[Symbol.dispose]();
});

/** Some block device of this machine, which nobody opens. */
const blockDevice = readdirSync('/dev')
  .map((name) => path.join('/dev', name))
  .find((file) => statSync(file, { throwIfNoEntry: false })?.isBlockDevice());

const never = new AbortController().signal;

interface Host {
  readonly options?: Partial<FirecrackerOptions>;
  readonly config?: Partial<VmConfig>;
  readonly kvm?: boolean;
  /** What the jailer does; without one there is no jail. */
  readonly jailer?: string;
}

const uids = { first: 7000, count: 3 };

function vmm(mode: string, { options, kvm = true, jailer }: Host = {}) {
  if (kvm) {
    mkdirSync(workspace.path('modules/kvm_intel'), { recursive: true });
    workspace.file('kvm');
  }
  const jail = () => (jailer === undefined ? undefined : { jailer: workspace.jailer(jailer), uids });
  const defaults = {
    jail,
    logger,
    parking,
    hugePages: false,
    bootTimer: false,
    memoryMaxMib: 0,
    diskLimits: { bytesPerS: 0, opsPerS: 0 },
    networkLimits: { bytesPerS: 0, opsPerS: 0 },
  };
  return createFirecracker({ firecracker: workspace.firecracker(mode), ...defaults, ...options }, host());
}

/** The host of jails, with cgroups of version 2 that a folder plays. */
function host() {
  const cgroups = workspace.path('cgroup');
  mkdirSync(cgroups, { recursive: true });
  workspace.file('cgroup/cgroup.controllers', 'cpu memory pids\n');
  const mounts = workspace.file('mounts', `cgroup2 ${cgroups} cgroup2 rw 0 0\n`);
  return {
    devices: workspace.devices(),
    jails: { kernel, claims: workspace.path('claims'), mounts },
    makeTaps: playedTaps,
  };
}

function claims(): string[] {
  return existsSync(workspace.path('claims')) ? readdirSync(workspace.path('claims')) : [];
}

async function boot(mode: string, host: Host = {}, signal = never): Promise<Vm> {
  const vm = await vmm(mode, host).boot(workspace.vm(host.config), signal);
  vms.push(vm);
  return vm;
}

function expectNothingLeft(): void {
  expect(workspace.processes()).toEqual([]);
  expect(workspace.files()).toEqual([]);
  expect(claims()).toEqual([]);
  expect([...kernel.mounts]).toEqual([]);
}

/** As Firecracker makes it of a file. */
function serialOf(file: string): string {
  const { dev, rdev, ino } = statSync(file, { bigint: true });
  return `${dev}${rdev}${ino}`.slice(0, 20);
}

/** A control group that notes what is done to it. */
function notingGroup() {
  const done: unknown[] = [];
  const group: ControlGroup = {
    add: async (pid) => void done.push(pid),
    limit: (limits) => void done.push(limits),
  };
  return { done, group };
}

describe('the control group of a container', () => {
  test('has Firecracker, from its start or later', async () => {
    const { done, group } = notingGroup();
    const vm = await boot('running', { config: { controlGroup: group } });
    expect(done).toEqual([vm.pid]);
    const other = notingGroup();
    await vm.enter(other.group);
    expect(other.done).toEqual([vm.pid]);
  });

  test('has a jailed one with the limits of the jail, whose own groups it leaves, and room for more processes', async () => {
    const { done, group } = notingGroup();
    const config = { memoryMib: 256, vcpus: 2, controlGroup: group };
    const vm = await boot('running', { jailer: 'jail', config });
    const limits = { memoryBytes: (256 + 16 + 512) * 2 ** 20, pids: 2 + 16 + 1024 };
    expect(done).toEqual([vm.pid, limits]);
    const other = notingGroup();
    await vm.enter(other.group);
    expect(other.done).toEqual([vm.pid, limits]);
  });

  test('that cannot have it lets the start fail, and leaves nothing', async () => {
    const group = { ...notingGroup().group, add: () => Promise.reject(new Error('no such group')) };
    await expect(boot('running', { config: { controlGroup: group } })).rejects.toThrow('no such group');
    expectNothingLeft();
  });
});

describe('a start', () => {
  test('configures the VM, drives and vsock included, and starts it; the agent calls', async () => {
    const vm = await boot('running', { config: { id: 'my_c.1', memoryMib: 256, vcpus: 2 } });
    const agent = await vm.acceptAgent(never);
    expect(String(await once(agent, 'data'))).toBe('hello');
    agent.destroy();
    const requests = workspace.firecrackerRequests();
    const slots = [...readOnlySlots, ...writableSlots.slice(0, 4)];
    expect(vm.freeSlots).toEqual(slots);
    expect(requests.map(({ name }) => name)).toEqual([
      ...['GET /version', 'PUT /serial', 'PUT /machine-config', 'PUT /boot-source', 'PUT /drives/guest'],
      ...slots.map((slot) => `PUT /drives/${slot}`),
      ...['PUT /vsock', 'PUT /entropy', 'PUT /balloon', 'PUT /actions'],
    ]);
    const bodyOf = (name: string) => requests.find((request) => request.name === name)?.body;
    expect(bodyOf('PUT /serial')).toEqual({ rate_limiter: { size: 65536, refill_time: 10_000 } });
    expect(bodyOf('PUT /machine-config')).toEqual({ vcpu_count: 2, mem_size_mib: 256 });
    expect(bodyOf('PUT /boot-source')).toMatchObject({
      kernel_image_path: workspace.path('vmlinux'),
      initrd_path: workspace.path('initrd'),
    });
    const { boot_args: words } = bodyOf('PUT /boot-source') as { boot_args: string };
    // FAQ.md: an x86 guest ends Firecracker by a reboot through the keyboard controller, not by a power-off.
    for (const word of ['reboot=k', 'panic=-1', `kiln.image_serial=${serialOf(workspace.path('guest.erofs'))}`]) {
      expect(words.split(' ')).toContain(word);
    }
    expect(bodyOf('PUT /drives/guest')).toMatchObject({ is_read_only: true, is_root_device: false });
    expect(bodyOf('PUT /drives/ro7')).toMatchObject({ is_read_only: true });
    expect(bodyOf('PUT /drives/rw1')).toMatchObject({ is_read_only: false, cache_type: 'Writeback' });
    const { path_on_host: empty } = bodyOf('PUT /drives/rw1') as { path_on_host: string };
    expect(statSync(empty)).toMatchObject({ size: 2 ** 40, blocks: 0 });
  });

  test('gives the VM network cards, and fewer drive slots for them', async () => {
    const vm = await boot('running', { config: { networkCards: 3 } });
    const cards = workspace.firecrackerRequests().filter(({ name }) => name.startsWith('PUT /network-interfaces/'));
    expect(cards.map(({ name, body }) => [name, body])).toEqual(
      vm.nics.map(({ mac, tap }, index) => [
        `PUT /network-interfaces/net${index}`,
        { iface_id: `net${index}`, host_dev_name: tap, guest_mac: mac },
      ]),
    );
    expect(vm.freeSlots).toEqual([...readOnlySlots.slice(0, 5), ...writableSlots.slice(0, 4)]);
    const adopted = JSON.parse(JSON.stringify(vm.record()));
    expect(adopted.nics).toEqual(vm.nics);
  });

  test('has a drive slot empty again, for another file', async () => {
    const vm = await boot('running');
    const lastBody = () => workspace.firecrackerRequests().at(-1)?.body;
    const empty = (workspace.firecrackerRequests().find(({ name }) => name === 'PUT /drives/rw1')?.body ??
      {}) as object;
    await vm.attachDisk('rw1', workspace.file('one'));
    await vm.detachDisk('rw1');
    expect(lastBody()).toEqual({ drive_id: 'rw1', path_on_host: Object(empty).path_on_host });
    expect(vm.freeSlots).toContain('rw1');
    await vm.attachDisk('rw1', workspace.file('two'));
    expect(lastBody()).toEqual({ drive_id: 'rw1', path_on_host: workspace.path('two') });
    const before = workspace.firecrackerRequests().length;
    await vm.detachDisk('ro0');
    expect(workspace.firecrackerRequests()).toHaveLength(before);
  });

  test('has the files of its guest by the connection that the guest dials', async () => {
    const vm = await boot('running');
    const accepting = vm.acceptFiles(never);
    const guest = net.connect(path.join(workspace.sandbox, 'vsock_9000')).on('error', () => {});
    closeSync(await accepting);
    guest.destroy();
    const ended = expect(vm.acceptFiles(never)).rejects.toThrow(
      'Firecracker ended (SIGKILL) before its files were served',
    );
    process.kill(vm.pid, 'SIGKILL');
    await ended;
  });

  test('of a kernel with everything built in lets it mount the first disk', async () => {
    await boot('running', { config: { initrd: undefined } });
    const { body } = workspace.firecrackerRequests().find(({ name }) => name === 'PUT /boot-source') ?? {};
    expect(body).not.toHaveProperty('initrd_path');
    expect((body as { boot_args: string }).boot_args).toContain('root=/dev/vda rootfstype=erofs ro');
  });
});

describe('a start, where it is asked for,', () => {
  const bodyOf = (name: string) => workspace.firecrackerRequests().find((request) => request.name === name)?.body;

  test('limits each disk of a container, and not the guest image', async () => {
    await boot('running', { options: { diskLimits: { bytesPerS: 5 * 2 ** 20, opsPerS: 100 } } });
    const limiter = { bandwidth: { size: 5 * 2 ** 20, refill_time: 1000 }, ops: { size: 100, refill_time: 1000 } };
    for (const slot of ['ro0', 'rw1']) expect(bodyOf(`PUT /drives/${slot}`)).toMatchObject({ rate_limiter: limiter });
    expect(bodyOf('PUT /drives/guest')).not.toHaveProperty('rate_limiter');
  });

  test('limits each network card, both ways', async () => {
    const networkLimits = { bytesPerS: 2 ** 20, opsPerS: 0 };
    await boot('running', { config: { networkCards: 2 }, options: { networkLimits } });
    const bandwidth = { size: 2 ** 20, refill_time: 1000 };
    expect(bodyOf('PUT /network-interfaces/net1')).toMatchObject({
      rx_rate_limiter: { bandwidth },
      tx_rate_limiter: { bandwidth },
    });
    expect(bodyOf('PUT /drives/rw0')).not.toHaveProperty('rate_limiter');
  });

  test('limits what alone has a limit', async () => {
    await boot('running', { options: { diskLimits: { bytesPerS: 0, opsPerS: 100 } } });
    expect(bodyOf('PUT /drives/rw0')).toMatchObject({ rate_limiter: { ops: { size: 100, refill_time: 1000 } } });
    expect(bodyOf('PUT /drives/rw0')).not.toHaveProperty('rate_limiter.bandwidth');
  });

  test('has the guest tell when its first program starts, and the log how long that took', async () => {
    const vm = await boot('running', { options: { bootTimer: true } });
    await vm.kill();
    expect(log).toContainEqual(
      expect.objectContaining({
        ...{ level: 'info', vm: 'one', guestBootMs: 12.345, guestBootCpuMs: 6.789 },
        msg: "the guest's first program runs",
      }),
    );
  });

  test('counts what Firecracker counts, for all VMs together', async () => {
    const sums = new CounterSums(10);
    await (await boot('running', { options: { count: sums.add } })).kill();
    await (await boot('running', { options: { count: sums.add } })).kill();
    expect(sums.sums).toEqual({ 'put_api_requests.drive_count': 22, 'vsock.conn_event_fails': 4 });
  });

  test('takes memory in huge pages, of which there have to be enough', async () => {
    const asked = { options: { hugePages: true }, config: { memoryMib: 129 } };
    const pages = (free: number) =>
      `vm.huge_pages is set, but the host has ${free} free pages of 2 MiB, and the VM needs 65`;
    await expect(boot('running', asked)).rejects.toMatchObject({ code: 'resource-exhausted', message: pages(0) });
    workspace.file('free_hugepages', '64\n');
    await expect(boot('running', asked)).rejects.toMatchObject({
      message: pages(64),
      hint: 'raise vm.nr_hugepages (sysctl), or set vm.huge_pages = false in the config file',
    });
    expectNothingLeft();
    workspace.file('free_hugepages', '65\n');
    await boot('running', asked);
    expect(bodyOf('PUT /machine-config')).toEqual({ vcpu_count: 1, mem_size_mib: 130, huge_pages: '2M' });
    expect(bodyOf('PUT /balloon')).toBeUndefined();
  });

  test('has free memory reported by the guest, from version 1.14 on', async () => {
    await boot('version=1.14.0');
    expect(bodyOf('PUT /balloon')).toEqual({ amount_mib: 0, deflate_on_oom: true, free_page_reporting: true });
  });

  test('is of version 1.13 without that', async () => {
    await boot('version=1.13.2');
    expect(bodyOf('PUT /balloon')).toBeUndefined();
  });
});

describe('a start that fails', () => {
  test.each([
    ['the guest kernel', 'kernel'],
    ['the guest initrd', 'initrd'],
    ['the guest image', 'guestImage'],
  ])('because %s is missing names the file, and starts nothing', async (what, key) => {
    await expect(boot('running', { config: { [key]: '/no/such/file' } })).rejects.toMatchObject({
      code: 'failed-precondition',
      message: `${what} /no/such/file cannot be read: ENOENT`,
    });
    expectNothingLeft();
  });

  test('because there is no hardware KVM says what is missing, and what to do', async () => {
    await expect(boot('running', { kvm: false })).rejects.toMatchObject({
      code: 'failed-precondition',
      message: 'Firecracker needs hardware KVM, but none of the kernel modules kvm_intel, kvm_amd is loaded',
      hint: 'load the KVM module, or set vm.vmm = "qemu" in the config file',
    });
    expectNothingLeft();
  });

  test('because it is not installed names vm.firecracker', async () => {
    await expect(boot('running', { options: { firecracker: '/no/firecracker' } })).rejects.toMatchObject({
      code: 'failed-precondition',
      message: 'cannot run Firecracker (vm.firecracker in the config file) "/no/firecracker": ENOENT',
      hint: 'install Firecracker, or set vm.vmm = "qemu"',
    });
    expectNothingLeft();
  });

  test.each(['1.12.1', '0.25.0', '2.0.0', 'undefined'])(
    'because it is version %s says which would do',
    async (version) => {
      await expect(boot(`version=${version}`)).rejects.toMatchObject({
        code: 'failed-precondition',
        message: `Firecracker ${version} is not supported`,
        hint: 'install version 1.13 or newer, or set vm.vmm = "qemu" in the config file',
      });
      expectNothingLeft();
    },
  );

  test('because more vCPUs are asked for than it has', async () => {
    await expect(boot('running', { config: { vcpus: 33 } })).rejects.toThrow("33 vCPUs are more than Firecracker's 32");
    expectNothingLeft();
  });

  test('because it ends at once carries its exit and its words', async () => {
    await expect(boot('exit=1')).rejects.toMatchObject({
      code: 'internal',
      message: 'Firecracker ended at start (exit code 1): Firecracker panicked at start; Firecracker panicked at start',
    });
    expectNothingLeft();
  });

  test('because it ends in the middle carries its exit and what it means', async () => {
    const why = 'exit code 148: a system call that its seccomp filter forbids';
    await expect(boot('die=PUT /vsock')).rejects.toMatchObject({
      code: 'internal',
      message: expect.stringContaining(`Firecracker ended at start (${why}): Shutting down VM after bad syscall`),
    });
    expectNothingLeft();
  });

  test.each(['PUT /machine-config', 'PUT /boot-source', 'PUT /drives/rw0', 'PUT /vsock', 'PUT /actions'])(
    'because it refuses %s carries its reason',
    async (request) => {
      await expect(boot(`refuse=${request}`)).rejects.toMatchObject({
        code: 'internal',
        message: `Firecracker refused ${request}: not in the mood`,
      });
      expectNothingLeft();
    },
  );

  test('because its socket would have too long a path says so before anything is started', async () => {
    const directory = workspace.path('x'.repeat(100));
    mkdirSync(directory);
    await expect(boot('running', { config: { directory } })).rejects.toThrow("the system's limit is 107");
    expectNothingLeft();
  });

  test.each(['idle', 'hang=PUT /drives/ro3'])(
    'because nobody wants it any more ends one that is at %s',
    async (mode) => {
      const giveUp = new AbortController();
      const booting = boot(mode, {}, giveUp.signal);
      const gaveUp = expect(booting).rejects.toThrow('enough');
      while (workspace.processes().length === 0) await new Promise((resolve) => setImmediate(resolve));
      giveUp.abort(new Error('enough'));
      await gaveUp;
      expectNothingLeft();
    },
  );
});

describe('a running VM', () => {
  test('gets a file behind a slot, and the serial is the one that Firecracker gives the disk', async () => {
    const vm = await boot('running');
    const disk = workspace.file('disk', 'x');
    expect(await vm.attachDisk('ro0', disk)).toBe(serialOf(disk));
    expect(workspace.firecrackerRequests().at(-1)).toEqual({
      name: 'PATCH /drives/ro0',
      body: { drive_id: 'ro0', path_on_host: disk },
    });
    // Of a link it is the file's.
    symlinkSync(disk, workspace.path('link'));
    expect(await vm.attachDisk('ro1', workspace.path('link'))).toBe(serialOf(disk));
    await expect(vm.attachDisk('ro0', disk)).rejects.toMatchObject({
      code: 'failed-precondition',
      message: 'drive slot ro0 already has a file',
    });
  });

  test('has a slot free again whose file could not be put there', async () => {
    const vm = await boot('refuse=PATCH /drives/rw0');
    const refused =
      'cannot put /dev/null behind drive slot rw0: Firecracker refused PATCH /drives/rw0: not in the mood';
    for (const _ of [1, 2]) await expect(vm.attachDisk('rw0', '/dev/null')).rejects.toThrow(refused);
    await expect(vm.attachDisk('rw1', '/no/disk')).rejects.toThrow('cannot put /no/disk behind drive slot rw1: ENOENT');
    expect(await vm.attachDisk('rw1', workspace.file('disk'))).not.toBe('');
  });

  test('whose guest reboots has stopped by itself, with the last of its console', async () => {
    const vm = await boot('guest-stops');
    await expect(vm.acceptAgent(never)).rejects.toMatchObject({
      code: 'unavailable',
      message: 'the guest stopped before the agent called; last output:\nKernel panic - not syncing',
    });
    expect(await vm.wait()).toEqual({
      ...{ code: 0, signal: null, guestStopped: true, consoleTail: 'Kernel panic - not syncing' },
    });
  });

  test('that is killed from outside says so', async () => {
    const vm = await boot('running');
    (await vm.acceptAgent(never)).destroy();
    process.kill(vm.pid, 'SIGKILL');
    expect(await vm.wait()).toMatchObject({ code: null, signal: 'SIGKILL', guestStopped: false });
    await expect(vm.attachDisk('ro0', '/dev/null')).rejects.toMatchObject({ code: 'unavailable' });
  });

  test('is gone with its sockets and slots when it was killed, for everybody who kills it', async () => {
    const vm = await boot('running');
    expect(workspace.files()).toContain('slots');
    await Promise.all([vm.kill(), vm.kill()]);
    expectNothingLeft();
    expect(await vm.wait()).toMatchObject({ signal: 'SIGKILL' });
  });
});

describe.each([
  ['on the host', {}],
  ['in a jail', { jailer: 'jail' }],
])('what Firecracker says of itself %s', (_where, place) => {
  test('is in the log, with its level and the name of the VM, and failures are told', async () => {
    const vm = await boot('running', { ...place, config: { id: 'my_c.1' } });
    process.kill(vm.pid, 'SIGKILL');
    await vm.wait();
    expect(log).toContainEqual(
      expect.objectContaining({
        ...{ level: 'debug', vm: expect.stringMatching(/^my-c-1/), thread: 'main' },
        msg: 'Firecracker: Running Firecracker v1.16.1',
      }),
    );
    const failed = { 'vsock.conn_event_fails': 2 };
    expect(log).toContainEqual(expect.objectContaining({ level: 'warn', msg: 'Firecracker counts failures', failed }));
    const counters = { ...failed, 'put_api_requests.drive_count': 11 };
    expect(log).toContainEqual(expect.objectContaining({ level: 'debug', msg: "Firecracker's counters", counters }));
  });

  test('does not hold it up, and is not more than a hundred lines a minute', async () => {
    const vm = await boot('noisy', place);
    expect(await vm.attachDisk('ro0', workspace.file('disk'))).not.toBe('');
    await vm.kill();
    const told = log.filter(({ msg }) => String(msg).startsWith('Firecracker'));
    // A minute may end meanwhile.
    expect(told.length).toBeLessThan(250);
    expect(log).toContainEqual(
      expect.objectContaining({ msg: 'Firecracker says too much: the rest of this minute is dropped' }),
    );
  });

  test('tells how it ended where the kernel does not', async () => {
    const vm = await boot('guest-stops', place);
    expect(await vm.wait()).toEqual({
      ...{ code: 0, signal: null, guestStopped: true, consoleTail: 'Kernel panic - not syncing' },
    });
  });
});

describe('a VM of an earlier kilnd', () => {
  test('is taken over: its agent is asked to call again, and its slots are known', async () => {
    const made = vmm('running');
    const first = await made.boot(workspace.vm(), never);
    vms.push(first);
    (await first.acceptAgent(never)).destroy();
    await first.attachDisk('ro0', workspace.file('disk'));
    const record = JSON.parse(JSON.stringify(first.record())) as VmRecord;
    const second = await made.adopt(record, workspace.sandbox, never);
    vms.push(second);
    expect(second.pid).toBe(first.pid);
    const calling = second.acceptAgent(never);
    await workspace.appears('firecracker.connects');
    const agent = net.connect(path.join(workspace.sandbox, 'vsock_1024'));
    expect(await calling).toBeInstanceOf(net.Socket);
    agent.destroy();
    await expect(second.attachDisk('ro0', '/dev/null')).rejects.toThrow('drive slot ro0 already has a file');
    await second.kill();
    // By which signal is told by the kernel since Linux 6.15.
    expect(await second.wait()).toMatchObject({ code: null, guestStopped: false });
    expectNothingLeft();
  });

  test('that has ended is not found, and a record that is none is refused', async () => {
    const made = vmm('running');
    const vm = await made.boot(workspace.vm(), never);
    const record = vm.record();
    await vm.kill();
    await expect(made.adopt(record, workspace.sandbox, never)).rejects.toMatchObject({
      code: 'not-found',
      message: `Firecracker (pid ${vm.pid}) has ended`,
    });
    await expect(made.adopt({ version: 1 }, workspace.sandbox, never)).rejects.toMatchObject({
      code: 'invalid-argument',
      message: expect.stringContaining('not a record of a Firecracker VM: firecracker:'),
    });
    expectNothingLeft();
  });
});

describe('in a jail', () => {
  const jailed: Host = { jailer: 'jail' };

  test('a VM is started by the jailer, and knows its files by paths in the jail alone', async () => {
    const vm = await boot('running', { ...jailed, config: { id: 'my_c.1', memoryMib: 1024, vcpus: 2 } });
    const agent = await vm.acceptAgent(never);
    expect(String(await once(agent, 'data'))).toBe('hello');
    agent.destroy();
    const [uid = ''] = claims();
    expect(JSON.parse(readFileSync(workspace.path('jailer.arguments'), 'utf8'))).toEqual([
      ...['--id', `my-c-1-${uid}`, '--exec-file', workspace.path('firecracker'), '--uid', uid, '--gid', uid],
      ...['--chroot-base-dir', path.join(workspace.sandbox, 'j'), '--new-pid-ns'],
      ...['--resource-limit', 'no-file=2048', '--resource-limit', `fsize=${2 ** 40}`],
      ...['--cgroup-version', '2', '--parent-cgroup', `kiln-${uid}`],
      ...['--cgroup', `memory.max=${(1024 + 64 + 512) * 2 ** 20}`, '--cgroup', 'pids.max=18'],
    ]);
    const bodies = Object.fromEntries(workspace.firecrackerRequests().map(({ name, body }) => [name, body]));
    expect(bodies['PUT /boot-source']).toMatchObject({
      kernel_image_path: '/files/kernel',
      initrd_path: '/files/initrd',
    });
    expect(bodies['PUT /drives/guest']).toMatchObject({ path_on_host: '/files/guest' });
    expect(bodies['PUT /drives/rw1']).toMatchObject({ path_on_host: '/files/rw1' });
    expect(bodies['PUT /vsock']).toMatchObject({ uds_path: '/v' });
  });

  test('only what is written is writable, and kernel and initrd are gone from it after the start', async () => {
    const vm = await boot('running', jailed);
    const uid = Number(claims()[0]);
    const disk = workspace.file('disk');
    expect(await vm.attachDisk('ro0', disk)).toBe(serialOf(disk));
    expect(await vm.attachDisk('rw0', disk)).toBe(serialOf(disk));
    const mounted = [...kernel.mounts].map(([target, mount]) => [path.basename(target), mount]);
    expect(Object.fromEntries(mounted)).toEqual({
      j: 'tmpfs',
      files: 'tmpfs',
      guest: { file: workspace.path('guest.erofs'), readOnly: true, uid },
      ro0: { file: disk, readOnly: true, uid },
      rw0: { file: disk, readOnly: false, uid },
    });
    const owners = Object.fromEntries([...kernel.owners].map(([file, owner]) => [path.basename(file), owner]));
    expect(owners).toMatchObject({ ro0: `0:${uid}`, rw1: `0:${uid}`, v_1024: `${uid}:${uid}` });
    expect(workspace.firecrackerRequests().at(-1)).toEqual({
      name: 'PATCH /drives/rw0',
      body: { drive_id: 'rw0', path_on_host: '/files/rw0' },
    });
    await vm.kill();
    expectNothingLeft();
  });

  test('a slot is free again whose file could not be mounted, or was refused', async () => {
    const vm = await boot('refuse=PATCH /drives/rw0', jailed);
    const disk = workspace.file('disk');
    await expect(vm.attachDisk('rw0', disk)).rejects.toThrow('not in the mood');
    expect([...kernel.mounts.keys()].map((target) => path.basename(target))).not.toContain('rw0');
    kernel.refusal = new Error('EINVAL: its file system cannot');
    await expect(vm.attachDisk('ro0', disk)).rejects.toThrow('behind drive slot ro0: EINVAL: its file system cannot');
    kernel.refusal = undefined;
    expect(await vm.attachDisk('ro0', disk)).toBe(serialOf(disk));
    await expect(vm.attachDisk('ro1', '/dev/null')).rejects.toThrow('/dev/null is neither a file nor a block device');
  });

  test.runIf(blockDevice !== undefined)('a block device gets a node there, which is its own again', async () => {
    const device = blockDevice ?? '';
    const vm = await boot('running', jailed);
    const uid = Number(claims()[0]);
    for (const slot of ['ro0', 'rw0'] as const) {
      const serial = await vm.attachDisk(slot, device);
      expect(serial).toBe(serialOf(path.join(workspace.sandbox, 'r', 'files', slot)));
    }
    const nodes = [...kernel.devices].map(([file, id]) => [path.basename(file), id]);
    const id = statSync(device, { bigint: true }).rdev;
    expect(Object.fromEntries(nodes)).toEqual({ ro0: id, rw0: id });
    const owners = Object.fromEntries([...kernel.owners].map(([file, owner]) => [path.basename(file), owner]));
    expect(owners).toMatchObject({ ro0: `0:${uid}`, rw0: `0:${uid}` });
    expect(statSync(path.join(workspace.sandbox, 'r/files/ro0')).mode & 0o222).toBe(0);
    await vm.kill();
    expectNothingLeft();
  });

  test.runIf(blockDevice !== undefined)('a slot is free again whose device was refused', async () => {
    const vm = await boot('refuse=PATCH /drives/rw0', jailed);
    kernel.refusal = new Error('EPERM: mknod');
    await expect(vm.attachDisk('rw1', blockDevice ?? '')).rejects.toThrow('behind drive slot rw1: EPERM: mknod');
    kernel.refusal = undefined;
    await expect(vm.attachDisk('rw0', blockDevice ?? '')).rejects.toThrow('not in the mood');
    for (const slot of ['rw0', 'rw1']) {
      expect(statSync(path.join(workspace.sandbox, 'r/files', slot)).size).toBe(2 ** 40);
    }
    const disk = workspace.file('disk');
    expect(await vm.attachDisk('rw1', disk)).toBe(serialOf(disk));
  });

  test('a VM of an earlier kilnd is taken over, with the agent asked to call again', async () => {
    const made = vmm('running', jailed);
    const first = await made.boot(workspace.vm(), never);
    vms.push(first);
    (await first.acceptAgent(never)).destroy();
    const second = await made.adopt(JSON.parse(JSON.stringify(first.record())) as VmRecord, workspace.sandbox, never);
    vms.push(second);
    const calling = second.acceptAgent(never);
    await workspace.appears('firecracker.connects');
    const agent = net.connect(path.join(workspace.sandbox, 'r', 'v_1024'));
    expect(await calling).toBeInstanceOf(net.Socket);
    agent.destroy();
    await second.kill();
    expectNothingLeft();
  });

  test('what a kilnd has left that was killed is ended and removed, also half of it', async () => {
    const vm = await boot('running', jailed);
    await clearJail(workspace.sandbox, host().jails);
    await vm.wait();
    expect(claims()).toEqual([]);
    expect([...kernel.mounts]).toEqual([]);
    claimUid(uids, workspace.sandbox, workspace.path('claims'));
    await clearJail(workspace.sandbox, host().jails);
    expectNothingLeft();
    mkdirSync(path.join(workspace.sandbox, 'j'));
    await clearJail(workspace.sandbox, host().jails);
    expectNothingLeft();
    await clearJail(workspace.sandbox, host().jails);
  });

  test.each([
    ['the jailer fails', 'running', 'fail=Failed to mkdir', 'the jailer ended (exit code 1): Failed to mkdir'],
    [
      'Firecracker ends before anybody has seen it',
      'running',
      'dies',
      'Firecracker ended at start: Invalid instance ID',
    ],
    ['Firecracker is too old', 'version=1.12.1', 'jail', 'Firecracker 1.12.1 is not supported'],
    [
      'Firecracker refuses a drive',
      'refuse=PUT /drives/rw0',
      'jail',
      'Firecracker refused PUT /drives/rw0: not in the mood',
    ],
  ])('a start fails and leaves nothing when %s', async (_why, mode, jailer, message) => {
    await expect(boot(mode, { jailer })).rejects.toThrow(message);
    expectNothingLeft();
  });

  test('a start fails and leaves nothing when the jailer is of another version', async () => {
    await expect(boot('running', { jailer: 'version=1.15.0' })).rejects.toMatchObject({
      code: 'failed-precondition',
      message: `the jailer ${workspace.path('jailer')} is of version 1.15.0, and Firecracker ${workspace.path('firecracker')} of version 1.16.1`,
      hint: 'install both from one release; vm.firecracker and vm.jailer in the config file name them',
    });
    expect(workspace.has('jailer.arguments')).toBe(false);
    expectNothingLeft();
  });

  test('a start fails and leaves nothing when a program is missing', async () => {
    const options = { firecracker: 'no-such-firecracker' };
    await expect(boot('running', { ...jailed, options })).rejects.toMatchObject({
      code: 'failed-precondition',
      message: 'cannot run Firecracker (vm.firecracker in the config file) "no-such-firecracker": no such program',
    });
    const jail = () => ({ jailer: '/no/jailer', uids });
    await expect(boot('running', { options: { jail } })).rejects.toMatchObject({
      code: 'failed-precondition',
      message: 'cannot run the jailer (vm.jailer in the config file) "/no/jailer": ENOENT',
      hint: 'install the jailer of your Firecracker, or set vm.jail = "off"',
    });
    expectNothingLeft();
  });

  test.each([
    ['the jailer', 'running', 'hang', 'jailer.arguments'],
    ['Firecracker', 'idle', 'jail', 'jailer.arguments'],
    ['a request', 'hang=GET /version', 'jail', 'firecracker.requests'],
  ])('a start that nobody wants any more is ended at %s', async (_where, mode, jailer, begun) => {
    const giveUp = new AbortController();
    const gaveUp = expect(boot(mode, { jailer }, giveUp.signal)).rejects.toThrow('enough');
    await workspace.appears(begun);
    giveUp.abort(new Error('enough'));
    await gaveUp;
    expectNothingLeft();
  });

  test('a socket with too long a path is told before anything is started', async () => {
    const directory = workspace.path('x'.repeat(100));
    mkdirSync(directory);
    await expect(boot('running', { ...jailed, config: { directory } })).rejects.toThrow("the system's limit is 107");
    expectNothingLeft();
    expect(readdirSync(directory)).toEqual([]);
  });
});
