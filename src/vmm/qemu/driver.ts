import { accessSync, constants } from 'node:fs';
import path from 'node:path';
import { KilnError } from '../../errors.ts';
import { describeExit, type HelperProcess, startHelper } from '../../host/helper-process.ts';
import { listenUnix } from '../../host/unix-socket.ts';
import { abortable } from '../abortable.ts';
import { type AgentListener, type Channel, chooseChannel, type FirstConnection, firstConnection } from '../channel.ts';
import { type HostDevices, hostDevices } from '../host-devices.ts';
import { listenHybrid } from '../hybrid-vsock.ts';
import { listenKernel, randomCid } from '../kernel-vsock.ts';
import { agentPort, type Vm, type VmConfig, type Vmm } from '../vmm.ts';
import { type Accelerator, chooseAccelerator, hostTscKhz } from './accelerator.ts';
import { qemuArguments, type VsockDevice } from './command-line.ts';
import { QmpClient } from './qmp.ts';
import { QemuVm } from './vm.ts';
import { startVsockBackend } from './vsock-backend.ts';

export interface QemuOptions {
  /** Program name (found on PATH) or path. */
  readonly qemu: string;
  /** The vhost-device-vsock program; used by hybrid vsock only. */
  readonly vsockBackend: string;
  readonly accelerator: 'auto' | Accelerator;
  readonly channel: 'auto' | Channel;
}

/** How long QEMU may take until it answers: some 50 ms in fact, so this only bounds a wrong program. */
const startLimitMs = 30_000;

/** What QEMU says when a CID is another VM's (hw/virtio/vhost-vsock.c), and how many are tried. */
const cidInUse = /unable to set guest cid: Address already in use/;
const maxCidAttempts = 5;

/** @param devices of another host than this one, for tests */
export function createQemu(options: QemuOptions, devices: HostDevices = hostDevices): Vmm {
  return {
    name: 'qemu',
    boot: (config, signal) => bootQemu(options, devices, config, signal),
  };
}

async function bootQemu(
  options: QemuOptions,
  devices: HostDevices,
  config: VmConfig,
  signal: AbortSignal,
): Promise<Vm> {
  requireReadable('the guest kernel', config.kernel);
  if (config.initrd !== undefined) requireReadable('the guest initrd', config.initrd);
  requireReadable('the guest image', config.guestImage);
  const { accelerator } = chooseAccelerator(options.accelerator, devices);
  const channel = chooseChannel(options.channel, devices);
  for (let attempt = 1; ; attempt++) {
    signal.throwIfAborted();
    try {
      return await launch({ options, config, accelerator, channel, tscKhz: hostTscKhz(devices) }, signal);
    } catch (error) {
      if (!(error instanceof KilnError && cidInUse.test(error.message)) || attempt === maxCidAttempts) throw error;
    }
  }
}

function requireReadable(what: string, file: string): void {
  try {
    accessSync(file, constants.R_OK);
  } catch (error) {
    const reason = (error as NodeJS.ErrnoException).code ?? String(error);
    throw new KilnError('failed-precondition', `${what} ${file} cannot be read: ${reason}`, {
      hint: 'run `npm run setup` to build the guest, or correct the path in the [vm] section of the config file',
      cause: error,
    });
  }
}

interface Launch {
  readonly options: QemuOptions;
  readonly config: VmConfig;
  readonly accelerator: Accelerator;
  readonly channel: Channel;
  readonly tscKhz: number | undefined;
}

async function launch(request: Launch, signal: AbortSignal): Promise<Vm> {
  const { options, config, accelerator, tscKhz } = request;
  await using stack = new AsyncDisposableStack();
  const qmpSocket = path.join(config.directory, 'qmp.sock');
  const control = stack.use(firstConnection(await listenUnix(qmpSocket), 'QEMU'));
  const { agent, device, backend } = await openChannel(request, stack, signal);
  const args = { config, accelerator, tscKhz, qmpSocket, vsock: device, agentPort: agent.port };
  const qemu = stack.use(
    await startHelper({
      program: options.qemu,
      args: qemuArguments(args),
      directory: config.directory,
      logName: 'vmm.log',
      title: 'QEMU (vm.qemu in the config file)',
      hint: 'install the package qemu-system-x86, or run `npm run setup`',
    }),
  );
  const qmp = await connectQmp(control, qemu, signal);
  return new QemuVm({ qemu, qmp, agent, backend, resources: stack.move() });
}

interface OpenChannel {
  readonly agent: AgentListener;
  readonly device: VsockDevice;
  readonly backend: HelperProcess | undefined;
}

/** The host's end of the channel, owned by the stack, and the device that gives the guest its end. */
async function openChannel(
  { channel, config, options }: Launch,
  stack: AsyncDisposableStack,
  signal: AbortSignal,
): Promise<OpenChannel> {
  if (channel === 'kernel-vsock') {
    const cid = randomCid();
    return { agent: stack.use(listenKernel(cid)), device: { kind: 'vhost-kernel', cid }, backend: undefined };
  }
  const udsPath = path.join(config.directory, 'vsock');
  const agent = stack.use(await listenHybrid(udsPath, agentPort));
  const backend = stack.use(
    await startVsockBackend({ program: options.vsockBackend, directory: config.directory, udsPath }, signal),
  );
  return { agent, device: { kind: 'vhost-user', socket: backend.socket }, backend: backend.process };
}

/** QEMU's control connection, ready for commands. A failure carries QEMU's own last words. */
async function connectQmp(control: FirstConnection, qemu: HelperProcess, signal: AbortSignal): Promise<QmpClient> {
  const limit = AbortSignal.timeout(startLimitMs);
  const either = AbortSignal.any([signal, limit]);
  const ended = qemu.exited.then((exit) => {
    throw new KilnError('internal', `QEMU ended at start ${describeExit(exit)}: ${qemu.lastWords()}`);
  });
  ended.catch(() => {});
  try {
    const qmp = new QmpClient(await Promise.race([control.accept(either), ended]));
    await abortable(Promise.race([qmp.negotiate(), ended]), either).catch((error: unknown) => {
      // QEMU closes its connection a moment before it has exited, and its exit says more.
      if (qmp.closedByPeer) return abortable(ended, either);
      throw error;
    });
    return qmp;
  } catch (error) {
    if (signal.aborted || !limit.aborted) throw error;
    throw new KilnError(
      'deadline-exceeded',
      `QEMU took no commands within ${startLimitMs / 1000} s: ${qemu.lastWords()}`,
    );
  }
}
