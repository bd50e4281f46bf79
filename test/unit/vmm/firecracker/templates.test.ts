import { once } from 'node:events';
import {
  appendFileSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { createFirecracker, type FirecrackerOptions } from '../../../../src/vmm/firecracker/driver.ts';
import { slotsBeside } from '../../../../src/vmm/firecracker/drives.ts';
import type { SavableVm, TemplateDriver, Vm, VmConfig, Vmm } from '../../../../src/vmm/vmm.ts';
import { noLogger, parking, playedTaps, Workspace } from '../workspace.ts';
import { FakeKernel } from './fake-kernel.ts';

/** Saving and restoring, with Firecracker played by fake-firecracker.ts; for the real one see test/integration/vmm. */
let workspace: Workspace;
let template: string;
let vms: Vm[];
let kernel: FakeKernel;
beforeEach(() => {
  workspace = new Workspace();
  template = workspace.path('template');
  mkdirSync(template);
  // As it is where a template is made: the sandbox's directory is another one than the template's clones have.
  mkdirSync(path.join(template, 'vm'));
  vms = [];
  kernel = new FakeKernel();
});
afterEach(async () => {
  for (const vm of vms) await vm.kill();
  workspace[Symbol.dispose]();
});

const never = new AbortController().signal;
const uids = { first: 7000, count: 3 };

interface Host {
  readonly options?: Partial<FirecrackerOptions>;
  readonly config?: Partial<VmConfig>;
  readonly jailed?: boolean;
}

function vmm(mode: string, { options, jailed = false }: Host = {}): Vmm {
  mkdirSync(workspace.path('modules/kvm_intel'), { recursive: true });
  workspace.file('kvm');
  const cgroups = workspace.path('cgroup');
  mkdirSync(cgroups, { recursive: true });
  workspace.file('cgroup/cgroup.controllers', 'cpu memory pids\n');
  const mounts = workspace.file('mounts', `cgroup2 ${cgroups} cgroup2 rw 0 0\n`);
  const jailer = jailed ? workspace.jailer('jail') : '';
  const jail = () => (jailed ? { jailer, uids } : undefined);
  const defaults = {
    jail,
    logger: noLogger,
    parking,
    hugePages: false,
    bootTimer: false,
    memoryMaxMib: 0,
    diskLimits: { bytesPerS: 0, opsPerS: 0 },
    networkLimits: { bytesPerS: 0, opsPerS: 0 },
  };
  const host = {
    devices: workspace.devices(),
    jails: { kernel, claims: workspace.path('claims'), mounts },
    makeTaps: playedTaps,
  };
  return createFirecracker({ firecracker: workspace.firecracker(mode), ...defaults, ...options }, host);
}

function templates(mode = 'running', host: Host = {}): TemplateDriver {
  const { templates: driver } = vmm(mode, host);
  if (driver === undefined) throw new Error('this Firecracker has no templates');
  return driver;
}

async function boot(mode = 'running', host: Host = {}, signal = never): Promise<SavableVm> {
  const config = workspace.vm({ directory: path.join(template, 'vm'), ...host.config });
  const vm = await templates(mode, host).boot(config, template, signal);
  vms.push(vm);
  return vm;
}

async function restore(mode = 'running', host: Host = {}, signal = never): Promise<Vm> {
  const vm = await templates(mode, host).restore(workspace.vm(host.config), template, signal);
  vms.push(vm);
  return vm;
}

/** Makes a template as `buildTemplate` does, whose VM is gone then. */
async function makeTemplate(mode = 'running', host: Host = {}): Promise<void> {
  const vm = await boot(mode, host);
  // It is warmed up on a disk that is gone when it is saved.
  const disk = path.join(template, 'vm', 'prime.ext4');
  writeFileSync(disk, 'blank');
  await vm.attachDisk('rw0', disk);
  await vm.detachDisk('rw0');
  rmSync(disk);
  await vm.save(never);
  await vm.kill();
  rmSync(path.join(template, 'vm'), { recursive: true });
  rmSync(workspace.path('firecracker.requests'));
}

const memoryFile = () => path.join(template, 'memory');
const stateFile = () => path.join(template, 'state');
const modeOf = (file: string) => (statSync(file).mode & 0o777).toString(8);
const names = () => workspace.firecrackerRequests().map(({ name }) => name);
const bodyOf = (name: string) => workspace.firecrackerRequests().find((request) => request.name === name)?.body;

function leftInTemplate(): string[] {
  const folder = path.join(template, 'vm');
  return existsSync(folder) ? readdirSync(folder).filter((name) => !name.endsWith('.log')) : [];
}

function expectNothingLeft(): void {
  expect(workspace.processes()).toEqual([]);
  expect(workspace.files()).toEqual([]);
  expect(leftInTemplate()).toEqual([]);
  expect([...kernel.mounts]).toEqual([]);
  if (workspace.has('claims')) expect(readdirSync(workspace.path('claims'))).toEqual([]);
}

describe('the templates of Firecracker', () => {
  test('are none with huge pages, which could be restored by a program of ours alone', () => {
    expect(vmm('running', { options: { hugePages: true } }).templates).toBeUndefined();
  });

  test('have two files, and clones that are as fast as any VM', () => {
    expect(templates()).toMatchObject({ files: ['memory', 'state'], clonesAreCold: false });
  });

  test('depend on the program, the jailer, and all that Firecracker is told, but for the files of one VM', () => {
    const of = (host?: Host) => templates('running', host).fingerprint(workspace.vm());
    const [plain, jailed] = [of(), of({ jailed: true })];
    const limited = of({ options: { diskLimits: { bytesPerS: 1, opsPerS: 0 } } });
    // The program was written anew each time, and is another one.
    const settings = [plain, jailed, limited].map(([, , ...rest]) => rest.join());
    expect(new Set(settings).size).toBe(3);
    expect(plain).toContainEqual(expect.stringContaining(workspace.path('firecracker')));
    expect(jailed).toContainEqual(expect.stringContaining(workspace.path('jailer')));
    const driver = templates('running', { jailed: true });
    const shape = workspace.vm();
    expect(driver.fingerprint({ ...shape, vcpus: 2 })).not.toEqual(driver.fingerprint(shape));
    expect(driver.fingerprint(shape).join()).toContain('reboot=k');
    expect(driver.fingerprint(workspace.vm({ directory: workspace.path('other') }))).toEqual(driver.fingerprint(shape));
    for (const program of ['firecracker', 'jailer']) {
      const before = driver.fingerprint(shape);
      appendFileSync(workspace.path(program), '// upgraded\n');
      expect(driver.fingerprint(shape)).not.toEqual(before);
    }
  });

  test('depend on no program that there is not', () => {
    const options = { firecracker: 'no-such-firecracker' };
    expect(() => templates('running', { options }).fingerprint(workspace.vm())).toThrow(
      expect.objectContaining({ code: 'failed-precondition', message: 'there is no program no-such-firecracker' }),
    );
  });
});

describe.each([
  ['on the host', {}],
  ['in a jail', { jailed: true }],
])('a VM that can be saved, %s,', (_where, host: Host) => {
  test('takes one call after the other: the agent calls again when nobody speaks to it', async () => {
    const vm = await boot('running', host);
    for (const _call of [1, 2]) {
      const agent = await vm.acceptAgent(never);
      agent.resume();
      expect(String((await once(agent, 'data'))[0])).toBe('hello');
      agent.destroy();
    }
    await vm.kill();
    expectNothingLeft();
  });

  test('is paused, and written to files that only their owner reads', async () => {
    const vm = await boot('running', host);
    await vm.save(never);
    expect(names().slice(-2)).toEqual(['PATCH /vm', 'PUT /snapshot/create']);
    expect(statSync(memoryFile()).size).toBe(128 * 2 ** 20);
    expect([modeOf(memoryFile()), modeOf(stateFile())]).toEqual(['600', '600']);
    // Nobody in the jail can write them any more.
    expect([...kernel.mounts.keys()].filter((target) => /memory|state/.test(target))).toEqual([]);
    await vm.kill();
    expectNothingLeft();
  });

  test('tells Firecracker paths only that hold for every VM', async () => {
    await boot('running', host);
    const paths = workspace.firecrackerRequests().flatMap(({ body }) => {
      const { path_on_host: drive, uds_path: vsock } = (body ?? {}) as Record<string, string>;
      return [drive, vsock].filter((each) => each !== undefined);
    });
    // The guest image, vsock, and the slots.
    expect(paths).toHaveLength(2 + slotsBeside(0).length);
    expect(paths.filter((each) => each.includes(template))).toEqual([]);
  });
});

describe('a save that fails', () => {
  test.each(['PATCH /vm', 'PUT /snapshot/create'])('because Firecracker refuses %s has its words', async (request) => {
    const vm = await boot(`refuse=${request}`, { jailed: true });
    const message = `Firecracker refused ${request}: not in the mood`;
    await expect(vm.save(never)).rejects.toMatchObject({ code: 'internal', message });
    expect([...kernel.mounts.keys()].filter((target) => /memory|state/.test(target))).toEqual([]);
    await vm.kill();
    expectNothingLeft();
  });

  test('because Firecracker ends tells how', async () => {
    const vm = await boot('die=PUT /snapshot/create');
    await expect(vm.save(never)).rejects.toMatchObject({
      code: 'unavailable',
      message:
        'Firecracker ended (exit code 148: a system call that its seccomp filter forbids) while the VM was saved',
    });
    await vm.kill();
    expectNothingLeft();
  });

  test.each(['memory', 'state'])('because there is a %s already names it, and leaves it as it is', async (name) => {
    const vm = await boot();
    const file = path.join(template, name);
    writeFileSync(file, 'of another');
    await expect(vm.save(never)).rejects.toThrow(`EEXIST: file already exists, open '${file}'`);
    expect(readFileSync(file, 'utf8')).toBe('of another');
    expect(names()).not.toContain('PATCH /vm');
  });

  test('because its file cannot be shown in the jail tells why', async () => {
    const vm = await boot('running', { jailed: true });
    kernel.refusal = new Error('its file system cannot');
    await expect(vm.save(never)).rejects.toThrow('its file system cannot');
    await vm.kill();
    expectNothingLeft();
  });

  test('because nobody wants it any more', async () => {
    const vm = await boot('hang=PUT /snapshot/create', { jailed: true });
    const giveUp = new AbortController();
    const gaveUp = expect(vm.save(giveUp.signal)).rejects.toThrow('enough');
    await workspace.hasLine('firecracker.requests', 'PUT /snapshot/create');
    giveUp.abort(new Error('enough'));
    await gaveUp;
    await vm.kill();
    expectNothingLeft();
  });
});

describe.each([
  ['on the host', {}],
  ['in a jail', { jailed: true }],
])('a restored VM, %s,', (_where, host: Host) => {
  beforeEach(() => makeTemplate('running', host));

  test('is loaded before Firecracker is told anything else, and its agent calls', async () => {
    const vm = await restore('running', host);
    expect(names()).toEqual(['GET /version', 'PUT /serial', 'PUT /snapshot/load']);
    const inside = (name: string) => (host.jailed ? `/files/${name}` : path.join(template, name));
    expect(bodyOf('PUT /snapshot/load')).toEqual({
      snapshot_path: inside('state'),
      mem_backend: { backend_type: 'File', backend_path: inside('memory') },
      resume_vm: true,
      vsock_override: { uds_path: host.jailed ? '/v' : 'vsock' },
    });
    const agent = await vm.acceptAgent(never);
    agent.resume();
    expect(String((await once(agent, 'data'))[0])).toBe('hello');
    await vm.kill();
    expectNothingLeft();
  });

  test('has taps of its own behind the network cards of its template', async () => {
    rmSync(template, { recursive: true });
    mkdirSync(path.join(template, 'vm'), { recursive: true });
    const withCards = { ...host, config: { ...host.config, networkCards: 2 } };
    await makeTemplate('running', withCards);
    const vm = await restore('running', withCards);
    expect(vm.nics.map(({ mac }) => mac)).toEqual(['02:6b:69:6c:6e:00', '02:6b:69:6c:6e:01']);
    expect(bodyOf('PUT /snapshot/load')).toMatchObject({
      network_overrides: vm.nics.map(({ tap }, index) => ({ iface_id: `net${index}`, host_dev_name: tap })),
    });
  });

  test('has the drives of its template, and gets files behind them', async () => {
    const vm = await restore('running', host);
    const disk = workspace.file('disk', 'x');
    const { dev, rdev, ino } = statSync(disk, { bigint: true });
    expect(await vm.attachDisk('rw1', disk)).toBe(`${dev}${rdev}${ino}`.slice(0, 20));
    expect(names().at(-1)).toBe('PATCH /drives/rw1');
  });

  test('can be there more than once, each with sockets of its own', async () => {
    const one = await restore('running', host);
    const directory = workspace.path('second');
    mkdirSync(directory);
    const two = await restore('running', { ...host, config: { id: 'two', directory } });
    for (const vm of [one, two]) (await vm.acceptAgent(never)).destroy();
    expect(two.pid).not.toBe(one.pid);
    await two.kill();
    expect(readdirSync(directory).filter((name) => !name.endsWith('.log'))).toEqual([]);
  });

  test('is taken over as any other, and leaves the template as it was', async () => {
    const state = readFileSync(stateFile());
    const first = await restore('running', host);
    (await first.acceptAgent(never)).destroy();
    const record = JSON.parse(JSON.stringify(first.record()));
    const second = await vmm('running', host).adopt(record, workspace.sandbox, never);
    vms.push(second);
    expect(second.pid).toBe(first.pid);
    await second.kill();
    expectNothingLeft();
    expect(readFileSync(stateFile()).equals(state)).toBe(true);
    expect(statSync(memoryFile()).size).toBe(128 * 2 ** 20);
  });
});

test('in its jail, a clone can only read the files of its template, and only until they are loaded', async () => {
  await makeTemplate('running', { jailed: true });
  const shown: unknown[] = [];
  const mountFile = kernel.mountFile.bind(kernel);
  kernel.mountFile = (file, target, how) => {
    shown.push([file, how]);
    return mountFile(file, target, how);
  };
  await restore('running', { jailed: true });
  const how = { readOnly: true, uid: expect.any(Number) };
  for (const file of [memoryFile(), stateFile()]) expect(shown).toContainEqual([file, how]);
  expect([...kernel.mounts.keys()].filter((target) => /memory|state/.test(target))).toEqual([]);
});

describe('the version', () => {
  test.each(['1.13.1', '1.15.0'])('%s has templates, with the vsock where its template says', async (version) => {
    await makeTemplate(`version=${version}`);
    const vm = await restore(`version=${version}`);
    expect(bodyOf('PUT /snapshot/load')).not.toHaveProperty('vsock_override');
    (await vm.acceptAgent(never)).destroy();
  });

  test('1.16.0 has none, since its restored guests reach nobody', async () => {
    await expect(boot('version=1.16.0')).rejects.toMatchObject({
      code: 'failed-precondition',
      message: 'Firecracker 1.16.0 loses the calls of restored guests, so there are no templates with it',
      hint: 'install version 1.16.1 or newer, or 1.15',
    });
    expectNothingLeft();
  });
});

describe.each([
  ['on the host', {}],
  ['in a jail', { jailed: true }],
])('a restore that fails, %s,', (_where, host: Host) => {
  beforeEach(() => makeTemplate('running', host));

  test.each([
    ['is none', () => Buffer.from('rubbish that is no state'), 'CRC64 validation failed'],
    ['was changed', (state: Buffer) => Buffer.from(state).fill(0, 20, 24), 'CRC64 validation failed'],
  ])('because the state %s has Firecracker’s words', async (_what, spoil, words) => {
    writeFileSync(stateFile(), spoil(readFileSync(stateFile())));
    await expect(restore('running', host)).rejects.toMatchObject({
      code: 'internal',
      message: `Firecracker refused PUT /snapshot/load: Load snapshot error: Failed to restore from snapshot: ${words}`,
    });
    expectNothingLeft();
  });

  test('because the memory was cut has Firecracker’s words', async () => {
    writeFileSync(memoryFile(), 'short');
    await expect(restore('running', host)).rejects.toThrow('Firecracker refused PUT /snapshot/load: ');
    expectNothingLeft();
  });

  test('because another version has made it has Firecracker’s words', async () => {
    await expect(restore('version=1.17.0', host)).rejects.toThrow('Invalid data version');
    expectNothingLeft();
  });

  test.each(['state', 'memory'])('because the %s is missing names it, and starts nothing', async (name) => {
    const file = path.join(template, name);
    rmSync(file);
    await expect(restore('running', host)).rejects.toMatchObject({
      code: 'not-found',
      message: expect.stringContaining(`${file} of the template cannot be read: ENOENT`),
    });
    expect(workspace.has('firecracker.requests')).toBe(false);
    expectNothingLeft();
  });

  test('because Firecracker ends carries its exit', async () => {
    await expect(restore('die=PUT /snapshot/load', host)).rejects.toMatchObject({
      code: 'internal',
      message: expect.stringMatching(/^Firecracker ended at the restore of its state \(exit code 148: .*bad syscall/),
    });
    expectNothingLeft();
  });

  test('because nobody wants it any more ends Firecracker', async () => {
    const giveUp = new AbortController();
    const gaveUp = expect(restore('hang=PUT /snapshot/load', host, giveUp.signal)).rejects.toThrow('enough');
    await workspace.hasLine('firecracker.requests', 'PUT /snapshot/load');
    giveUp.abort(new Error('enough'));
    await gaveUp;
    expectNothingLeft();
  });
});
