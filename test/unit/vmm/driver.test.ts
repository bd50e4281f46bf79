import { once } from 'node:events';
import { chmodSync, closeSync, existsSync, mkdirSync, readdirSync, readFileSync, rmSync, statSync } from 'node:fs';
import net from 'node:net';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest';
import type { ControlGroup } from '../../../src/host/control-group.ts';
import { isAlive, type ProcessIdentity } from '../../../src/host/process-identity.ts';
import { loggerTo } from '../../../src/observe/logger.ts';
import { createQemu, type QemuOptions } from '../../../src/vmm/qemu/driver.ts';
import { readOnlySlots, type Vm, type VmConfig, type VmRecord, writableSlots } from '../../../src/vmm/vmm.ts';
import { hasVsock } from './vsock.ts';
import { noLogger, parking, Workspace } from './workspace.ts';

/** The driver, with QEMU and its backend played by programs of ours; the real ones are in test/integration/vmm. */
let workspace: Workspace;
let vms: Vm[];
beforeEach(() => {
  workspace = new Workspace();
  vms = [];
});
afterEach(async () => {
  for (const vm of vms) await vm.kill();
  workspace[Symbol.dispose]();
});

const never = new AbortController().signal;

/** The node of some block device, which is only looked at. */
const blockDevice = readdirSync('/sys/class/block')
  .map((name) => `/dev/${name}`)
  .find((file) => statSync(file, { throwIfNoEntry: false })?.isBlockDevice());

/** Whoever takes a VM over starts nothing. */
const nowhere = { qemu: '/nowhere', vsockBackend: '/nowhere' };

interface Host {
  readonly options?: Partial<QemuOptions>;
  readonly config?: Partial<VmConfig>;
  /** The host has /dev/vhost-vsock. */
  readonly vhostVsock?: boolean;
}

async function boot(mode: string, host: Host = {}, signal = never): Promise<Vm> {
  if (host.vhostVsock) workspace.file('vhost-vsock');
  const vmm = createQemu(
    {
      qemu: workspace.qemu(mode),
      vsockBackend: workspace.backend(),
      accelerator: 'auto',
      channel: 'auto',
      parking,
      logger: noLogger,
      ...host.options,
    },
    workspace.devices(),
  );
  const vm = await vmm.boot(workspace.vm(host.config), signal);
  vms.push(vm);
  return vm;
}

function expectNothingLeft(): void {
  expect(workspace.processes()).toEqual([]);
  expect(workspace.files()).toEqual([]);
}

describe('the plugin that gives memory of an idle guest back', () => {
  const file = '/lib/kiln,1.so';
  const plugins = () => workspace.qemuStarts().map((args) => args[args.indexOf('-plugin') + 1]);
  const idlePlugin = { file, afterS: 60 };

  test('is QEMU’s where the guest is emulated', async () => {
    await boot('running', { options: { idlePlugin } });
    expect(plugins()).toEqual(['file=/lib/kiln,,1.so,after=60']);
    expect(existsSync(path.join(workspace.sandbox, 'pooled'))).toBe(false);
  });

  test('leaves the memory of one that waits for a container, until it has one', async () => {
    const vm = await boot('running', { options: { idlePlugin }, config: { pooled: true } });
    const pooled = path.join(workspace.sandbox, 'pooled');
    expect(plugins()).toEqual([`file=/lib/kiln,,1.so,after=60,unless=${pooled}`]);
    expect(existsSync(pooled)).toBe(true);
    vm.leavePool();
    expect(existsSync(pooled)).toBe(false);
    vm.leavePool();
    await vm.kill();
    const other = await boot('running', { options: { idlePlugin }, config: { pooled: true } });
    await other.kill();
    expectNothingLeft();
  });

  test('is left out where QEMU refuses it, of which is told once', async () => {
    const told: string[] = [];
    const logger = loggerTo({ write: (line) => void told.push(line) }, 'warn');
    const options = { idlePlugin, logger };
    for (const _ of [1, 2]) await (await boot('no-plugins', { options })).kill();
    expect(workspace.qemuStarts().map((args) => args.includes('-plugin'))).toEqual([true, false, false]);
    expect(told.join()).toContain('QEMU takes no plugin of ours');
    expect(told.join()).toContain('no such interface');
    expect(told).toHaveLength(1);
    expectNothingLeft();
  });

  test('is no reason to start QEMU once more when something else is wrong', async () => {
    await expect(boot('exit', { options: { idlePlugin } })).rejects.toThrow('cannot set up guest memory');
    expect(workspace.qemuStarts()).toHaveLength(1);
  });
});

describe('the control group of a container', () => {
  test('has QEMU and its backend, from their start or later', async () => {
    const pids: number[] = [];
    const group: ControlGroup = { add: async (pid) => void pids.push(pid), limit: () => {} };
    const vm = await boot('running', { config: { controlGroup: group } });
    expect(pids).toHaveLength(2);
    expect(pids[1]).toBe(vm.pid);
    await vm.enter(group);
    expect(pids.slice(2)).toEqual(pids.slice(0, 2));
  });

  test('that cannot have them lets the start fail, and leaves nothing', async () => {
    const refusing = (pid: number) => Promise.reject(new Error(`no room for ${pid}`));
    const group: ControlGroup = { add: refusing, limit: () => {} };
    await expect(boot('running', { config: { controlGroup: group } })).rejects.toThrow(/^no room for \d+$/);
    expectNothingLeft();
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
      hint: expect.stringContaining('npm run setup'),
    });
    expect(workspace.has('qemu.starts')).toBe(false);
    expectNothingLeft();
  });

  test('because QEMU is missing names vm.qemu and the package', async () => {
    for (const qemu of ['no-such-qemu', '/no/such/qemu']) {
      await expect(boot('running', { options: { qemu } })).rejects.toMatchObject({
        code: 'failed-precondition',
        message: `cannot run QEMU (vm.qemu in the config file) "${qemu}": ENOENT`,
        hint: expect.stringContaining('qemu-system-x86'),
      });
      expectNothingLeft();
    }
  });

  test('because QEMU is a directory or may not be executed says so', async () => {
    await expect(boot('running', { options: { qemu: workspace.folder } })).rejects.toThrow(/cannot run QEMU .*EACCES/);
    const file = workspace.file('not-executable');
    chmodSync(file, 0o644);
    await expect(boot('running', { options: { qemu: file } })).rejects.toThrow(/cannot run QEMU .*EACCES/);
    expectNothingLeft();
  });

  test('because the backend is missing starts no QEMU', async () => {
    await expect(boot('running', { options: { vsockBackend: '/no/backend' } })).rejects.toThrow('/no/backend');
    expect(workspace.has('qemu.starts')).toBe(false);
    expectNothingLeft();
  });

  test('because QEMU ends carries its exit code and its stderr', async () => {
    await expect(boot('exit')).rejects.toMatchObject({
      code: 'internal',
      message: 'QEMU ended at start (exit code 1): qemu-system-x86_64: cannot set up guest memory',
    });
    expectNothingLeft();
  });

  test('because QEMU ends after it has connected carries its stderr just the same', async () => {
    await expect(boot('close')).rejects.toMatchObject({
      message: 'QEMU ended at start (exit code 1): qemu-system-x86_64: too late to say',
    });
    expectNothingLeft();
  });

  test('because the program is no QEMU ends that program', async () => {
    await expect(boot('rubbish')).rejects.toThrow('QEMU sent a line that is not QMP: 220 mail.example.org ESMTP');
    expectNothingLeft();
  });

  test.each(['silent', 'idle'])('because it is aborted while QEMU is %s ends QEMU', async (mode) => {
    const controller = new AbortController();
    const started = boot(mode, {}, controller.signal);
    await workspace.appears('qemu.starts');
    const reason = new Error('enough');
    controller.abort(reason);
    await expect(started).rejects.toBe(reason);
    expectNothingLeft();
  });

  test('because it was aborted before starts nothing', async () => {
    await expect(boot('running', {}, AbortSignal.abort(new Error('enough')))).rejects.toThrow('enough');
    expect(workspace.has('qemu.starts')).toBe(false);
    expectNothingLeft();
  });

  test('because the directory’s path is too long for a socket names KILN_STATE_DIR', async () => {
    const directory = path.join(workspace.folder, 'x'.repeat(100));
    mkdirSync(directory);
    await expect(boot('running', { config: { directory } })).rejects.toMatchObject({
      code: 'failed-precondition',
      message: expect.stringMatching(/the socket path .* the system's limit is 107/),
      hint: expect.stringContaining('KILN_STATE_DIR'),
    });
    expect(workspace.has('qemu.starts')).toBe(false);
  });

  test('because KVM is demanded and missing starts nothing', async () => {
    await expect(boot('running', { options: { accelerator: 'kvm' } })).rejects.toThrow('vm.accelerator is "kvm"');
    expectNothingLeft();
  });
});

describe('a running VM', () => {
  test('is found by the name of its QEMU on PATH', async () => {
    const before = process.env.PATH;
    process.env.PATH = `${workspace.folder}:${before}`;
    try {
      const vm = await boot('running', { options: { qemu: 'qemu' } });
      expect(workspace.processes()).toContain(String(vm.pid));
    } finally {
      process.env.PATH = before;
    }
  });

  test('is gone with its backend and sockets when it has been killed, for everybody who kills it', async () => {
    const vm = await boot('running');
    expect(workspace.processes()).toHaveLength(2);
    const kills = [vm.kill(), vm.kill()];
    await kills[1];
    expectNothingLeft();
    await kills[0];
    await vm.kill();
    expect(await vm.wait()).toMatchObject({ code: null, signal: 'SIGKILL', guestStopped: false });
    await expect(vm.acceptAgent(never)).rejects.toMatchObject({ code: 'unavailable' });
    await expect(vm.attachDisk('ro0', '/x')).rejects.toMatchObject({ code: 'unavailable' });
  });

  test('reports that the guest stopped even before QEMU could be asked', async () => {
    const vm = await boot('shutdown');
    await expect(vm.acceptAgent(never)).rejects.toMatchObject({
      code: 'unavailable',
      message: 'the guest stopped before the agent called; last output:\nKernel panic - not syncing',
    });
    expect(await vm.wait()).toEqual({
      code: 0,
      signal: null,
      guestStopped: true,
      consoleTail: expect.stringContaining('Kernel panic'),
    });
  });

  test('reports how QEMU ended while the agent was awaited', async () => {
    const vm = await boot('running');
    const call = vm.acceptAgent(never);
    process.kill(vm.pid, 'SIGKILL');
    await expect(call).rejects.toThrow('QEMU ended (SIGKILL) before the agent called');
    expect(await vm.wait()).toMatchObject({ code: null, signal: 'SIGKILL', guestStopped: false });
  });

  test('reports at once that its backend has ended, since nobody can call then', async () => {
    const vm = await boot('running');
    const call = vm.acceptAgent(never);
    const backend = workspace.processes().find((pid) => pid !== String(vm.pid));
    process.kill(Number(backend), 'SIGTERM');
    await expect(call).rejects.toThrow('the vsock backend ended (SIGTERM) before the agent called');
    await vm.channelLost;
  });

  test('has a slot free again when its file could not be attached, and its node removed', async () => {
    const vm = await boot('running');
    const refused = 'cannot put /disk behind drive slot ro7: QEMU refused blockdev-reopen: no reopen today';
    await expect(vm.attachDisk('ro7', '/disk')).rejects.toMatchObject({ code: 'internal', message: refused });
    await expect(vm.attachDisk('ro7', '/disk')).rejects.toMatchObject({ code: 'internal', message: refused });
    await vm.attachDisk('rw0', '/disk');
    await expect(vm.attachDisk('rw0', '/other')).rejects.toMatchObject({
      code: 'failed-precondition',
      message: 'drive slot rw0 already has a file',
    });
    const commands = readFileSync(workspace.path('qemu.commands'), 'utf8');
    expect(commands).toContain('{"execute":"blockdev-del","arguments":{"node-name":"ro7-file"}');
  });
});

describe('a drive slot that is emptied', () => {
  const commands = () =>
    readFileSync(workspace.path('qemu.commands'), 'utf8')
      .trim()
      .split('\n')
      .map((line) => JSON.parse(line))
      .filter(({ execute }) => execute.startsWith('blockdev'));

  test('has its empty node again, and takes another file', async () => {
    const vm = await boot('running');
    expect(vm.freeSlots).toEqual([...readOnlySlots, ...writableSlots]);
    await vm.attachDisk('rw3', '/disk');
    expect(vm.freeSlots).not.toContain('rw3');
    await vm.detachDisk('rw3');
    expect(vm.freeSlots).toContain('rw3');
    await vm.attachDisk('rw3', '/other');
    expect(
      commands().map(({ execute, arguments: args }) => [execute, args['node-name'] ?? args.options[0].file]),
    ).toEqual([
      ['blockdev-add', 'rw3-file'],
      ['blockdev-reopen', 'rw3-file'],
      ['blockdev-reopen', 'rw3-empty'],
      ['blockdev-del', 'rw3-file'],
      ['blockdev-add', 'rw3-file'],
      ['blockdev-reopen', 'rw3-file'],
    ]);
  });

  test.skipIf(blockDevice === undefined)('has a block device as one, which "file" refuses', async () => {
    const vm = await boot('running');
    await vm.attachDisk('rw0', blockDevice ?? '');
    await vm.attachDisk('rw1', '/disk');
    const drivers = commands().flatMap(({ execute, arguments: args }) =>
      execute === 'blockdev-add' ? [args.driver] : [],
    );
    expect(drivers).toEqual(['host_device', 'file']);
  });

  test('without having a file stays as it is', async () => {
    const vm = await boot('running');
    await vm.detachDisk('ro0');
    expect(workspace.has('qemu.commands') && commands()).toEqual([]);
  });

  test('is not one that the VM does not have', async () => {
    const vm = await boot('running');
    await expect(vm.attachDisk('ro8', '/disk')).rejects.toMatchObject({
      code: 'failed-precondition',
      message: 'this VM has no drive slot ro8',
    });
  });
});

describe('the files of a VM', () => {
  test('come by the connection that the guest dials', async () => {
    const vm = await boot('running');
    const accepting = vm.acceptFiles(never);
    const guest = net.connect(path.join(workspace.sandbox, 'vsock_9000'));
    guest.on('error', () => {});
    closeSync(await accepting);
    guest.destroy();
    await vm.kill();
    expectNothingLeft();
  });

  test('do not come when the VM ends before', async () => {
    const vm = await boot('running');
    const accepting = expect(vm.acceptFiles(never)).rejects.toMatchObject({
      code: 'unavailable',
      message: expect.stringMatching(/^QEMU ended \(SIGKILL\) before its files were served; last output:/),
    });
    process.kill(vm.pid, 'SIGKILL');
    await accepting;
    await vm.kill();
    expectNothingLeft();
  });
});

describe('the channel of a VM', () => {
  test('is hybrid vsock without /dev/vhost-vsock', async () => {
    await boot('running');
    expect(workspace.qemuStarts()[0]?.join(' ')).toMatch(/ vhost-user-vsock-device,/);
  });

  test('is an error where the kernel’s is demanded and missing', async () => {
    await expect(boot('running', { options: { channel: 'kernel-vsock' } })).rejects.toMatchObject({
      code: 'failed-precondition',
      hint: expect.stringContaining('modprobe vhost_vsock'),
    });
    expectNothingLeft();
  });

  const serial = { options: { channel: 'virtio-serial', vsockBackend: '/no/backend' } } as const;

  test('is a serial port where that is asked for: no backend is needed, and no socket left', async () => {
    const vm = await boot('running', serial);
    expect(workspace.processes()).toEqual([String(vm.pid)]);
    const agent = await vm.acceptAgent(never);
    agent.resume();
    expect(String((await once(agent, 'data'))[0])).toBe('hello');
    await vm.kill();
    expectNothingLeft();
  });

  test('by a serial port is taken over: the agent answers the next host, too', async () => {
    const first = await boot('running', serial);
    (await first.acceptAgent(never)).destroy();
    const options = { ...nowhere, accelerator: 'auto', channel: 'auto', parking, logger: noLogger } as const;
    const second = await createQemu(options, workspace.devices()).adopt(
      JSON.parse(JSON.stringify(first.record())),
      workspace.sandbox,
      never,
    );
    vms.push(second);
    const agent = await second.acceptAgent(never);
    agent.resume();
    expect(String((await once(agent, 'data'))[0])).toBe('hello');
    await second.kill();
    expectNothingLeft();
  });

  test('by a serial port on which nobody answers ends with the VM, or when nobody wants it any more', async () => {
    const vm = await boot('running=deaf', serial);
    const giveUp = new AbortController();
    const gaveUp = expect(vm.acceptAgent(giveUp.signal)).rejects.toThrow('enough');
    giveUp.abort(new Error('enough'));
    await gaveUp;
    const accepting = expect(vm.acceptAgent(never)).rejects.toMatchObject({ code: 'unavailable' });
    await vm.kill();
    await accepting;
    expectNothingLeft();
  });

  describe.skipIf(!hasVsock)('by the kernel (needs AF_VSOCK)', () => {
    const cidOf = (args: readonly string[]) => Number(/guest-cid=(\d+),/.exec(args.join(' '))?.[1]);
    const portOf = (args: readonly string[]) => Number(/kiln\.agent_port=(\d+)/.exec(args.join(' '))?.[1]);

    test('needs no backend; the agent is told the port', async () => {
      const vm = await boot('running', { vhostVsock: true, options: { vsockBackend: '/no/backend' } });
      expect(workspace.processes()).toEqual([String(vm.pid)]);
      const [args = []] = workspace.qemuStarts();
      expect(args.join(' ')).toMatch(/ vhost-vsock-device,guest-cid=\d+,bus=virtio-mmio-bus\.6$/);
      expect(cidOf(args)).toBeGreaterThan(2);
      expect(portOf(args)).toBeGreaterThan(1023);
    });

    test('tries another CID when one is in use', async () => {
      await boot('cid-in-use=2', { vhostVsock: true });
      const starts = workspace.qemuStarts();
      expect(starts).toHaveLength(3);
      expect(new Set(starts.map(cidOf)).size).toBe(3);
    });

    test('gives up with QEMU’s words when no CID is to be had', async () => {
      await expect(boot('cid-in-use=99', { vhostVsock: true })).rejects.toThrow(
        /^QEMU ended at start \(exit code 1\): .*unable to set guest cid: Address already in use$/,
      );
      expect(workspace.qemuStarts()).toHaveLength(5);
      expectNothingLeft();
    });

    test('is not tried when hybrid vsock is asked for', async () => {
      await boot('running', { vhostVsock: true, options: { channel: 'hybrid-vsock' } });
      expect(workspace.qemuStarts()[0]?.join(' ')).toMatch(/ vhost-user-vsock-device,/);
    });
  });
});

describe('a VM that is taken over', () => {
  const qemu = () => {
    const options = { ...nowhere, accelerator: 'auto', channel: 'auto', parking, logger: noLogger } as const;
    return createQemu(options, workspace.devices());
  };
  const adopt = async (record: VmRecord): Promise<Vm> => {
    const vm = await qemu().adopt(record, workspace.sandbox, never);
    vms.push(vm);
    return vm;
  };
  /** As it is written down. */
  const recordOf = (vm: Vm): VmRecord => JSON.parse(JSON.stringify(vm.record()));

  test('is the same process, starts nothing, and its agent can call again', async () => {
    const first = await boot('running');
    await first.attachDisk('ro0', '/l.erofs');
    const record = recordOf(first);
    const vm = await adopt(record);
    expect(vm.pid).toBe(first.pid);
    expect(recordOf(vm)).toEqual(record);
    expect(workspace.qemuStarts().length).toBe(1);
    const socket = path.join(workspace.sandbox, 'vsock_1024');
    // The earlier kilnd's, which is here still.
    rmSync(socket);
    const accepted = vm.acceptAgent(never);
    await vi.waitFor(() => expect(existsSync(socket)).toBe(true), { interval: 1 });
    const guest = net.connect(socket);
    guest.on('error', () => {});
    guest.write('hello');
    const agent = await accepted;
    expect(String((await once(agent, 'data'))[0])).toBe('hello');
    agent.destroy();
    guest.destroy();
  });

  test('knows which drive slots have a file, and takes files for the others', async () => {
    const first = await boot('running');
    await first.attachDisk('ro0', '/l.erofs');
    const vm = await adopt(recordOf(first));
    await expect(vm.attachDisk('ro0', '/other')).rejects.toMatchObject({
      code: 'failed-precondition',
      message: 'drive slot ro0 already has a file',
    });
    await vm.attachDisk('ro1', '/other');
    expect(vm.record().usedSlots).toEqual(['ro0', 'ro1']);
  });

  test('is ended as any other, with its backend, and leaves nothing', async () => {
    const first = await boot('running');
    const vm = await adopt(recordOf(first));
    await vm.kill();
    expect(await vm.wait()).toMatchObject({ code: null, signal: null, guestStopped: false });
    await first.wait();
    await first.kill();
    expectNothingLeft();
  });

  test('whose guest stopped while nobody was there says so', async () => {
    const first = await boot('running');
    const record = recordOf(first);
    // Behind its own question for the status.
    await first.consoleTail(1);
    workspace.file('qemu.status', 'guest-panicked');
    const vm = await adopt(record);
    expect(await vm.wait()).toMatchObject({ guestStopped: true, consoleTail: expect.stringContaining('Kernel panic') });
  });

  test('that has ended is not found, and its backend is ended', async () => {
    const first = await boot('running');
    const record = recordOf(first);
    process.kill(first.pid, 'SIGKILL');
    await first.wait();
    await expect(adopt(record)).rejects.toMatchObject({
      code: 'not-found',
      message: `QEMU (pid ${first.pid}) has ended`,
    });
    await first.kill();
    expectNothingLeft();
  });

  test('whose backend has ended is not found, and QEMU is ended', async () => {
    const first = await boot('running');
    const record = recordOf(first) as { backend: ProcessIdentity };
    process.kill(record.backend.pid, 'SIGKILL');
    // It has no environment any more a moment before it has ended.
    await vi.waitFor(() => expect(isAlive(record.backend)).toBe(false), { interval: 5 });
    expect(workspace.processes()).toEqual([String(first.pid)]);
    await expect(adopt(record)).rejects.toMatchObject({
      code: 'not-found',
      message: `the vsock backend (pid ${record.backend.pid}) has ended`,
    });
    await first.kill();
    expectNothingLeft();
  });

  test.each([
    ['of another version', { version: 2 }],
    ['without a process', { qemu: undefined }],
    ['with a slot that there is not', { usedSlots: ['ro8'] }],
  ])('from a record %s is refused', async (_what, change) => {
    const first = await boot('running');
    await expect(adopt({ ...recordOf(first), ...change })).rejects.toMatchObject({
      code: 'invalid-argument',
      message: expect.stringContaining('not a record of a QEMU VM: '),
    });
    process.kill(first.pid, 0);
  });
});
