import { commonKernelWords } from '../kernel-words.ts';
import {
  agentPort,
  cardMac,
  filesPort,
  readOnlySlots,
  type SlotName,
  type VmConfig,
  type VmShape,
  writableSlots,
} from '../vmm.ts';
import type { Accelerator } from './accelerator.ts';
import type { IdlePlugin } from './idle-plugin.ts';

/** Size that the guest sees on an empty slot; the real file's size counts once one is attached. */
const emptySlotBytes = 2 ** 40;

/** Bytes of guest console that QEMU keeps; a power of two (qemu-options: ringbuf). */
export const consoleBufferBytes = 64 * 1024;

/**
 * microvm has 24 virtio transports with ACPI (hw/i386/microvm.c), and the guest enumerates them from the last to the
 * first. The low ones share interrupt lines with legacy devices: a disk on transport 0 never gets its interrupt.
 */
const lastTransport = 23;

/**
 * microvm's small firmware, which every QEMU brings. The one that it takes by itself is SeaBIOS in Debian 13, whose ACPI tables are
 * at the end of memory, where the initrd is, too: the guest finds no tables, or what it has loaded is spoilt.
 */
const firmware = 'qboot.rom';

/** The descriptor on which QEMU gets its listening control socket: the first after the standard ones. */
export const qmpFd = 3;

/** Then the taps of its network cards. */
export const firstTapFd = qmpFd + 1;

/** Then, with a serial channel, the listening socket of the agent's port. */
export function serialFd({ networkCards }: Pick<VmShape, 'networkCards'>): number {
  return firstTapFd + networkCards;
}

/** And then, of a clone, the state that was saved. */
export function stateFd(shape: Pick<VmShape, 'networkCards'>): number {
  return serialFd(shape) + 1;
}

/** The guest's end of the channel. */
export type ChannelDevice =
  | { readonly kind: 'vhost-user'; readonly socket: string }
  | { readonly kind: 'serial'; readonly filesSocket: string }
  | { readonly kind: 'vhost-kernel'; readonly cid: number };

/** What is behind the guest's memory. */
export type GuestMemory =
  | { readonly kind: 'anonymous' }
  /** A file that gets all that the guest writes. */
  | { readonly kind: 'kept'; readonly file: string }
  /** A file of which the guest gets a private copy, page by page as it writes; its state comes by migration. */
  | { readonly kind: 'cloned'; readonly file: string };

export interface CommandLineOptions {
  readonly config: VmConfig;
  readonly accelerator: Accelerator;
  /** MiB for the code that an emulated guest's is translated to; QEMU's own choice when absent. */
  readonly translationMib?: number | undefined;
  /** See idle-plugin.ts. */
  readonly idlePlugin?: IdlePlugin | undefined;
  readonly tscKhz: number | undefined;
  readonly channel: ChannelDevice;
  readonly memory: GuestMemory;
  /** The vsock ports on which the host awaits the agent's call, and that of the guest's files. */
  readonly agentPort: number;
  readonly filesPort: number;
}

/** The kernel's command line. `-no-reboot` turns a reboot into a stop. */
export function kernelCommandLine(options: CommandLineOptions): string {
  const words = commonKernelWords(options.config, 't');
  if (options.accelerator === 'tcg') {
    // Else Linux compares the TSC with its own count of ticks, twice a second, and gives the TSC up for good when a tick came
    // late, as on a busy host it does: then it counts ticks instead, and those that are lost.
    words.push('kiln.emulated', 'tsc=reliable');
    if (options.tscKhz !== undefined) words.push(`tsc_early_khz=${options.tscKhz}`);
  }
  if (options.channel.kind === 'serial') words.push('kiln.channel=virtio-serial');
  // The agent knows the usual one; any other is told to it here.
  if (options.agentPort !== agentPort) words.push(`kiln.agent_port=${options.agentPort}`);
  if (options.filesPort !== filesPort) words.push(`kiln.files_port=${options.filesPort}`);
  return words.join(' ');
}

/** A value inside one of QEMU's comma-separated options: a comma in it is written twice (qemu(1), "-drive"). */
function optionValue(value: string): string {
  return value.replaceAll(',', ',,');
}

/**
 * The raw node that a drive slot's device sees; reopened with the same options when another file is put below it.
 * `discard`: blocks that the guest frees are given back to the host; the node above has to pass that on, too.
 */
export function slotNode(node: string, readOnly: boolean, file: string | Record<string, unknown>) {
  return { driver: 'raw', 'node-name': node, 'read-only': readOnly, ...(readOnly ? {} : { discard: 'unmap' }), file };
}

function drive(
  node: string,
  readOnly: boolean,
  file: string | Record<string, unknown>,
  serial: string,
  transport: number,
) {
  // The transport is given so that the guest image is the first disk whatever QEMU's default is.
  const place = `serial=${serial},bus=virtio-mmio-bus.${transport}`;
  return [
    '-blockdev',
    JSON.stringify(slotNode(node, readOnly, file)),
    '-device',
    // The guest gets every error of the host's disk. QEMU's default for a full one is to stop the VM without a word.
    `virtio-blk-device,drive=${node},${place},rerror=report,werror=report`,
  ];
}

/** The node below a slot that has no file. */
export function emptyNode(slot: SlotName): string {
  return `${slot}-empty`;
}

function emptySlot(name: SlotName, readOnly: boolean, transport: number): string[] {
  const nothing = { driver: 'null-co', 'node-name': emptyNode(name), size: emptySlotBytes, 'read-zeroes': true };
  // A node in its own right, which stays when a file takes its place, and takes that place again.
  return ['-blockdev', JSON.stringify(nothing), ...drive(name, readOnly, emptyNode(name), name, transport)];
}

/**
 * `guest_announce`: after a restore the guest would tell a network that it has moved, by a MAC that all VMs have. The rest
 * is virtio-net's own: no second queue, and no control of what it is not asked for.
 */
function networkCard(index: number, transport: number): string[] {
  return [
    ...['-netdev', `tap,id=net${index},fd=${firstTapFd + index}`],
    '-device',
    `virtio-net-device,netdev=net${index},mac=${cardMac(index)},guest_announce=off,bus=virtio-mmio-bus.${transport}`,
  ];
}

function channelDevice(channel: ChannelDevice, config: VmConfig, bus: string): string[] {
  switch (channel.kind) {
    case 'vhost-user':
      return [
        ...['-chardev', `socket,id=vsock,path=${optionValue(channel.socket)}`],
        ...['-device', `vhost-user-vsock-device,chardev=vsock,bus=${bus}`],
      ];
    case 'vhost-kernel':
      return ['-device', `vhost-vsock-device,guest-cid=${channel.cid},bus=${bus}`];
    case 'serial':
      return [
        ...['-chardev', `socket,id=agent,fd=${serialFd(config)},server=on,wait=off`],
        ...['-device', `virtio-serial-device,id=serial,bus=${bus}`],
        // Port 0 is for consoles; the name is what the agent looks for (agent/serial-port.ts).
        ...['-device', 'virtserialport,bus=serial.0,nr=1,chardev=agent,name=kiln.agent'],
        ...['-chardev', `socket,id=files,path=${optionValue(channel.filesSocket)},server=on,wait=off`],
        ...['-device', 'virtserialport,bus=serial.0,nr=2,chardev=files,name=kiln.files'],
      ];
  }
}

/**
 * All that QEMU can emulate, but for the hint that REP STOSB and REP MOVSB are quick: QEMU makes a byte at a time, and Linux takes eight
 * at a time then, by which pages are cleared and copied six times as fast.
 */
const emulatedCpu = 'max,-erms';

function machineOptions({ accelerator, translationMib }: CommandLineOptions): string[] {
  if (accelerator === 'kvm') return ['-M', 'microvm,accel=kvm,acpi=on,rtc=on,memory-backend=mem', '-cpu', 'host'];
  // Under TCG the guest needs the legacy timers to calibrate against.
  const machine = 'acpi=on,pit=on,pic=on,rtc=on,memory-backend=mem';
  if (translationMib === undefined) return ['-M', `microvm,accel=tcg,${machine}`, '-cpu', emulatedCpu];
  return ['-accel', `tcg,tb-size=${translationMib}`, '-M', `microvm,${machine}`, '-cpu', emulatedCpu];
}

function idleOptions(plugin: IdlePlugin | undefined): string[] {
  if (plugin === undefined) return [];
  const { file, afterS, unless } = plugin;
  const suffix = unless === undefined ? '' : `,unless=${optionValue(unless)}`;
  return ['-plugin', `file=${optionValue(file)},after=${afterS}${suffix}`];
}

function memoryBackend(memory: GuestMemory, sizeMib: number): string[] {
  const common = `id=mem,size=${sizeMib}M`;
  switch (memory.kind) {
    case 'anonymous':
      // memfd and share=on: vhost-user backends map the guest's memory.
      return ['-object', `memory-backend-memfd,${common},share=on`];
    case 'kept':
      return ['-object', `memory-backend-file,${common},share=on,mem-path=${optionValue(memory.file)}`];
    case 'cloned':
      return [
        ...['-object', `memory-backend-file,${common},share=off,mem-path=${optionValue(memory.file)}`],
        ...['-incoming', 'defer'],
      ];
  }
}

/**
 * QEMU's arguments for a microvm with placeholder drives, network cards, a console ring buffer, and a QMP server on
 * `qmpFd`.
 */
export function qemuArguments(options: CommandLineOptions): string[] {
  const { config } = options;
  let transport = lastTransport;
  const guestImage = { driver: 'file', filename: config.guestImage, 'read-only': true };
  const disks = [
    ...drive('guest', true, guestImage, 'guest', transport--),
    ...readOnlySlots.flatMap((name) => emptySlot(name, true, transport--)),
    ...writableSlots.flatMap((name) => emptySlot(name, false, transport--)),
  ];
  const channel = channelDevice(options.channel, config, `virtio-mmio-bus.${transport--}`);
  const cards = Array.from({ length: config.networkCards }, (_, index) => networkCard(index, transport--)).flat();
  return [
    ...[
      '-name',
      `kiln-${optionValue(config.id)},debug-threads=on`,
      '-nodefaults',
      '-no-user-config',
      '-display',
      'none',
    ],
    // A stopped guest is kept until we have read its console; then we end QEMU ourselves.
    ...['-no-reboot', '-action', 'shutdown=pause,panic=pause'],
    ...['-sandbox', 'on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny'],
    ...machineOptions(options),
    ...idleOptions(options.idlePlugin),
    ...['-bios', firmware],
    ...['-smp', String(config.vcpus)],
    ...['-m', `${config.memoryMib}M`],
    ...memoryBackend(options.memory, config.memoryMib),
    ...['-kernel', config.kernel, ...(config.initrd === undefined ? [] : ['-initrd', config.initrd])],
    ...['-append', kernelCommandLine(options)],
    ...['-chardev', `ringbuf,id=console,size=${consoleBufferBytes}`, '-serial', 'chardev:console'],
    ...['-chardev', `socket,id=qmp,fd=${qmpFd},server=on,wait=off`, '-mon', 'chardev=qmp,mode=control'],
    ...disks,
    ...channel,
    ...cards,
  ];
}
