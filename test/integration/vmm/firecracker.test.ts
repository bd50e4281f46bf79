import { execFileSync, spawnSync } from 'node:child_process';
import {
  chmodSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  rmSync,
  statSync,
  truncateSync,
  writeFileSync,
} from 'node:fs';
import http from 'node:http';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest';
import { takeStock } from '../../../src/daemon/earlier.ts';
import { killProcessesOf } from '../../../src/host/stale.ts';
import { loggerTo } from '../../../src/observe/logger.ts';
import { NetworkNamespace } from '../../../src/sys/netns.ts';
import { makePersistentTaps } from '../../../src/vmm/cards.ts';
import { createFirecracker, type FirecrackerOptions } from '../../../src/vmm/firecracker/driver.ts';
import { clearJail, jailHost } from '../../../src/vmm/firecracker/jail.ts';
import { uidsOf } from '../../../src/vmm/firecracker/jail-uids.ts';
import { isAtLeast, versionOf } from '../../../src/vmm/firecracker/version.ts';
import { type HostDevices, hostDevices } from '../../../src/vmm/host-devices.ts';
import {
  maxNetworkCards,
  type SavableVm,
  type TemplateDriver,
  type Vm,
  type VmConfig,
  type Vmm,
} from '../../../src/vmm/vmm.ts';
import { projectRoot } from '../../support/paths.ts';
import { Workspace } from '../../unit/vmm/workspace.ts';
import { noisyGuest, timedGuest, tinyGuest, waitingGuest } from './tiny-guest.ts';

/**
 * The real Firecracker, where KILN_FIRECRACKER names it and /dev/kvm opens, whatever is behind that, and the real jailer,
 * where KILN_JAILER names it: they must accept all that Kiln asks of them. That Linux comes up in the guest is another matter:
 * that takes hardware. A guest of ten instructions does anywhere.
 */
const program = process.env.KILN_FIRECRACKER;
const jailer = process.env.KILN_JAILER;
const guest = (name: string): string => path.join(projectRoot, 'dist/guest', name);
/** Since Firecracker 1.14. */
const growsAtAll = program !== undefined && isAtLeast(await versionOf(program), 14);
const limitsItsConsole = program !== undefined && isAtLeast(await versionOf(program), 16);
const never = new AbortController().signal;
const uids = { first: 1_900_100_000, count: 4 };

let log: Record<string, unknown>[] = [];
const logger = loggerTo({ write: (line) => void log.push(JSON.parse(line)) }, 'trace');

let workspace: Workspace;
let vm: Vm | undefined;
beforeEach(() => {
  log = [];
  workspace = new Workspace();
  mkdirSync(workspace.path('modules/kvm_intel'), { recursive: true });
});
afterEach(async () => {
  await vm?.kill();
  vm = undefined;
  await clearJail(workspace.sandbox, jails());
  workspace[Symbol.dispose]();
});

/** With claims of the test's own, beside an installed Kiln. */
const jails = () => ({ ...jailHost, claims: workspace.path('claims') });

function driver(options: Partial<FirecrackerOptions> = {}, host: Partial<HostDevices> = {}, on = jails()): Vmm {
  const devices = { ...hostDevices, modules: workspace.path('modules'), ...host };
  return createFirecracker(
    { firecracker: program ?? '', ...defaults, ...options },
    { devices, jails: on, makeTaps: makePersistentTaps },
  );
}

const parking = NetworkNamespace.create();

const defaults = {
  jail: () => undefined,
  logger,
  hugePages: false,
  bootTimer: false,
  memoryMaxMib: 0,
  diskLimits: { bytesPerS: 2 ** 20, opsPerS: 100 },
  networkLimits: { bytesPerS: 2 ** 20, opsPerS: 0 },
  parking,
};

/** The tap devices that wait in there. */
function parkedTaps(): string[] {
  const lines = parking.run(() => readFileSync('/proc/thread-self/net/dev', 'utf8')).split('\n');
  return lines.flatMap((line) => /^ *(kt[0-9a-f]+):/.exec(line)?.[1] ?? []).sort();
}

/** Those that a process has open: tun_chr_show_fdinfo of drivers/net/tun.c. */
function tapsOf(pid: number): string[] {
  const directory = `/proc/${pid}/fdinfo`;
  const infos = readdirSync(directory).map((fd) => readFileSync(path.join(directory, fd), 'utf8'));
  return infos.flatMap((info) => /^iff:\s*(\S+)/m.exec(info)?.[1] ?? []).sort();
}

const files = { kernel: guest('vmlinux'), initrd: guest('initrd'), guestImage: guest('guest.erofs') };

async function boot(vmm: Vmm): Promise<Vm> {
  vm = await vmm.boot({ ...workspace.vm(), ...files, id: 'my_c.1', memoryMib: 256, networkCards: 2 }, never);
  return vm;
}

const disk = (name: string, mode = 0o600): string => {
  const file = workspace.file(name, Buffer.alloc(4096, name));
  chmodSync(file, mode);
  return file;
};

/** Boots a guest that says a word and reboots. */
async function expectGuestsEnd(vmm: Vmm, guestOf = tinyGuest): Promise<void> {
  const kernel = workspace.file('tiny', guestOf('Ki'));
  const config = { ...workspace.vm(), kernel, initrd: undefined, memoryMib: 128 };
  vm = await vmm.boot({ ...config, guestImage: disk('image', 0o644) }, never);
  const stopped = 'the guest stopped before the agent called; last output:\nKi';
  await expect(vm.acceptAgent(never)).rejects.toMatchObject({ code: 'unavailable', message: stopped });
  expect(await vm.wait()).toEqual({ code: 0, signal: null, guestStopped: true, consoleTail: 'Ki' });
  await vm.kill();
}

/** A guest that is in the middle of something when it is saved, and goes on when a key is pressed. */
class TemplateBench {
  readonly template = workspace.path('template');
  readonly #vmDirectory = path.join(this.template, 'vm');
  readonly #driver: TemplateDriver;
  readonly #config: VmConfig;
  readonly started: Vm[] = [];

  constructor(vmm: Vmm) {
    if (vmm.templates === undefined) throw new Error('this Firecracker has no templates');
    this.#driver = vmm.templates;
    mkdirSync(this.#vmDirectory, { recursive: true, mode: 0o700 });
    const kernel = workspace.file('waiting', waitingGuest('before', 'after'));
    this.#config = {
      ...workspace.vm(),
      kernel,
      initrd: undefined,
      guestImage: disk('image'),
      memoryMib: 128,
      networkCards: 2,
    };
  }

  async boot(): Promise<SavableVm> {
    const config = { ...this.#config, directory: this.#vmDirectory };
    const booted = await this.#driver.boot(config, this.template, never);
    this.started.push(booted);
    await vi.waitFor(async () => expect(await booted.consoleTail(100)).toBe('before'));
    return booted;
  }

  /** As it is when it was made: its VM is gone, with all that it had, and so is the disk of its warm-up. */
  async make(): Promise<void> {
    const booted = await this.boot();
    const warmUp = disk('warm-up');
    await booted.attachDisk('rw0', warmUp);
    await booted.detachDisk('rw0');
    rmSync(warmUp);
    await booted.save(never);
    await booted.kill();
    expect(readdirSync(this.#vmDirectory)).toEqual(['vmm.log']);
    rmSync(this.#vmDirectory, { recursive: true });
  }

  async restore(name: string): Promise<{ clone: Vm; directory: string }> {
    const directory = workspace.path(name);
    mkdirSync(directory, { mode: 0o700 });
    const clone = await this.#driver.restore({ ...this.#config, id: name, directory }, this.template, never);
    this.started.push(clone);
    return { clone, directory };
  }

  async end(): Promise<void> {
    for (const each of this.started) await each.kill();
    await clearJail(this.#vmDirectory, jails());
  }

  /** The VM that was made by a kilnd which is no more. */
  get abandoned(): string {
    return this.#vmDirectory;
  }

  file(name: string): string {
    return path.join(this.template, name);
  }
}

/** @param socket Firecracker's API */
async function pressKey(socket: string): Promise<void> {
  const body = JSON.stringify({ action_type: 'SendCtrlAltDel' });
  const headers = { 'Content-Length': body.length };
  await new Promise<void>((resolve, reject) => {
    const request = http.request({ socketPath: socket, method: 'PUT', path: '/actions', headers, agent: false });
    request.on('error', reject);
    request.on('response', (response) => {
      response.resume();
      if (response.statusCode === 204) resolve();
      else reject(new Error(`Firecracker answered ${response.statusCode}`));
    });
    request.end(body);
  });
}

/** The pages of memory that are a file's, as proc_pid_maps(5) has them: "rw-p" are private. */
function mappingsOf(pid: number, file: string): string[] {
  const { ino } = statSync(file);
  const lines = readFileSync(`/proc/${pid}/maps`, 'utf8').split('\n');
  return lines.map((line) => line.split(/\s+/)).flatMap(([, how = '', , , inode]) => (inode === `${ino}` ? [how] : []));
}

interface Clones {
  readonly vmm: () => Vmm;
  /** In a VM's directory. */
  readonly sockets: { readonly api: string; readonly vsock: string };
  readonly expectNothingLeft: () => void;
}

/** What holds with a jail and without. */
function describeTemplates({ vmm, sockets, expectNothingLeft }: Clones): void {
  let bench: TemplateBench;
  beforeEach(() => {
    bench = new TemplateBench(vmm());
  });
  afterEach(() => bench.end());

  test('saves a VM, and restores it twice: each goes on where that was, with sockets and disks of its own', async () => {
    await bench.make();
    for (const name of ['memory', 'state']) {
      const { uid, gid, mode } = statSync(bench.file(name));
      expect({ uid, gid, mode: mode & 0o777 }).toEqual({ uid: 0, gid: 0, mode: 0o600 });
    }
    expect(statSync(bench.file('memory')).size).toBe(128 * 2 ** 20);
    const digest = readFileSync(bench.file('memory'));
    for (const { clone, directory } of [await bench.restore('one'), await bench.restore('two')]) {
      for (const socket of [sockets.vsock, `${sockets.vsock}_1024`]) {
        expect(statSync(path.join(directory, socket)).isSocket()).toBe(true);
      }
      expect(new Set(mappingsOf(clone.pid, bench.file('memory')))).toEqual(new Set(['rw-p']));
      expect(tapsOf(clone.pid)).toEqual(clone.nics.map(({ tap }) => tap).sort());
      expect(await clone.attachDisk('ro0', disk(`layer-of-${clone.pid}`))).toMatch(/^\d{1,20}$/);
      expect(await clone.attachDisk('rw1', disk(`disk-of-${clone.pid}`))).toMatch(/^\d{1,20}$/);
      const called = expect(clone.acceptAgent(never)).rejects.toThrow(
        'the guest stopped before the agent called; last output:\nafter',
      );
      await pressKey(path.join(directory, sockets.api));
      await called;
      expect(await clone.wait()).toMatchObject({ code: 0, guestStopped: true, consoleTail: 'after' });
      await clone.kill();
      expect(readdirSync(directory)).toEqual(['vmm.log']);
    }
    expect(readFileSync(bench.file('memory')).equals(digest)).toBe(true);
    expectNothingLeft();
  });

  test('answers the next kilnd for a clone', async () => {
    await bench.make();
    const { clone, directory } = await bench.restore('one');
    await clone.attachDisk('rw0', disk('disk'));
    const adopted = await vmm().adopt(JSON.parse(JSON.stringify(clone.record())), directory, never);
    expect(adopted.pid).toBe(clone.pid);
    await expect(adopted.attachDisk('rw0', disk('disk'))).rejects.toThrow('already has a file');
    await adopted.attachDisk('rw1', disk('other'));
    await adopted.kill();
    // The earlier kilnd would be gone, with its listener.
    await clone.kill();
    expect(readdirSync(directory)).toEqual(['vmm.log']);
    expectNothingLeft();
  });

  test.each<[string, (file: (name: string) => string) => void]>([
    ['whose state is none', (file) => writeFileSync(file('state'), 'rubbish')],
    ['whose state was cut', (file) => truncateSync(file('state'), 5000)],
    ['whose memory was cut', (file) => truncateSync(file('memory'), 5000)],
  ])('tells why it restores no template %s, and leaves nothing', async (_which, spoil) => {
    await bench.make();
    spoil((name) => bench.file(name));
    await expect(bench.restore('one')).rejects.toMatchObject({
      code: 'internal',
      message: expect.stringMatching(/^Firecracker refused PUT \/snapshot\/load: Load snapshot error: /),
    });
    expect(readdirSync(workspace.path('one'))).toEqual(['vmm.log']);
    expectNothingLeft();
  });

  test('leaves a VM that is to be saved where a later kilnd finds it', async () => {
    const booted = await bench.boot();
    await killProcessesOf(bench.abandoned);
    await clearJail(bench.abandoned, jails());
    await booted.wait();
    rmSync(bench.template, { recursive: true });
    expectNothingLeft();
  });
}

describe.runIf(program !== undefined)('the real Firecracker without a jail', () => {
  test('ends when its guest reboots, with what that has said', async () => {
    await expectGuestsEnd(driver());
    expect(workspace.files()).toEqual([]);
  });

  test("measures how long its guest's first program takes to run", async () => {
    await expectGuestsEnd(driver({ bootTimer: true }), timedGuest);
    const told = log.find(({ msg }) => msg === "the guest's first program runs");
    expect(told).toMatchObject({ level: 'info', vm: 'one' });
    expect(Number(told?.guestBootMs)).toBeGreaterThan(0);
  });

  test.runIf(limitsItsConsole)('writes down no more of what its guest says than its limit', async () => {
    const kernel = workspace.file('tiny', noisyGuest('k'));
    const config = { ...workspace.vm(), kernel, initrd: undefined, memoryMib: 128 };
    vm = await driver().boot({ ...config, guestImage: disk('image', 0o644) }, never);
    await vm.wait();
    const { length } = readFileSync(path.join(workspace.sandbox, 'vmm.log')).toString().replace(/[^k]/g, '');
    expect(length).toBeGreaterThan(60 << 10);
    expect(length).toBeLessThan(90_000);
  });

  test('takes the configuration, starts the VM, swaps drives, and leaves nothing', async () => {
    const running = await boot(driver());
    expect(await running.attachDisk('ro0', disk('disk'))).toMatch(/^\d{1,20}$/);
    expect(await running.attachDisk('rw1', disk('other'))).toMatch(/^\d{1,20}$/);
    await running.kill();
    expect(await running.wait()).toMatchObject({ signal: 'SIGKILL', guestStopped: false });
    expect(log).toContainEqual(expect.objectContaining({ vm: 'my-c-1', msg: 'Firecracker: API server started.' }));
    const counters = expect.objectContaining({ 'put_api_requests.drive_count': 11 });
    expect(log).toContainEqual(expect.objectContaining({ msg: "Firecracker's counters", counters }));
    expect(workspace.processes()).toEqual([]);
    expect(workspace.files()).toEqual([]);
  });

  test.runIf(growsAtAll)('has further memory ready, and tells that this guest takes none of it', async () => {
    const running = await boot(driver({ memoryMaxMib: 500 }));
    expect(running.memoryGrowth?.limitMib).toBe(512);
    const adopted = await driver().adopt(JSON.parse(JSON.stringify(running.record())), workspace.sandbox, never);
    for (const each of [running, adopted]) {
      // A guest without a driver for it, as one that has not come up yet.
      await expect(each.memoryGrowth?.growTo(400)).rejects.toMatchObject({
        code: 'internal',
        message: expect.stringMatching(/^Firecracker refused PATCH \/hotplug\/memory: .*not active/i),
      });
    }
    await adopted.kill();
  });

  test.runIf(!growsAtAll)('keeps its memory, before 1.14', async () => {
    expect((await boot(driver({ memoryMaxMib: 500 }))).memoryGrowth).toBeNull();
  });

  test('answers the next kilnd', async () => {
    const running = await boot(driver());
    const adopted = await driver().adopt(JSON.parse(JSON.stringify(running.record())), workspace.sandbox, never);
    expect(adopted.pid).toBe(running.pid);
    await adopted.kill();
    expect(workspace.processes()).toEqual([]);
  });

  describeTemplates({
    vmm: driver,
    sockets: { api: 'fc.sock', vsock: 'vsock' },
    expectNothingLeft: () => expect(workspace.processes()).toEqual([]),
  });
});

describe.runIf(program !== undefined && jailer !== undefined)('the real Firecracker in a jail', () => {
  const jail = () => ({ jailer: jailer ?? '', uids });
  const jailed = () => driver({ jail });
  const status = (pid: number, field: string): string =>
    new RegExp(`^${field}:\\s*(.*)$`, 'm').exec(readFileSync(`/proc/${pid}/status`, 'utf8'))?.[1] ?? '';
  const cgroups = (): string[] => {
    const hierarchies = readFileSync('/proc/mounts', 'utf8')
      .split('\n')
      .map((line) => line.split(' '));
    return hierarchies
      .filter(([, , type]) => type === 'cgroup' || type === 'cgroup2')
      .flatMap(([, directory = '']) => readdirSync(directory).map((name) => path.join(directory, name)))
      .filter((group) => /\/kiln-19001\d+$/.test(group));
  };
  const mounts = (): string[] =>
    readFileSync('/proc/self/mountinfo', 'utf8')
      .split('\n')
      .filter((line) => line.includes(workspace.folder));
  const expectNothingLeft = () => {
    expect(workspace.processes()).toEqual([]);
    expect(workspace.files()).toEqual([]);
    expect(mounts()).toEqual([]);
    expect(cgroups()).toEqual([]);
    expect(readdirSync(workspace.path('claims'))).toEqual([]);
  };

  describeTemplates({ vmm: jailed, sockets: { api: 'r/api', vsock: 'r/v' }, expectNothingLeft });

  test('has the files of its template no longer than it reads them', async () => {
    const bench = new TemplateBench(jailed());
    await bench.make();
    const { clone } = await bench.restore('one');
    for (const name of ['memory', 'state']) expect(statSync(`/proc/${clone.pid}/root/files/${name}`).size).toBe(0);
    await bench.end();
    expectNothingLeft();
  });

  test('is a user of its own in namespaces and cgroups of its own, with its files below its root', async () => {
    const { pid } = await boot(jailed());
    const [uid] = readdirSync(workspace.path('claims')).map(Number);
    expect(status(pid, 'Uid')).toBe(`${uid}\t${uid}\t${uid}\t${uid}`);
    expect(status(pid, 'Gid')).toBe(`${uid}\t${uid}\t${uid}\t${uid}`);
    expect(status(pid, 'CapEff')).toMatch(/^0+$/);
    expect(status(pid, 'NSpid')).toBe(`${pid}\t1`);
    for (const namespace of ['mnt', 'pid']) {
      expect(readlinkSync(`/proc/${pid}/ns/${namespace}`)).not.toBe(readlinkSync(`/proc/self/ns/${namespace}`));
    }
    expect(readFileSync(`/proc/${pid}/cgroup`, 'utf8')).toContain(`/kiln-${uid}/my-c-1-${uid}`);
    // 256 MiB, a sixteenth of it and 512; one CPU and 16 threads.
    const limits = cgroups().flatMap((group) =>
      ['memory.limit_in_bytes', 'memory.max', 'pids.max']
        .map((name) => path.join(group, `my-c-1-${uid}`, name))
        .filter((file) => existsSync(file))
        .map((file) => readFileSync(file, 'utf8').trim()),
    );
    expect(limits.toSorted()).toEqual(['17', String((256 + 16 + 512) * 2 ** 20)]);
    expect(readFileSync(`/proc/${pid}/limits`, 'utf8')).toMatch(/Max open files\s+2048\s+2048/);
    expect(readdirSync(`/proc/${pid}/root`).sort()).toEqual(
      ['api', 'dev', 'files', 'firecracker', 'firecracker.pid', 'run', 'v', 'v_1024'].sort(),
    );
    expect(readFileSync(`/proc/${pid}/environ`, 'utf8')).not.toContain('KILN');
    // The kernel and the initrd have been read.
    expect(statSync(`/proc/${pid}/root/files/kernel`).size).toBe(0);
    expect(statSync(`/proc/${pid}/root/files/guest`).size).toBe(statSync(files.guestImage).size);
  });

  test('swaps a file in that only root may read, and one to write, and changes neither', async () => {
    const running = await boot(jailed());
    const [uid] = readdirSync(workspace.path('claims')).map(Number);
    const before = ['layer', 'secret', 'writable'].map(
      (name) => [disk(name, name === 'layer' ? 0o644 : 0o600), name] as const,
    );
    const owner = (file: string) => (({ uid, gid, mode, dev, ino }) => ({ uid, gid, mode, dev, ino }))(statSync(file));
    const owners = before.map(([file]) => owner(file));
    const slots = ['ro0', 'ro1', 'rw0'] as const;
    for (const [index, slot] of slots.entries()) {
      const [file = '', name = ''] = before[index] ?? [];
      expect(await running.attachDisk(slot, file)).toMatch(/^\d{1,20}$/);
      const inside = `/proc/${running.pid}/root/files/${slot}`;
      expect(readFileSync(inside, 'utf8').slice(0, name.length)).toBe(name);
      const how = as(uid ?? 0, inside);
      expect(how).toEqual({ readable: true, writable: slot === 'rw0' });
    }
    expect(before.map(([file]) => owner(file))).toEqual(owners);
    await running.kill();
    expect(log).toContainEqual(
      expect.objectContaining({ vm: `my-c-1-${uid}`, msg: 'Firecracker: API server started.' }),
    );
    expect(before.map(([file]) => owner(file))).toEqual(owners);
    expectNothingLeft();
  });

  test('has its network cards’ taps, in the namespace where they wait, which go when it is gone', async () => {
    const running = await boot(jailed());
    const taps = running.nics.map(({ tap }) => tap).sort();
    expect(taps).toHaveLength(2);
    expect(tapsOf(running.pid)).toEqual(taps);
    expect(parkedTaps()).toEqual(taps);
    expect(readlinkSync(`/proc/${running.pid}/ns/net`)).toBe(parking.identity);
    await running.kill();
    await expect.poll(parkedTaps).toEqual([]);
    expectNothingLeft();
  });

  test('has room for its drive slots beside as many network cards as there can be, and memory that grows', async () => {
    const grows = driver({ jail, memoryMaxMib: 512 });
    for (const networkCards of [0, maxNetworkCards]) {
      const running = await grows.boot(
        { ...workspace.vm(), ...files, id: 'full', memoryMib: 256, networkCards },
        never,
      );
      expect(running.freeSlots).toHaveLength(12 - networkCards);
      await running.kill();
    }
  });

  test('has a drive slot empty again, for another file', async () => {
    const running = await boot(jailed());
    const sizeOf = () => statSync(`/proc/${running.pid}/root/files/rw0`).size;
    await running.attachDisk('rw0', workspace.file('one', Buffer.alloc(4096)));
    expect(sizeOf()).toBe(4096);
    await running.detachDisk('rw0');
    expect(sizeOf()).toBe(2 ** 40);
    await running.attachDisk('rw0', workspace.file('two', Buffer.alloc(8192)));
    expect(sizeOf()).toBe(8192);
  });

  test('has a block device by a node of its own, which it can use as its slot allows', async () => {
    using loop = loopDevice(workspace.file('image', Buffer.alloc(2 ** 20, 'image')));
    const running = await boot(jailed());
    const [uid] = readdirSync(workspace.path('claims')).map(Number);
    const before = statSync(loop.device);
    for (const slot of ['ro0', 'rw0'] as const) {
      const serial = await running.attachDisk(slot, loop.device);
      const inside = `/proc/${running.pid}/root/files/${slot}`;
      const { dev, rdev, ino } = statSync(inside, { bigint: true });
      expect(rdev).toBe(BigInt(before.rdev));
      expect(serial).toBe(`${dev}${rdev}${ino}`.slice(0, 20));
      expect(as(uid ?? 0, inside)).toEqual({ readable: true, writable: slot === 'rw0' });
      expect(openBy(running.pid)).toContain(`/files/${slot}`);
    }
    await expect(running.attachDisk('rw1', '/dev/null')).rejects.toThrow('neither a file nor a block device');
    const { mode, uid: owner, gid } = statSync(loop.device);
    expect({ mode, owner, gid }).toEqual({ mode: before.mode, owner: before.uid, gid: before.gid });
    await running.kill();
    expectNothingLeft();
  });

  test('cannot write what it was only given to read, nor remove what it was given', async () => {
    const { pid } = await boot(jailed());
    const [uid] = readdirSync(workspace.path('claims')).map(Number);
    expect(as(uid ?? 0, `/proc/${pid}/root/files/guest`)).toEqual({ readable: true, writable: false });
    expect(as(uid ?? 0, `/proc/${pid}/root/files/ro0`)).toEqual({ readable: true, writable: false });
  });

  test('that its kilnd has left is taken over, and what nobody takes over is cleared', async () => {
    const running = await boot(jailed());
    await running.attachDisk('rw0', disk('writable'));
    const adopted = await jailed().adopt(JSON.parse(JSON.stringify(running.record())), workspace.sandbox, never);
    expect(adopted.pid).toBe(running.pid);
    await expect(adopted.attachDisk('rw0', disk('writable'))).rejects.toThrow('already has a file');
    await adopted.attachDisk('rw1', disk('other'));
    // As the next kilnd does with what is not written down.
    await clearJail(workspace.sandbox, jails());
    expect(await adopted.wait()).toMatchObject({ code: null, signal: 'SIGKILL' });
    expectNothingLeft();
  });

  test('takes huge pages, and fails at the start where the pool is empty after all', async () => {
    const devices = { freeHugePages: workspace.file('free', '1000') };
    await expect(boot(driver({ jail, hugePages: true }, devices))).rejects.toThrow('Firecracker refused PUT /actions');
    expectNothingLeft();
  });

  test("ends when its guest reboots, with what that has said, though it is nobody's child", async () => {
    await expectGuestsEnd(jailed());
    expectNothingLeft();
  });

  test('is not in the way of others: several start at once, each as another user', async () => {
    const started = await Promise.all(
      ['one', 'two', 'three', 'four'].map((name) => {
        const directory = workspace.path(name);
        mkdirSync(directory, { mode: 0o700 });
        return jailed().boot({ ...workspace.vm(), ...files, id: name, directory, memoryMib: 128 }, never);
      }),
    );
    expect(new Set(started.map(({ pid }) => status(pid, 'Uid'))).size).toBe(4);
    await Promise.all(started.map((each) => each.attachDisk('rw0', disk(`disk-of-${each.pid}`))));
    await expect(boot(jailed())).rejects.toThrow('every user id for jailed VMs is in use: 1900100000 to 1900100003');
    await Promise.all(started.map((each) => each.kill()));
    expectNothingLeft();
  });

  test('is cleared by the next kilnd, which knows no more than its state folder', async () => {
    const directory = workspace.path('state/c/0123456789abcdef');
    mkdirSync(directory, { recursive: true });
    const vmm = driver({ jail }, {}, jailHost);
    const running = await vmm.boot({ ...workspace.vm(), ...files, directory, memoryMib: 256 }, never);
    await running.attachDisk('rw0', disk('writable'));
    await takeStock(workspace.path('state'), logger);
    // Nothing here has told this one that its Firecracker was ended.
    expect(await running.wait()).toMatchObject({ guestStopped: false });
    expect(readdirSync(workspace.path('state/c'))).toEqual([]);
    expect(mounts()).toEqual([]);
    expect(cgroups()).toEqual([]);
    expect(uidsOf(directory, jailHost.claims)).toEqual([]);
    expect(readFileSync(workspace.path('writable'), 'utf8')).toContain('writable');
  });

  test('starts nothing with the jailer of another release', async () => {
    const other = workspace.program('other-jailer', "#!/bin/sh\necho 'Jailer v1.0.0'\n");
    await expect(boot(driver({ jail: () => ({ jailer: other, uids }) }))).rejects.toThrow(
      /^the jailer \S+ is of version 1\.0\.0, and Firecracker \S+ of version 1\.\d+\.\d+/,
    );
    expect(workspace.files()).toEqual([]);
    expect(existsSync(workspace.path('claims'))).toBe(false);
  });

  test('leaves nothing when its start fails, in the jailer or later', async () => {
    const bad = driver({ jail, firecracker: '/bin/false' });
    await expect(boot(bad)).rejects.toThrow('Firecracker ended at start');
    expectNothingLeft();
    const kernel = workspace.file('no-kernel', 'text');
    await expect(jailed().boot({ ...workspace.vm(), ...files, kernel, memoryMib: 256 }, never)).rejects.toThrow(
      'Firecracker refused PUT /actions',
    );
    expectNothingLeft();
  });
});

/** A block device that is a file. */
function loopDevice(file: string): Disposable & { device: string } {
  const losetup = (...args: string[]) => execFileSync('losetup', args, { encoding: 'utf8' }).trim();
  const device = losetup('--find', '--show', file);
  return { device, [Symbol.dispose]: () => void losetup('--detach', device) };
}

/** What a process has open, by the names that itself knows. */
function openBy(pid: number): string[] {
  const folder = `/proc/${pid}/fd`;
  return readdirSync(folder).map((fd) => readlinkSync(path.join(folder, fd)));
}

/** What a user may do with a file. access(2) of root would say that it may do everything. */
function as(uid: number, file: string): { readable: boolean; writable: boolean } {
  const may = (test: string) =>
    spawnSync('setpriv', ['--reuid', `${uid}`, '--regid', `${uid}`, '--clear-groups', 'test', test, file]).status === 0;
  return { readable: may('-r'), writable: may('-w') };
}
