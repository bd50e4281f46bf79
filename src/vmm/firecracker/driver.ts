import { readFileSync } from 'node:fs';
import { rm } from 'node:fs/promises';
import { KilnError } from '../../errors.ts';
import { adoptHelper, type HelperProcess } from '../../host/helper-process.ts';
import { findProgram } from '../../host/program.ts';
import { requireSocketPath } from '../../host/unix-socket.ts';
import type { Logger } from '../../observe/logger.ts';
import type { AgentListener } from '../channel.ts';
import { requireGuestFiles } from '../guest-files.ts';
import { type HostDevices, hostDevices } from '../host-devices.ts';
import { hostSocketFor, knock, listenHybrid } from '../hybrid-vsock.ts';
import { commonKernelWords } from '../kernel-words.ts';
import { kvmProblem } from '../kvm.ts';
import { AwaitedSocket } from '../socket-file.ts';
import { agentPort, type Vm, type VmConfig, type Vmm, type VmRecord } from '../vmm.ts';
import { FirecrackerApi } from './api.ts';
import { type DiskLimits, makeDrives, serialOf } from './drives.ts';
import { withExitStatus } from './exit-status.ts';
import { findJail, type JailHost, jailHost, makeJail } from './jail.ts';
import type { CgroupLimits } from './jail-cgroup.ts';
import type { UidRange } from './jail-uids.ts';
import { firecrackerTitle, logName, openPlace, type Place } from './place.ts';
import { parseFirecrackerRecord } from './record.ts';
import { holdSocket } from './socket-path.ts';
import { Telemetry } from './telemetry.ts';
import { isAtLeast, requireSupportedVersion } from './version.ts';
import { describeFirecrackerExit, FirecrackerVm, withExitCode } from './vm.ts';

export interface FirecrackerOptions {
  /** Program name or path. */
  readonly firecracker: string;
  /**
   * Asked at each start. Undefined starts it on the host as it is: as this user, confined by its own seccomp filter alone.
   */
  readonly jail: () => JailSettings | undefined;
  readonly diskLimits: DiskLimits;
  /** Guest memory in pages of 2 MiB from the host's pool. */
  readonly hugePages: boolean;
  /** Gets Firecracker's own log, and its failures. */
  readonly logger: Logger;
}

export interface JailSettings {
  /** Absolute path of the jailer. */
  readonly jailer: string;
  /** What user ids its VMs may have. */
  readonly uids: UidRange;
}

/** The host that VMs run on. Another one is for tests. */
export interface FirecrackerHost {
  readonly devices: HostDevices;
  readonly jails: JailHost;
}

const thisHost: FirecrackerHost = { devices: hostDevices, jails: jailHost };

/** How long Firecracker may take until the guest boots: tens of milliseconds in fact, so this only bounds a wrong program. */
const startLimitMs = 30_000;

/** firecracker.yaml, MachineConfiguration. */
const maxVcpus = 32;

/** The minor version of Firecracker 1 that has free page reporting: CHANGELOG.md, 1.14.0. */
const reportingSince = 14;

const hugePageMib = 2;

/** The guest's own CID. Each VM has a vsock of its own, so the number need not differ between VMs. */
const guestCid = 3;

/** @param host another one than this, for tests */
export function createFirecracker(options: FirecrackerOptions, host: FirecrackerHost = thisHost): Vmm {
  return {
    name: 'firecracker',
    boot: (config, signal) => bootFirecracker(options, host, config, signal),
    adopt: (record, directory, signal) => adoptFirecracker({ ...host, ...options }, record, directory, signal),
  };
}

async function bootFirecracker(
  options: FirecrackerOptions,
  host: FirecrackerHost,
  config: VmConfig,
  signal: AbortSignal,
): Promise<Vm> {
  requireGuestFiles(config);
  requireHost(config, host.devices);
  if (options.hugePages) requireHugePages(config, host.devices);
  signal.throwIfAborted();
  await using stack = new AsyncDisposableStack();
  const place = stack.use(await placeFor(options, host, config));
  const agentSocket = hostSocketFor(place.vsock.host, agentPort);
  for (const socket of [place.apiSocket.host, place.vsock.host, agentSocket]) requireSocketPath(socket);
  const { telemetry, args } = Telemetry.begin(place, options.logger);
  stack.use(telemetry);
  const agent = stack.use(await listenHybrid(place.vsock.host, agentPort));
  place.admit(agentSocket);
  using awaited = new AwaitedSocket(place.apiSocket.host);
  const limit = AbortSignal.timeout(startLimitMs);
  const either = AbortSignal.any([signal, limit]);
  const firecracker = stack.use(await place.start(args, either));
  const api = await whileItStarts({ firecracker, telemetry }, { signal, limit }, async (ended) => {
    await awaited.answering(either, ended);
    const api = stack.use(new FirecrackerApi(holdSocket(place.apiSocket.host)));
    const version = await api.version(either);
    requireSupportedVersion(version);
    await configure({ api, place, config, options, version }, either);
    await api.call('PUT /actions', { action_type: 'InstanceStart' }, either);
    return api;
  });
  // They are in the guest's memory now.
  for (const name of ['kernel', 'initrd'] as const) place.hide(name);
  return new FirecrackerVm({ firecracker, api, place, telemetry, agent, resources: stack.move() });
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

/** Firecracker reserves none, and gets SIGBUS when the pool is empty: docs/hugepages.md. So it is told before. */
function requireHugePages({ memoryMib }: VmConfig, { freeHugePages }: HostDevices): void {
  const needed = inHugePages(memoryMib);
  const free = Number(readOr(freeHugePages, '0'));
  if (free >= needed) return;
  const message = `vm.huge_pages is set, but the host has ${free} free pages of 2 MiB, and the VM needs ${needed}`;
  throw new KilnError('resource-exhausted', message, {
    hint: 'raise vm.nr_hugepages (sysctl), or set vm.huge_pages = false in the config file',
  });
}

function inHugePages(mib: number): number {
  return Math.ceil(mib / hugePageMib);
}

function readOr(file: string, otherwise: string): string {
  try {
    return readFileSync(file, 'utf8');
  } catch {
    return otherwise; // A kernel without huge pages.
  }
}

async function placeFor(
  { firecracker, jail: jailFor }: FirecrackerOptions,
  { jails }: FirecrackerHost,
  config: VmConfig,
): Promise<Place> {
  const id = vmId(config.id);
  const { directory } = config;
  const jail = jailFor();
  if (jail === undefined) return openPlace(directory, { program: firecracker, id });
  const program = findProgram(firecracker);
  if (program === undefined) {
    throw new KilnError('failed-precondition', `cannot run ${firecrackerTitle} "${firecracker}": no such program`, {
      hint: 'install Firecracker, or set vm.vmm = "qemu"',
    });
  }
  return makeJail({ ...jail, program, id, directory, limits: limitsOf(config) }, jails);
}

/**
 * What a VM may take of the host at the most, so that one that was taken over takes no more. Beside the guest's memory that
 * is the page cache of its disks and KVM's page tables; beside its CPUs' threads a few of Firecracker's and the kernel's.
 */
function limitsOf({ memoryMib, vcpus }: VmConfig): CgroupLimits {
  return { memoryBytes: (memoryMib + Math.ceil(memoryMib / 16) + 512) * 2 ** 20, pids: vcpus + 16 };
}

interface Configuration {
  readonly api: FirecrackerApi;
  readonly place: Place;
  readonly config: VmConfig;
  readonly options: FirecrackerOptions;
  /** Firecracker's. */
  readonly version: string;
}

/** Everything before the start, each with an answer of its own, so that an error names what was refused. */
async function configure({ api, place, config, options, version }: Configuration, signal: AbortSignal): Promise<void> {
  const { kernel, initrd, guestImage, vcpus, memoryMib } = config;
  const { hugePages, diskLimits } = options;
  const memory = hugePages
    ? ({ mem_size_mib: inHugePages(memoryMib) * hugePageMib, huge_pages: '2M' } as const)
    : { mem_size_mib: memoryMib };
  await api.call('PUT /machine-config', { vcpu_count: vcpus, ...memory }, signal);
  const boot = {
    kernel_image_path: await place.show('kernel', kernel),
    ...(initrd === undefined ? {} : { initrd_path: await place.show('initrd', initrd) }),
    boot_args: await kernelCommandLine(config),
  };
  await api.call('PUT /boot-source', boot, signal);
  for (const drive of await makeDrives(guestImage, place, diskLimits)) await api.call('PUT /drives', drive, signal);
  await api.call('PUT /vsock', { guest_cid: guestCid, uds_path: place.vsock.inside }, signal);
  await api.call('PUT /entropy', {}, signal);
  // The guest tells what memory it does not use, and the host has it back. Huge pages are nobody else's anyway.
  if (isAtLeast(version, reportingSince) && !hugePages) {
    await api.call('PUT /balloon', { amount_mib: 0, deflate_on_oom: true, free_page_reporting: true }, signal);
  }
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
async function whileItStarts<T>(
  { firecracker, telemetry }: { readonly firecracker: HelperProcess; readonly telemetry: Telemetry },
  { signal, limit }: { readonly signal: AbortSignal; readonly limit: AbortSignal },
  steps: (ended: Promise<never>) => Promise<T>,
): Promise<T> {
  const words = () => [firecracker.lastWords(), telemetry.log.lastWords()].filter((each) => each !== '').join('; ');
  const ended = firecracker.exited.then((exit) => {
    telemetry.end();
    const how = `Firecracker ended at start ${describeFirecrackerExit(withExitCode(exit, telemetry))}`;
    throw new KilnError('internal', `${how}: ${words()}`);
  });
  ended.catch(() => {});
  try {
    return await steps(ended);
  } catch (error) {
    if (signal.aborted) throw error;
    if (limit.aborted) {
      const message = `Firecracker did not start a VM in ${startLimitMs / 1000} s: ${words()}`;
      throw new KilnError('deadline-exceeded', message);
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
async function adoptFirecracker(
  { jails, logger }: Pick<FirecrackerHost, 'jails'> & Pick<FirecrackerOptions, 'logger'>,
  given: VmRecord,
  directory: string,
  signal: AbortSignal,
): Promise<Vm> {
  const record = parseFirecrackerRecord(given);
  await using stack = new AsyncDisposableStack();
  const { jail } = record;
  const place = stack.use(jail === undefined ? openPlace(directory) : findJail(directory, jail.uid, jails));
  const found = adoptHelper(record.firecracker, { directory, logName });
  if (found === undefined) {
    throw new KilnError('not-found', `Firecracker (pid ${record.firecracker.pid}) has ended`);
  }
  const firecracker = stack.use(withExitStatus(found));
  const api = stack.use(new FirecrackerApi(holdSocket(place.apiSocket.host)));
  const telemetry = stack.use(Telemetry.resume(place, logger));
  const { state } = await api.describe(signal);
  if (state !== 'Running') throw new KilnError('internal', `the VM does not run; Firecracker says "${state}"`);
  const resources = stack.move();
  const accept = async (accepting: AbortSignal) => {
    return resources.use(await listenAgain(place)).accept(accepting);
  };
  const agent = { accept };
  return new FirecrackerVm({ firecracker, api, place, telemetry, agent, usedSlots: record.usedSlots, resources });
}

/** Listens in an earlier kilnd's place for the agent, and asks it to call. */
async function listenAgain(place: Place): Promise<AgentListener> {
  const { vsock } = place;
  const socket = hostSocketFor(vsock.host, agentPort);
  await rm(socket, { force: true });
  const listener = await listenHybrid(vsock.host, agentPort);
  place.admit(socket);
  const held = holdSocket(vsock.host);
  void knock(held.path).finally(() => held[Symbol.dispose]());
  return listener;
}

/** Firecracker's --id: 1 to 64 letters, digits and `-` (src/utils/src/validators.rs). It is only shown. */
function vmId(id: string): string {
  return id.replace(/[^A-Za-z0-9-]/g, '-').slice(0, 64);
}
