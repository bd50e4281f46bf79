import { rm } from 'node:fs/promises';
import path from 'node:path';
import { KilnError } from '../../errors.ts';
import { adoptHelper, type HelperProcess, startHelper } from '../../host/helper-process.ts';
import { requireSocketPath } from '../../host/unix-socket.ts';
import { requireGuestFiles } from '../guest-files.ts';
import { type HostDevices, hostDevices } from '../host-devices.ts';
import { listenHybrid, listenHybridAgain, udsPathIn } from '../hybrid-vsock.ts';
import { commonKernelWords } from '../kernel-words.ts';
import { kvmProblem } from '../kvm.ts';
import { AwaitedSocket } from '../socket-file.ts';
import { agentPort, type Vm, type VmConfig, type Vmm, type VmRecord } from '../vmm.ts';
import { FirecrackerApi } from './api.ts';
import { makeDrives, serialOf } from './drives.ts';
import { parseFirecrackerRecord } from './record.ts';
import { requireSupportedVersion } from './version.ts';
import { describeFirecrackerExit, FirecrackerVm } from './vm.ts';

export interface FirecrackerOptions {
  /** Program name (found on PATH) or path. */
  readonly firecracker: string;
}

/** How long Firecracker may take until the guest boots: tens of milliseconds in fact, so this only bounds a wrong program. */
const startLimitMs = 30_000;

/** firecracker.yaml, MachineConfiguration. */
const maxVcpus = 32;

/** The guest's own CID. Each VM has a vsock of its own, so the number need not differ between VMs. */
const guestCid = 3;

const logName = 'vmm.log';

/** @param devices of another host than this one, for tests */
export function createFirecracker(options: FirecrackerOptions, devices: HostDevices = hostDevices): Vmm {
  return {
    name: 'firecracker',
    boot: (config, signal) => bootFirecracker(options, devices, config, signal),
    adopt: adoptFirecracker,
  };
}

async function bootFirecracker(
  { firecracker: program }: FirecrackerOptions,
  devices: HostDevices,
  config: VmConfig,
  signal: AbortSignal,
): Promise<Vm> {
  requireGuestFiles(config);
  requireHost(config, devices);
  signal.throwIfAborted();
  const { directory } = config;
  const udsPath = udsPathIn(directory);
  const apiSocket = apiSocketIn(directory);
  for (const socket of [udsPath, apiSocket]) requireSocketPath(socket);
  await using stack = new AsyncDisposableStack();
  for (const left of [udsPath, apiSocket]) stack.defer(() => rm(left, { force: true }));
  stack.defer(() => rm(slotsIn(directory), { recursive: true, force: true }));
  const agent = stack.use(await listenHybrid(udsPath, agentPort));
  using awaited = new AwaitedSocket(apiSocket);
  const firecracker = stack.use(
    await startHelper({
      program,
      args: ['--id', vmId(config.id), '--api-sock', apiSocket, '--level', 'Warning'],
      directory,
      logName,
      title: 'Firecracker (vm.firecracker in the config file)',
      hint: 'install Firecracker, or set vm.vmm = "qemu"',
    }),
  );
  const api = stack.use(new FirecrackerApi(apiSocket));
  await whileItStarts(firecracker, signal, async (either, ended) => {
    await awaited.listening(either, ended);
    requireSupportedVersion(await api.version(either));
    await configure(api, config, either);
    await api.call('PUT /actions', { action_type: 'InstanceStart' }, either);
  });
  return new FirecrackerVm({ firecracker, api, agent, resources: stack.move() });
}

function requireHost({ vcpus }: VmConfig, devices: HostDevices): void {
  const problem = kvmProblem(devices);
  if (problem !== undefined) {
    throw new KilnError('failed-precondition', `Firecracker needs hardware KVM, but ${problem}`, {
      hint: 'load the KVM module, or set vm.vmm = "qemu" in the config file',
    });
  }
  if (vcpus > maxVcpus) {
    throw new KilnError('failed-precondition', `${vcpus} vCPUs are more than Firecracker's ${maxVcpus}`);
  }
}

/** Everything before the start, each with an answer of its own, so that an error names what was refused. */
async function configure(api: FirecrackerApi, config: VmConfig, signal: AbortSignal): Promise<void> {
  const { kernel, initrd, guestImage, directory, vcpus, memoryMib } = config;
  await api.call('PUT /machine-config', { vcpu_count: vcpus, mem_size_mib: memoryMib }, signal);
  const boot = {
    kernel_image_path: kernel,
    ...(initrd === undefined ? {} : { initrd_path: initrd }),
    boot_args: await kernelCommandLine(config),
  };
  await api.call('PUT /boot-source', boot, signal);
  for (const drive of makeDrives(guestImage, slotsIn(directory))) await api.call('PUT /drives', drive, signal);
  await api.call('PUT /vsock', { guest_cid: guestCid, uds_path: udsPathIn(directory) }, signal);
  await api.call('PUT /entropy', {}, signal);
}

/**
 * i8042: the kernel reboots by it, which ends Firecracker (FAQ.md), and looks for no keyboard and mouse there. Firecracker
 * itself adds `pci=off` and what describes its devices.
 */
async function kernelCommandLine(config: VmConfig): Promise<string> {
  const words = [...commonKernelWords(config, 'k'), 'i8042.noaux', 'i8042.nomux', 'i8042.dumbkbd', 'swiotlb=noforce'];
  return [...words, `kiln.image_serial=${await serialOf(config.guestImage)}`].join(' ');
}

/** Runs the steps of a start. A failure that is Firecracker's end carries its exit and its own last words. */
async function whileItStarts(
  firecracker: HelperProcess,
  signal: AbortSignal,
  steps: (either: AbortSignal, ended: Promise<never>) => Promise<void>,
): Promise<void> {
  const limit = AbortSignal.timeout(startLimitMs);
  const ended = firecracker.exited.then((exit) => {
    const how = `Firecracker ended at start ${describeFirecrackerExit(exit)}`;
    throw new KilnError('internal', `${how}: ${firecracker.lastWords()}`);
  });
  ended.catch(() => {});
  try {
    await steps(AbortSignal.any([signal, limit]), ended);
  } catch (error) {
    if (signal.aborted) throw error;
    if (limit.aborted) {
      const words = firecracker.lastWords();
      throw new KilnError('deadline-exceeded', `Firecracker did not start a VM in ${startLimitMs / 1000} s: ${words}`);
    }
    // Its connection breaks a moment before it has exited, and its exit says more.
    if (error instanceof KilnError && error.code === 'unavailable') await Promise.race([ended, limitEnd(limit)]);
    throw error;
  }
}

function limitEnd(limit: AbortSignal): Promise<void> {
  return new Promise((resolve) => limit.addEventListener('abort', () => resolve(), { once: true }));
}

/** Takes over a VM whose kilnd is gone: its API is there, and the agent dials again. */
async function adoptFirecracker(given: VmRecord, directory: string, signal: AbortSignal): Promise<Vm> {
  const record = parseFirecrackerRecord(given);
  const udsPath = udsPathIn(directory);
  await using stack = new AsyncDisposableStack();
  for (const left of [udsPath, apiSocketIn(directory)]) stack.defer(() => rm(left, { force: true }));
  stack.defer(() => rm(slotsIn(directory), { recursive: true, force: true }));
  const firecracker = adoptHelper(record.firecracker, { directory, logName });
  if (firecracker === undefined) {
    throw new KilnError('not-found', `Firecracker (pid ${record.firecracker.pid}) has ended`);
  }
  stack.use(firecracker);
  const api = stack.use(new FirecrackerApi(apiSocketIn(directory)));
  const { state } = await api.describe(signal);
  if (state !== 'Running') throw new KilnError('internal', `the VM does not run; Firecracker says "${state}"`);
  const resources = stack.move();
  const accept = async (accepting: AbortSignal) => {
    return resources.use(await listenHybridAgain(udsPath, agentPort)).accept(accepting);
  };
  return new FirecrackerVm({ firecracker, api, agent: { accept }, usedSlots: record.usedSlots, resources });
}

/** Firecracker's --id: 1 to 64 letters, digits and `-` (src/utils/src/validators.rs). It is only shown. */
function vmId(id: string): string {
  return id.replace(/[^A-Za-z0-9-]/g, '-').slice(0, 64);
}

function apiSocketIn(directory: string): string {
  return path.join(directory, 'fc.sock');
}

function slotsIn(directory: string): string {
  return path.join(directory, 'slots');
}
