import { closeSync, openSync, rmSync } from 'node:fs';
import path from 'node:path';
import { KilnError } from '../../errors.ts';
import { adoptHelper, type HelperProcess, startHelper } from '../../host/helper-process.ts';
import type { ProcessIdentity } from '../../host/process-identity.ts';
import { programIdentity } from '../../host/program.ts';
import { requireSocketPath } from '../../host/unix-socket.ts';
import type { Logger } from '../../observe/logger.ts';
import { listenForPeers } from '../../sys/unix-fd.ts';
import { makeTaps, type Parking } from '../cards.ts';
import { type AgentListener, type Channel, chooseChannel, type FirstConnection } from '../channel.ts';
import { type FileChannel, hybridFiles, type KernelFiles, kernelFiles, serialFiles } from '../file-channel.ts';
import { requireGuestFiles } from '../guest-files.ts';
import { type HostDevices, hostDevices } from '../host-devices.ts';
import { listenHybrid, listenHybridAgain, udsPathIn } from '../hybrid-vsock.ts';
import { listenKernel, randomCid } from '../kernel-vsock.ts';
import { type SerialConnection, serialConnection } from '../virtio-serial.ts';
import { agentPort, filesPort, type TemplateDriver, type Vm, type VmConfig, type Vmm, type VmRecord } from '../vmm.ts';
import { type Accelerator, chooseAccelerator, hostTscKhz } from './accelerator.ts';
import { type ChannelDevice, type GuestMemory, qemuArguments, stateFd } from './command-line.ts';
import { connectQmp, connectRestoring } from './control.ts';
import { type IdlePlugin, startWithPlugin } from './idle-plugin.ts';
import type { SavedState } from './migration.ts';
import { type ChannelRecord, parseQemuRecord } from './record.ts';
import { type QemuParts, QemuVm, SavableQemuVm } from './vm.ts';
import { startVsockBackend, vsockLogName, vsockSocketName } from './vsock-backend.ts';

export interface QemuOptions {
  /** Program name (found on PATH) or path. */
  readonly qemu: string;
  /** The vhost-device-vsock program; used by hybrid vsock only. */
  readonly vsockBackend: string;
  readonly accelerator: 'auto' | Accelerator;
  /** See CommandLineOptions. */
  readonly translationMib?: number | undefined;
  /** Of emulated guests; never without it. */
  readonly idlePlugin?: IdlePlugin | undefined;
  readonly channel: 'auto' | Channel;
  readonly logger: Logger;
  /** Where QEMU runs, and the taps of network cards wait. */
  readonly parking: Parking;
}

/** What QEMU says when a CID is another VM's (hw/virtio/vhost-vsock.c), and how many are tried. */
const cidInUse = /unable to set guest cid: Address already in use/;
const maxCidAttempts = 5;

/** @param devices of another host than this one, for tests */
export function createQemu(options: QemuOptions, devices: HostDevices = hostDevices): Vmm {
  return {
    name: 'qemu',
    boot: (config, signal) => bootQemu(options, devices, config, signal),
    adopt: adoptQemu,
    ...(options.channel === 'virtio-serial' ? { templates: templatesOf(options, devices) } : {}),
  };
}

/** Only virtio-serial can be saved: vhost-user-vsock has state in a program beside QEMU, which QEMU refuses to save. */
function templatesOf(options: QemuOptions, devices: HostDevices): TemplateDriver {
  let chosen: Accelerator | undefined;
  const accelerator = () => {
    chosen ??= chooseAccelerator(options.accelerator, devices).accelerator;
    return chosen;
  };
  const launchShape = (config: VmConfig, extra: Pick<Launch, 'memory' | 'state' | 'tscKhz'>, signal: AbortSignal) => {
    requireGuestFiles(config);
    return launch({ options, config, accelerator: accelerator(), channel: 'virtio-serial', ...extra }, signal);
  };
  return {
    files: [memoryName, stateName],
    get clonesAreCold() {
      return accelerator() === 'tcg';
    },
    fingerprint(shape) {
      // All that QEMU is told but for what differs from clone to clone, and the CPU's clock, which changes all the time.
      const args = qemuArguments({
        config: { ...shape, id: '', directory: '' },
        accelerator: accelerator(),
        translationMib: options.translationMib,
        tscKhz: undefined,
        channel: { kind: 'serial', filesSocket: '' },
        memory: { kind: 'anonymous' },
        agentPort,
        filesPort,
      });
      return [programIdentity(options.qemu), ...args];
    },
    async boot(config, template, signal) {
      const file = path.join(template, memoryName);
      // Made here, since QEMU would let everybody read it.
      closeSync(openSync(file, 'wx', 0o600));
      const kept = { memory: { kind: 'kept', file }, tscKhz: hostTscKhz(devices) } as const;
      const parts = await launchShape(config, kept, signal);
      return new SavableQemuVm(parts, path.join(template, stateName), migrationSocketIn(config.directory));
    },
    async restore(config, template, signal) {
      const memory = { kind: 'cloned', file: path.join(template, memoryName) } as const;
      // Where there is none, QEMU would make one of zeroes.
      closeSync(openTemplateFile(memory.file));
      const file = path.join(template, stateName);
      const state = { file, fd: openTemplateFile(file) };
      try {
        // Its kernel has read its command line.
        return new QemuVm(await launchShape(config, { memory, state, tscKhz: undefined }, signal));
      } finally {
        closeSync(state.fd);
      }
    },
  };
}

function openTemplateFile(file: string): number {
  try {
    return openSync(file, 'r');
  } catch (cause) {
    throw new KilnError('not-found', `${file} of the template cannot be read: ${(cause as Error).message}`, { cause });
  }
}

async function bootQemu(
  options: QemuOptions,
  devices: HostDevices,
  config: VmConfig,
  signal: AbortSignal,
): Promise<Vm> {
  requireGuestFiles(config);
  const { accelerator } = chooseAccelerator(options.accelerator, devices);
  const channel = chooseChannel(options.channel, devices);
  for (let attempt = 1; ; attempt++) {
    signal.throwIfAborted();
    try {
      const memory = { kind: 'anonymous' } as const;
      return new QemuVm(
        await launch({ options, config, accelerator, channel, tscKhz: hostTscKhz(devices), memory }, signal),
      );
    } catch (error) {
      if (!(error instanceof KilnError && cidInUse.test(error.message)) || attempt === maxCidAttempts) throw error;
    }
  }
}

interface Launch {
  readonly options: QemuOptions;
  readonly config: VmConfig;
  readonly accelerator: Accelerator;
  readonly channel: Channel;
  readonly tscKhz: number | undefined;
  readonly memory: GuestMemory;
  /** A clone's, with our descriptor of it. */
  readonly state?: SavedState;
}

function launch(request: Launch, signal: AbortSignal): Promise<QemuParts> {
  const { options, accelerator, memory } = request;
  const { qemu, logger } = options;
  // What becomes a template ends soon.
  const plugin = accelerator === 'tcg' && memory.kind !== 'kept' ? options.idlePlugin : undefined;
  return startWithPlugin({ qemu, plugin, logger }, (taken) => launchWith(taken, request, signal));
}

async function launchWith(plugin: IdlePlugin | undefined, request: Launch, signal: AbortSignal): Promise<QemuParts> {
  const { options, config, accelerator, tscKhz, memory, state } = request;
  await using stack = new AsyncDisposableStack();
  const pooled = plugin && config.pooled ? path.join(config.directory, pooledName) : undefined;
  if (pooled !== undefined) {
    stack.defer(() => rmSync(pooled, { force: true }));
    closeSync(openSync(pooled, 'w', 0o600));
  }
  const idlePlugin = plugin && { ...plugin, unless: pooled };
  const qmpSocket = qmpSocketIn(config.directory);
  stack.defer(() => rmSync(qmpSocket, { force: true }));
  // QEMU has the descriptors, then.
  using given = new DisposableStack();
  const { agent, device, backend, files, listeners } = await openChannel(request, { stack, given }, signal);
  const { translationMib } = options;
  const ports = { agentPort: agent.port, filesPort: files.port };
  const args = { config, accelerator, translationMib, idlePlugin, tscKhz, channel: device, memory, ...ports };
  requireSocketPath(qmpSocket);
  const taps = stack.use(makeTaps(options.parking, config.networkCards));
  const listener = given.adopt(listenForPeers(qmpSocket), closeSync);
  // Before QEMU runs, which then sees its host in the turn of its main loop in which it takes the first command. By the last
  // one, to load the state, the port has that host, as the state says.
  const answered = state === undefined ? undefined : agent.open?.();
  const qemu = stack.use(
    await startHelper({
      program: options.qemu,
      args: qemuArguments(args),
      directory: config.directory,
      logName: vmmLogName,
      title: 'QEMU (vm.qemu in the config file)',
      hint: 'install the package qemu-system-x86, or run `npm run setup`',
      inherit: [listener, ...taps.fds, ...listeners, ...(state === undefined ? [] : [state.fd])],
      network: options.parking,
      controlGroup: config.controlGroup,
    }),
  );
  // Theirs to close now, so that all connections end with QEMU.
  given.dispose();
  const connection = { socket: qmpSocket, qemu, stack };
  const control = await (state === undefined || answered === undefined
    ? connectQmp(connection, signal)
    : connectRestoring(connection, { state: { ...state, fd: stateFd(config) }, answered }, signal));
  const channel = channelRecord(device, agent, files);
  return { qemu, ...control, agent, channel, files, nics: taps.nics, taps, pooled, backend, resources: stack.move() };
}

interface OpenChannel {
  readonly agent: AgentListener & Partial<Pick<SerialConnection, 'open'>>;
  readonly device: ChannelDevice;
  readonly backend: HelperProcess | undefined;
  readonly files: Pick<KernelFiles, 'accept' | 'port'>;
  /** Descriptors for QEMU. */
  readonly listeners: readonly number[];
}

/**
 * The host's end of the channel, and the device that gives the guest its end.
 *
 * @param stack that owns it, and `given`, what QEMU gets
 */
async function openChannel(
  { channel, config, options }: Launch,
  { stack, given }: { readonly stack: AsyncDisposableStack; readonly given: DisposableStack },
  signal: AbortSignal,
): Promise<OpenChannel> {
  if (channel === 'kernel-vsock') {
    const cid = randomCid();
    const [agent, files] = [stack.use(listenKernel(cid)), stack.use(kernelFiles(cid))];
    return { agent, device: { kind: 'vhost-kernel', cid }, backend: undefined, files, listeners: [] };
  }
  if (channel === 'virtio-serial') {
    const [socket, filesSocket] = [serialSocketIn(config.directory), filesSocketIn(config.directory)];
    for (const file of [socket, filesSocket]) {
      requireSocketPath(file);
      stack.defer(() => rmSync(file, { force: true }));
    }
    // Ours to make, so that a clone's agent finds its host there.
    const listener = given.adopt(listenForPeers(socket), closeSync);
    const agent = { port: agentPort, ...stack.use(serialConnection(socket)) };
    const files = { port: filesPort, ...stack.use(serialFiles(filesSocket)) };
    return { agent, device: { kind: 'serial', filesSocket }, backend: undefined, files, listeners: [listener] };
  }
  const { directory, controlGroup } = config;
  const udsPath = udsPathIn(directory);
  const agent = stack.use(await listenHybrid(udsPath, agentPort));
  const backend = stack.use(
    await startVsockBackend({ program: options.vsockBackend, directory, controlGroup, udsPath }, signal),
  );
  const files = { port: filesPort, ...stack.use(hybridFiles(udsPath)) };
  const device = { kind: 'vhost-user', socket: backend.socket } as const;
  return { agent, device, backend: backend.process, files, listeners: [] };
}

/** Takes over a VM whose kilnd is gone: its control socket is there, and the agent dials again. */
async function adoptQemu(given: VmRecord, directory: string, signal: AbortSignal): Promise<Vm> {
  const record = parseQemuRecord(given);
  await using stack = new AsyncDisposableStack();
  const vsockSocket = path.join(directory, vsockSocketName);
  const sockets = [udsPathIn(directory), vsockSocket, serialSocketIn(directory), filesSocketIn(directory)];
  for (const file of [...sockets, qmpSocketIn(directory)]) {
    stack.defer(() => rmSync(file, { force: true }));
  }
  const backend = record.backend && adoptHelper(record.backend, { directory, logName: vsockLogName });
  const qemu = adoptHelper(record.qemu, { directory, logName: vmmLogName });
  for (const helper of [backend, qemu]) if (helper !== undefined) stack.use(helper);
  if (qemu === undefined) throw hasEnded('QEMU', record.qemu);
  if (backend === undefined && record.backend !== undefined) throw hasEnded('the vsock backend', record.backend);
  const control = await connectQmp({ socket: qmpSocketIn(directory), qemu, stack }, signal);
  const { channel, usedSlots, nics } = record;
  const files = filesAgain(channel, directory, stack);
  const resources = stack.move();
  const accept = async (accepting: AbortSignal) => {
    return resources.use(await listenAgain(channel, directory)).accept(accepting);
  };
  return new QemuVm({ qemu, ...control, agent: { accept }, channel, files, nics, usedSlots, backend, resources });
}

function hasEnded(what: string, { pid }: ProcessIdentity): KilnError {
  return new KilnError('not-found', `${what} (pid ${pid}) has ended`);
}

async function listenAgain(channel: ChannelRecord, directory: string): Promise<FirstConnection> {
  if (channel.kind === 'kernel-vsock') return listenKernel(channel.cid, channel.port);
  if (channel.kind === 'virtio-serial') return serialConnection(serialSocketIn(directory), { hadHost: true });
  return listenHybridAgain(udsPathIn(directory), agentPort);
}

/** Listens when it has to: the guest's files are served by the one who was asked before. */
function filesAgain(
  channel: ChannelRecord,
  directory: string,
  stack: AsyncDisposableStack,
): Pick<FileChannel, 'accept'> {
  switch (channel.kind) {
    case 'hybrid-vsock':
      return stack.use(hybridFiles(udsPathIn(directory)));
    case 'virtio-serial':
      return stack.use(serialFiles(filesSocketIn(directory)));
    case 'kernel-vsock':
      return {
        async accept(signal) {
          await using files = kernelFiles(channel.cid, channel.filesPort);
          return await files.accept(signal);
        },
      };
  }
}

function channelRecord(device: ChannelDevice, agent: AgentListener, files: { readonly port: number }): ChannelRecord {
  switch (device.kind) {
    case 'vhost-user':
      return { kind: 'hybrid-vsock' };
    case 'vhost-kernel':
      return { kind: 'kernel-vsock', cid: device.cid, port: agent.port, filesPort: files.port };
    case 'serial':
      return { kind: 'virtio-serial' };
  }
}

/** The files of a template: the guest's memory, as large as it is but for holes, and all else that QEMU knows of it. */
const memoryName = 'memory';
const stateName = 'state';

const vmmLogName = 'vmm.log';
const pooledName = 'pooled';

/** Where QEMU takes its commands. */
function qmpSocketIn(directory: string): string {
  return path.join(directory, 'qmp.sock');
}

/** Through which QEMU's state comes when it is saved. */
function migrationSocketIn(directory: string): string {
  return path.join(directory, 'save.sock');
}

/** See virtio-serial.ts. */
function serialSocketIn(directory: string): string {
  return path.join(directory, 'agent.sock');
}

/** See file-channel.ts. */
function filesSocketIn(directory: string): string {
  return path.join(directory, 'files.sock');
}
