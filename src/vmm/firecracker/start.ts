import { KilnError } from '../../errors.ts';
import type { GroupLimits } from '../../host/cgroups.ts';
import type { HelperProcess } from '../../host/helper-process.ts';
import { findProgram } from '../../host/program.ts';
import { TimeLimit } from '../../host/time-limit.ts';
import { requireSocketPath } from '../../host/unix-socket.ts';
import { requireGuestFiles } from '../guest-files.ts';
import type { HostDevices } from '../host-devices.ts';
import { hostSocketFor } from '../hybrid-vsock.ts';
import { kvmProblem } from '../kvm.ts';
import { AwaitedSocket } from '../socket-file.ts';
import { agentPort, filesPort, type NetworkCard, type VmConfig } from '../vmm.ts';
import { filesOf, listenForAgent } from './agent-call.ts';
import { FirecrackerApi } from './api.ts';
import { requireHugePages, roomFor } from './huge-pages.ts';
import { makeJail } from './jail.ts';
import { guestMemory, memoryGrowth } from './memory.ts';
import type { FirecrackerHost, FirecrackerOptions } from './options.ts';
import { firecrackerTitle, openPlace, type Place } from './place.ts';
import { holdSocket } from './socket-path.ts';
import { Telemetry } from './telemetry.ts';
import { isAtLeast, requireSameVersion, requireSupportedVersion } from './version.ts';
import { describeFirecrackerExit, enterGroup, type FirecrackerParts, withExitCode } from './vm.ts';

/** How long Firecracker may take until the guest runs: tens of milliseconds in fact, so this only bounds a wrong program. */
const startLimitMs = 30_000;

/** The minor version of Firecracker 1 that limits the console: CHANGELOG.md, 1.16.0. It is not in snapshots. */
const consoleLimitSince = 16;

/**
 * All that a start says, and a panic, at once; then some KiB in a second. The guest's root writes there as it likes, also while no
 * kilnd runs that would cut the file.
 */
const consoleLimit = { size: 64 * 1024, refill_time: 10_000 };

/** firecracker.yaml, MachineConfiguration. */
const maxVcpus = 32;

export interface Start {
  readonly options: FirecrackerOptions;
  readonly host: FirecrackerHost;
  readonly config: VmConfig;
  /** Whether what Firecracker is told holds in the place of another VM, too: paths in its snapshots are those that it was told. */
  readonly portable?: boolean;
  /** What is being done, for errors: "at start". */
  readonly when: string;
}

/** A Firecracker that takes requests, and has got none yet. */
export interface Started {
  readonly api: FirecrackerApi;
  readonly place: Place;
  /** The VM's network cards, whose taps wait where Firecracker is. */
  readonly nics: readonly NetworkCard[];
  /** Firecracker's. */
  readonly version: string;
  /** Aborts what takes too long, and what nobody wants any more. */
  readonly signal: AbortSignal;
}

/**
 * Starts Firecracker in a place of its own, where the agent's call is awaited already, and takes the steps that make its
 * VM run. On failure nothing is left, and an error that is Firecracker's end carries its exit and its own last words.
 *
 * @throws KilnError failed-precondition where the host, the guest's files, the programs or the paths do not allow it;
 *   resource-exhausted without enough huge pages or user ids; internal when Firecracker refuses, or ends; deadline-exceeded
 */
export async function startFirecracker(
  { options, host, config, portable = false, when }: Start,
  steps: (started: Started) => Promise<void>,
  signal: AbortSignal,
): Promise<FirecrackerParts> {
  requireGuestFiles(config);
  requireHost(config, host.devices);
  if (options.hugePages) requireHugePages(config.memoryMib, host.devices);
  signal.throwIfAborted();
  await using stack = new AsyncDisposableStack();
  const place = stack.use(await placeFor(options, host, config, portable));
  const { vsock } = place;
  const guestSockets = [agentPort, filesPort].map((port) => hostSocketFor(vsock.host, port));
  for (const socket of [place.apiSocket.host, vsock.host, ...guestSockets]) requireSocketPath(socket);
  // Disposed of when Firecracker has ended: those that were moved are whose they are now.
  const { nics } = stack.use(host.makeTaps(options.parking, config.networkCards, place.uid));
  const { telemetry, args } = Telemetry.begin(place, options);
  stack.use(telemetry);
  const agent = stack.use(await listenForAgent(place));
  using awaited = new AwaitedSocket(place.apiSocket.host);
  using limit = new TimeLimit(startLimitMs, signal);
  const either = limit.signal;
  const firecracker = stack.use(await place.start([...args, ...(options.bootTimer ? ['--boot-timer'] : [])], either));
  const limits = place.uid === undefined ? undefined : limitsOf(config, options.memoryMaxMib);
  if (config.controlGroup !== undefined) await enterGroup(config.controlGroup, { firecracker, limits });
  const { api, memory } = await whileItStarts({ firecracker, telemetry, when }, limit, async (ended) => {
    await awaited.answering(either, ended);
    const api = stack.use(new FirecrackerApi(holdSocket(place.apiSocket.host)));
    const version = await api.version(either);
    requireSupportedVersion(version);
    if (isAtLeast(version, consoleLimitSince)) await api.call('PUT /serial', { rate_limiter: consoleLimit }, either);
    await steps({ api, place, nics, version, signal: either });
    return { api, memory: guestMemory(config, options, version) };
  });
  const growth = memoryGrowth(api, memory, roomFor(options, host.devices));
  const files = stack.use(filesOf(place));
  return { firecracker, api, place, telemetry, agent, files, nics, memory, growth, limits, resources: stack.move() };
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

async function placeFor(
  { firecracker, jail: jailFor, memoryMaxMib, parking }: FirecrackerOptions,
  { jails }: FirecrackerHost,
  config: VmConfig,
  portable: boolean,
): Promise<Place> {
  const id = vmId(config.id);
  const { directory } = config;
  const jail = jailFor();
  // A jail is portable anyway.
  if (jail === undefined) return openPlace(directory, { program: firecracker, id, portable, network: parking });
  const program = findProgram(firecracker);
  if (program === undefined) {
    throw new KilnError('failed-precondition', `cannot run ${firecrackerTitle} "${firecracker}": no such program`, {
      hint: 'install Firecracker, or set vm.vmm = "qemu"',
    });
  }
  await requireSameVersion(program, jail.jailer);
  return makeJail({ ...jail, program, id, directory, network: parking, limits: limitsOf(config, memoryMaxMib) }, jails);
}

/**
 * What a VM may take of the host at the most, so that one that was taken over takes no more. Beside the guest's memory, with
 * what it may grow by, that
 * is the page cache of its disks and KVM's page tables; beside its CPUs' threads a few of Firecracker's and the kernel's.
 */
function limitsOf({ memoryMib, vcpus }: VmConfig, memoryMaxMib: number): GroupLimits {
  const mostMib = Math.max(memoryMib, memoryMaxMib);
  return { memoryBytes: (mostMib + Math.ceil(mostMib / 16) + 512) * 2 ** 20, pids: vcpus + 16 };
}

/** Runs the steps of a start. A failure that is Firecracker's end carries its exit and its own last words. */
async function whileItStarts<T>(
  {
    firecracker,
    telemetry,
    when,
  }: { readonly firecracker: HelperProcess; readonly telemetry: Telemetry; readonly when: string },
  limit: TimeLimit,
  steps: (ended: Promise<never>) => Promise<T>,
): Promise<T> {
  const words = () => [firecracker.lastWords(), telemetry.log.lastWords()].filter((each) => each !== '').join('; ');
  const ended = firecracker.exited.then((exit) => {
    telemetry.end();
    const how = `Firecracker ended ${when} ${describeFirecrackerExit(withExitCode(exit, telemetry))}`;
    throw new KilnError('internal', `${how}: ${words()}`);
  });
  ended.catch(() => {});
  try {
    return await steps(ended);
  } catch (error) {
    if (limit.expired) {
      const message = `Firecracker did not start a VM in ${startLimitMs / 1000} s: ${words()}`;
      throw new KilnError('deadline-exceeded', message);
    }
    // Its connection breaks a moment before it has exited, and its exit says more.
    const broke = !limit.signal.aborted && error instanceof KilnError && error.code === 'unavailable';
    if (broke) await Promise.race([ended, limitEnd(limit.signal)]);
    throw error;
  }
}

function limitEnd(limit: AbortSignal): Promise<void> {
  return new Promise((resolve) => limit.addEventListener('abort', () => resolve(), { once: true }));
}

/** Firecracker's --id: 1 to 64 letters, digits and `-` (src/utils/src/validators.rs). It is only shown. */
function vmId(id: string): string {
  return id.replace(/[^A-Za-z0-9-]/g, '-').slice(0, 64);
}
