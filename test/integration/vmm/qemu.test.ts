import { execFileSync } from 'node:child_process';
import { closeSync, existsSync, mkdirSync, readFileSync, readlinkSync } from 'node:fs';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest';
import { cpio } from '../../../scripts/lib/cpio.ts';
import { startHelper } from '../../../src/host/helper-process.ts';
import { NetworkNamespace } from '../../../src/sys/netns.ts';
import { listenForPeers } from '../../../src/sys/unix-fd.ts';
import { hostDevices } from '../../../src/vmm/host-devices.ts';
import { listenHybrid } from '../../../src/vmm/hybrid-vsock.ts';
import { chooseAccelerator, hostTscKhz } from '../../../src/vmm/qemu/accelerator.ts';
import { qemuArguments } from '../../../src/vmm/qemu/command-line.ts';
import { createQemu, type QemuOptions } from '../../../src/vmm/qemu/driver.ts';
import { startVsockBackend } from '../../../src/vmm/qemu/vsock-backend.ts';
import { filesPort, maxNetworkCards, type Vm, type VmConfig } from '../../../src/vmm/vmm.ts';
import { busyboxBinary, projectRoot } from '../../support/paths.ts';
import { noLogger, Workspace } from '../../unit/vmm/workspace.ts';

/** Real QEMU, the real backend and, where a test says so, the real guest. */
const distDir = path.join(projectRoot, 'dist');
const guest = {
  kernel: path.join(distDir, 'guest/vmlinux'),
  initrd: path.join(distDir, 'guest/initrd'),
  guestImage: path.join(distDir, 'guest/guest.erofs'),
};
const parking = NetworkNamespace.create();
const options: QemuOptions = {
  qemu: 'qemu-system-x86_64',
  vsockBackend: path.join(distDir, 'libexec/vhost-device-vsock'),
  accelerator: 'auto',
  channel: 'auto',
  parking,
  logger: noLogger,
};

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

async function boot(config: Partial<VmConfig> = {}, changed: Partial<QemuOptions> = {}): Promise<Vm> {
  const vm = await createQemu({ ...options, ...changed }).boot(
    { id: 'one', directory: workspace.sandbox, memoryMib: 256, vcpus: 1, networkCards: 0, ...guest, ...config },
    never,
  );
  vms.push(vm);
  return vm;
}

const waitForGuest = { timeout: 50_000, interval: 50 };

/** The guest's own initrd with another first program, which says on the console what a disk begins with. */
function lookingInitrd(serial: string): string {
  const script = `#!/bin/busybox sh
alias b=/bin/busybox
b mkdir -p /proc /sys /dev; b mount -t sysfs none /sys; b mount -t devtmpfs none /dev; exec >/dev/ttyS0 2>&1
while read module; do b insmod /modules/$module; done </modules/order
for disk in /sys/block/vd*; do [ $(b cat $disk/serial) != ${serial} ] || disk_name=\${disk##*/}; done
last=start
while b sleep 0.1; do
  word=$(b dd if=/dev/$disk_name bs=8 count=1 2>/dev/null | b tr -d '\\0')
  [ "$word" = "$last" ] || echo "sees \${word:-nothing after $last}"
  last=$word
done`;
  const archive = cpio([
    { name: 'init', mode: 0o100755, data: Buffer.from(script) },
    { name: 'bin', mode: 0o040755 },
    { name: 'bin/busybox', mode: 0o100755, data: readFileSync(busyboxBinary()) },
  ]);
  // Of two files with one name, the later counts: Documentation/driver-api/early-userspace/buffer-format.rst.
  return workspace.file('initrd', Buffer.concat([readFileSync(guest.initrd), archive]));
}

function expectNothingLeft(): void {
  expect(workspace.processes()).toEqual([]);
  expect(workspace.files()).toEqual([]);
}

describe('a guest in QEMU', () => {
  test('calls, gets disks, and its end by force from outside is told as that', async () => {
    const vm = await boot();
    const agent = await vm.acceptAgent(AbortSignal.timeout(50_000));
    const missing = workspace.path('missing');
    await expect(vm.attachDisk('ro0', missing)).rejects.toMatchObject({
      code: 'internal',
      message:
        `cannot put ${missing} behind drive slot ro0: ` +
        `QEMU refused blockdev-add: Could not open '${missing}': No such file or directory`,
    });
    const disk = workspace.file('disk', Buffer.alloc(1 << 20));
    await vm.attachDisk('ro0', disk);
    await expect(vm.attachDisk('ro0', disk)).rejects.toMatchObject({ code: 'failed-precondition' });
    // Several guests may read one file; for writing it is one guest's alone.
    await vm.attachDisk('ro7', disk);
    const writable = workspace.file('writable', Buffer.alloc(1 << 20));
    await vm.attachDisk('rw0', writable);
    await expect(vm.attachDisk('rw1', writable)).rejects.toThrow(/writable behind drive slot rw1: .*lock/);
    await vm.attachDisk('rw1', workspace.file('other', Buffer.alloc(1 << 20)));

    // Either may be first. A stream that holds what nobody has read never closes: the agent speaks first.
    agent.resume();
    const closed = new Promise((resolve) => agent.once('close', resolve));
    process.kill(vm.pid, 'SIGKILL');
    const exit = await vm.wait();
    expect(exit).toMatchObject({ code: null, signal: 'SIGKILL', guestStopped: false });
    await closed;
    await vm.kill();
    expectNothingLeft();
  });

  test('sees another file behind a drive slot that was emptied, and in between none', async () => {
    const vm = await boot({ initrd: lookingInitrd('rw7') });
    const says = async (word: string) => {
      await vi.waitFor(async () => expect(await vm.consoleTail(4096)).toContain(`sees ${word}`), waitForGuest);
    };
    await says('nothing');
    for (const word of ['first', 'second']) {
      await vm.attachDisk('rw7', workspace.file(word, Buffer.concat([Buffer.from(word), Buffer.alloc(1 << 20)])));
      await says(word);
      await vm.detachDisk('rw7');
      await says(`nothing after ${word}`);
    }
  });

  test('that cannot mount its image stops, and says why on its console', async () => {
    const vm = await boot({ guestImage: workspace.file('not-erofs', Buffer.alloc(1 << 20, 'no filesystem')) });
    await expect(vm.acceptAgent(never)).rejects.toMatchObject({
      code: 'unavailable',
      message: expect.stringMatching(
        /^the guest stopped before the agent called; last output:\n.*kiln-init: mount the guest image: /s,
      ),
    });
    expect(await vm.wait()).toMatchObject({ code: 0, signal: null, guestStopped: true });
    // The whole console for every reader, though QEMU gives it away once.
    expect(await vm.consoleTail(4096)).toContain('kiln-init: mount the guest image: ');
    await vm.kill();
    expectNothingLeft();
  });

  test('dials the port that the kernel’s command line names', async () => {
    await using stack = new AsyncDisposableStack();
    const { sandbox: directory } = workspace;
    const udsPath = path.join(directory, 'vsock');
    const listener = stack.use(await listenHybrid(udsPath, 40_000));
    const backend = stack.use(await startVsockBackend({ program: options.vsockBackend, directory, udsPath }, never));
    const args = qemuArguments({
      config: { id: 'one', directory, memoryMib: 256, vcpus: 1, networkCards: 0, ...guest },
      accelerator: chooseAccelerator('auto').accelerator,
      tscKhz: hostTscKhz(),
      channel: { kind: 'vhost-user', socket: backend.socket },
      memory: { kind: 'anonymous' },
      agentPort: 40_000,
      filesPort,
    });
    const control = listenForPeers(path.join(directory, 'qmp.sock'));
    stack.defer(() => closeSync(control));
    const helper = { program: options.qemu, args, directory, logName: 'vmm.log', title: 'QEMU', hint: '' };
    stack.use(await startHelper({ ...helper, inherit: [control] }));
    await listener.accept(AbortSignal.timeout(50_000));
  });
});

describe('QEMU', () => {
  test('runs where taps wait and has those of its network cards open, which go behind its back', async () => {
    const names = () => parking.run(() => readFileSync('/proc/thread-self/net/dev', 'utf8')).match(/kt[0-9a-f]{12}/g);
    const vm = await boot({ networkCards: maxNetworkCards });
    expect(readlinkSync(`/proc/${vm.pid}/ns/net`)).toBe(parking.identity);
    const taps = vm.nics.map(({ tap }) => tap);
    expect(taps).toHaveLength(maxNetworkCards);
    expect(names()?.sort()).toEqual([...taps].sort());
    // As one that a container has is gone when the VM is.
    vm.cardMoved(1);
    await vm.kill();
    expect(names() ?? []).not.toContain(taps[1]);
    await expect.poll(names).toBeNull();
    expectNothingLeft();
  });

  test('has one at the other end of the guest’s files where the channel is virtio-serial', async () => {
    const vm = await boot({}, { channel: 'virtio-serial' });
    closeSync(await vm.acceptFiles(never));
    await vm.kill();
    expectNothingLeft();
  });

  test('works in a directory with a comma in its name, and is gone when it is killed at once', async () => {
    const directory = `${workspace.sandbox}/a,b`;
    mkdirSync(directory);
    const vm = await boot({ directory, id: 'a,b' });
    expect(existsSync(`${directory}/vu.sock`)).toBe(true);
    await vm.kill();
    expect(workspace.processes()).toEqual([]);
  });

  test('that refuses the kernel says so in the error', async () => {
    const kernel = workspace.file('text', 'this is no kernel\n'.repeat(1000));
    await expect(boot({ kernel })).rejects.toMatchObject({
      code: 'internal',
      message: expect.stringMatching(/^QEMU ended at start \(exit code 1\): .*qemu.*/),
    });
    expectNothingLeft();
  });

  test('that gets no memory from the host says so in the error', async () => {
    const qemu = workspace.program('limited', `#!/bin/sh\nulimit -v 1000000\nexec ${options.qemu} "$@"\n`);
    await expect(boot({ memoryMib: 4096 }, { qemu })).rejects.toThrow(
      /^QEMU ended at start \(exit code 1\): .*Cannot allocate memory/,
    );
    expectNothingLeft();
  });

  test.skipIf(existsSync(hostDevices.vhostVsock))('without /dev/vhost-vsock cannot use kernel vsock', async () => {
    await expect(boot({}, { channel: 'kernel-vsock' })).rejects.toMatchObject({ code: 'failed-precondition' });
    expectNothingLeft();
  });

  test('has the words by which a CID in use is known', () => {
    // They cannot be provoked without /dev/vhost-vsock; error_setg_errno adds ": " and strerror(EADDRINUSE).
    const program = execFileSync('sh', ['-c', `command -v ${options.qemu}`], { encoding: 'utf8' }).trim();
    expect(readFileSync(program).includes('vhost-vsock: unable to set guest cid\0')).toBe(true);
  });
});
