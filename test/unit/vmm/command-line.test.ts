import { describe, expect, test } from 'vitest';
import {
  type CommandLineOptions,
  kernelCommandLine,
  qemuArguments,
  stateFd,
} from '../../../src/vmm/qemu/command-line.ts';
import { maxNetworkCards, readOnlySlots, writableSlots } from '../../../src/vmm/vmm.ts';

const options: CommandLineOptions = {
  config: {
    id: 'web-1',
    directory: '/run/kiln/c/1',
    memoryMib: 512,
    vcpus: 2,
    networkCards: 0,
    kernel: '/guest/vmlinux',
    initrd: '/guest/initrd',
    guestImage: '/guest/guest.erofs',
  },
  accelerator: 'tcg',
  tscKhz: 2_799_998,
  channel: { kind: 'vhost-user', socket: '/run/kiln/c/1/vu.sock' },
  memory: { kind: 'anonymous' },
  agentPort: 1024,
  filesPort: 9000,
};

/** The value after an option; of every occurrence. */
function valuesOf(args: readonly string[], option: string): string[] {
  return args.flatMap((arg, index) => (arg === option ? [args[index + 1]!] : []));
}

const devicesOf = (extra: Partial<CommandLineOptions> = {}) =>
  valuesOf(qemuArguments({ ...options, ...extra }), '-device');
const machineOf = (extra: Partial<CommandLineOptions> = {}) =>
  ['-M', '-cpu'].flatMap((option) => valuesOf(qemuArguments({ ...options, ...extra }), option));

test('puts the guest image first and then the slots on the transports from 23 downward, none twice', () => {
  const devices = devicesOf();
  const transports = devices.map((device) => Number(/virtio-mmio-bus\.(\d+)/.exec(device)?.[1]));
  expect(transports).toEqual([23, 22, 21, 20, 19, 18, 17, 16, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6]);
  const serials = devices.flatMap((device) => /serial=(\w+)/.exec(device)?.[1] ?? []);
  expect(serials).toEqual(['guest', ...readOnlySlots, ...writableSlots]);
  // virtio allows 20 bytes for a serial.
  expect(Math.max(...serials.map((serial) => serial.length))).toBeLessThanOrEqual(20);
});

test('makes empty slots of 1 TiB, the writable ones writable and giving freed blocks back', () => {
  const nodes = valuesOf(qemuArguments(options), '-blockdev').map((json) => JSON.parse(json));
  expect(nodes[0]).toEqual({
    driver: 'raw',
    'node-name': 'guest',
    'read-only': true,
    file: { driver: 'file', filename: '/guest/guest.erofs', 'read-only': true },
  });
  const slots = nodes.slice(1).filter(({ driver }) => driver === 'raw');
  expect(slots.map((node) => [node['node-name'], node['read-only'], node.discard, node.file])).toEqual([
    ...readOnlySlots.map((name) => [name, true, undefined, `${name}-empty`]),
    ...writableSlots.map((name) => [name, false, 'unmap', `${name}-empty`]),
  ]);
  const empty = nodes.filter(({ driver }) => driver === 'null-co');
  expect(empty.map((node) => node['node-name'])).toEqual(slots.map(({ file }) => file));
  for (const node of empty) expect(node).toMatchObject({ size: 2 ** 40, 'read-zeroes': true });
});

test('lets the guest see a full disk of the host as an error and not as a VM that stands still', () => {
  for (const device of devicesOf().filter((it) => it.startsWith('virtio-blk'))) {
    expect(device).toMatch(/rerror=report,werror=report$/);
  }
});

test('gives a guest under TCG the legacy timers and the frequency of the TSC, and one under KVM neither', () => {
  expect(machineOf()).toEqual(['microvm,accel=tcg,acpi=on,pit=on,pic=on,rtc=on,memory-backend=mem', 'max,-erms']);
  expect(kernelCommandLine(options)).toContain(' kiln.emulated tsc=reliable tsc_early_khz=2799998');
  expect(machineOf({ translationMib: 32 })).toEqual([
    'microvm,acpi=on,pit=on,pic=on,rtc=on,memory-backend=mem',
    'max,-erms',
  ]);
  expect(qemuArguments({ ...options, translationMib: 32 }).join(' ')).toContain(' -accel tcg,tb-size=32 ');
  const idlePlugin = { file: '/a.so', afterS: 5, unless: '/b,c' };
  expect(valuesOf(qemuArguments({ ...options, idlePlugin }), '-plugin')).toEqual(['file=/a.so,after=5,unless=/b,,c']);
  expect(valuesOf(qemuArguments(options), '-plugin')).toEqual([]);
  expect(machineOf({ accelerator: 'kvm', translationMib: 32 }).join(' ')).not.toContain('tb-size');
  expect(machineOf({ accelerator: 'kvm' })).toEqual(['microvm,accel=kvm,acpi=on,rtc=on,memory-backend=mem', 'host']);
  expect(kernelCommandLine({ ...options, accelerator: 'kvm' })).not.toMatch(/tsc|kiln\.emulated/);
  expect(kernelCommandLine({ ...options, tscKhz: undefined })).not.toContain('tsc_early_khz');
});

test('names the root disk to a kernel without initrd, and leaves it to the initrd otherwise', () => {
  const { initrd: _, ...rest } = options.config;
  const without = { ...options, config: { ...rest, initrd: undefined } };
  expect(valuesOf(qemuArguments(options), '-initrd')).toEqual(['/guest/initrd']);
  expect(kernelCommandLine(options)).not.toContain('root=');
  expect(qemuArguments(without)).not.toContain('-initrd');
  expect(kernelCommandLine(without)).toContain('root=/dev/vda rootfstype=erofs ro init=/sbin/kiln-init');
});

test("names the firmware, since QEMU's own choice may put ACPI's tables where the initrd is", () => {
  expect(valuesOf(qemuArguments(options), '-bios')).toEqual(['qboot.rom']);
});

test('has the kernel end the VM on a panic, and QEMU keep it until its console has been read', () => {
  expect(kernelCommandLine(options)).toMatch(/ panic=-1 reboot=\w /);
  const args = qemuArguments(options);
  expect(args).toContain('-no-reboot');
  expect(valuesOf(args, '-action')).toEqual(['shutdown=pause,panic=pause']);
});

test('tells the agent its port only where it is not the usual one', () => {
  expect(kernelCommandLine(options)).not.toContain('kiln.agent_port');
  expect(kernelCommandLine({ ...options, agentPort: 4_000_000_000 })).toContain(' kiln.agent_port=4000000000');
});

test('uses the vsock device of the channel', () => {
  expect(devicesOf().at(-1)).toBe('vhost-user-vsock-device,chardev=vsock,bus=virtio-mmio-bus.6');
  const kernel = qemuArguments({ ...options, channel: { kind: 'vhost-kernel', cid: 77 } });
  expect(valuesOf(kernel, '-device').at(-1)).toBe('vhost-vsock-device,guest-cid=77,bus=virtio-mmio-bus.6');
  expect(valuesOf(kernel, '-chardev').join()).not.toContain('id=vsock');
});

test('has a serial port for the agent where that is the channel, and tells it', () => {
  const serial = {
    ...options,
    channel: { kind: 'serial', filesSocket: '/r,1/files.sock' },
  } as const;
  const args = qemuArguments(serial);
  expect(valuesOf(args, '-chardev')).toContain('socket,id=agent,fd=4,server=on,wait=off');
  expect(valuesOf(args, '-chardev')).toContain('socket,id=files,path=/r,,1/files.sock,server=on,wait=off');
  expect(valuesOf(args, '-device').slice(-3)).toEqual([
    'virtio-serial-device,id=serial,bus=virtio-mmio-bus.6',
    'virtserialport,bus=serial.0,nr=1,chardev=agent,name=kiln.agent',
    'virtserialport,bus=serial.0,nr=2,chardev=files,name=kiln.files',
  ]);
  expect(kernelCommandLine(serial)).toContain(' kiln.channel=virtio-serial');
  expect(kernelCommandLine(options)).not.toContain('kiln.channel');
});

describe('network cards', () => {
  const withCards = (networkCards: number) => ({ ...options, config: { ...options.config, networkCards } });

  test('have taps by the descriptors after the control socket’s, and MACs by which the guest finds them', () => {
    const args = qemuArguments(withCards(2));
    expect(valuesOf(args, '-netdev')).toEqual(['tap,id=net0,fd=4', 'tap,id=net1,fd=5']);
    const cards = valuesOf(args, '-device').filter((device) => device.startsWith('virtio-net-device,'));
    expect(cards.map((card) => /mac=([0-9a-f:]+)/.exec(card)?.[1])).toEqual(['02:6b:69:6c:6e:00', '02:6b:69:6c:6e:01']);
    expect(stateFd(withCards(2).config)).toBe(7);
    expect(stateFd(withCards(0).config)).toBe(5);
  });

  test('are on transports of their own, none of them number 0, however many there are', () => {
    const transports = valuesOf(qemuArguments(withCards(maxNetworkCards)), '-device').flatMap((device) => {
      return /virtio-mmio-bus\.(\d+)/.exec(device)?.[1] ?? [];
    });
    expect(new Set(transports).size).toBe(transports.length);
    expect(Math.min(...transports.map(Number))).toBeGreaterThan(0);
  });

  test('do not tell a network that they have moved, since all VMs have the same MACs', () => {
    const cards = valuesOf(qemuArguments(withCards(4)), '-device').filter((device) => device.startsWith('virtio-net'));
    expect(cards).toHaveLength(4);
    for (const card of cards) expect(card).toContain(',guest_announce=off,');
  });
});

test('tells the guest the port of its files where that is not the usual one', () => {
  expect(kernelCommandLine({ ...options, filesPort: 5123 })).toContain(' kiln.files_port=5123');
  expect(kernelCommandLine(options)).not.toContain('kiln.files_port');
});

describe('the guest’s memory', () => {
  const argsOf = (memory: CommandLineOptions['memory']) => qemuArguments({ ...options, memory });
  const file = '/templates/a,b/memory';

  test('is nobody’s but the VM’s, and can be mapped by a vhost-user backend', () => {
    const args = argsOf({ kind: 'anonymous' });
    expect(valuesOf(args, '-object')).toEqual(['memory-backend-memfd,id=mem,size=512M,share=on']);
    expect(args).not.toContain('-incoming');
  });

  test('that is kept is a file which gets all that the guest writes', () => {
    const args = argsOf({ kind: 'kept', file });
    expect(valuesOf(args, '-object')).toEqual([
      'memory-backend-file,id=mem,size=512M,share=on,mem-path=/templates/a,,b/memory',
    ]);
    expect(args).not.toContain('-incoming');
  });

  test('that is cloned is a file which gets nothing, and the VM awaits its state', () => {
    const args = argsOf({ kind: 'cloned', file });
    expect(valuesOf(args, '-object')).toEqual([
      'memory-backend-file,id=mem,size=512M,share=off,mem-path=/templates/a,,b/memory',
    ]);
    expect(valuesOf(args, '-incoming')).toEqual(['defer']);
  });

  test('is the machine’s, and the only difference between a VM that is saved and its clones', () => {
    for (const accelerator of ['tcg', 'kvm'] as const) {
      expect(valuesOf(qemuArguments({ ...options, accelerator }), '-M')[0]).toMatch(/,memory-backend=mem$/);
    }
    const kept = argsOf({ kind: 'kept', file }).map((arg) => arg.replace('share=on', 'share=off'));
    expect(argsOf({ kind: 'cloned', file })).toEqual(
      kept.toSpliced(kept.findIndex((arg) => arg.startsWith('memory-backend-file')) + 1, 0, '-incoming', 'defer'),
    );
  });
});

test('doubles the commas of paths and names inside of option lists, and nowhere else', () => {
  const args = qemuArguments({
    ...options,
    config: { ...options.config, id: 'a,b', kernel: '/g,1/vmlinux', initrd: '/g,1/initrd', guestImage: '/g,1/image' },
    channel: { kind: 'vhost-user', socket: '/r,1/vu.sock' },
  });
  expect(valuesOf(args, '-name')).toEqual(['kiln-a,,b,debug-threads=on']);
  expect(valuesOf(args, '-kernel')).toEqual(['/g,1/vmlinux']);
  expect(valuesOf(args, '-initrd')).toEqual(['/g,1/initrd']);
  expect(valuesOf(args, '-chardev').filter((it) => it.startsWith('socket'))).toEqual([
    'socket,id=qmp,fd=3,server=on,wait=off',
    'socket,id=vsock,path=/r,,1/vu.sock',
  ]);
  expect(JSON.parse(valuesOf(args, '-blockdev')[0]!).file.filename).toBe('/g,1/image');
});
