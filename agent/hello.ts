/**
 * The first call on every connection: both ends learn whether they can talk, the guest gets the time, and the host gets
 * the facts of the guest.
 */
import { readFileSync } from 'node:fs';
import { availableParallelism, release, totalmem } from 'node:os';
import {
  type AdjustClockRequest,
  type AdjustClockResponse,
  type HelloRequest,
  type HelloResponse,
  Protocol,
} from '../gen/kiln/agent/v1/agent.ts';
import { adjtime, CLOCK_BOOTTIME, CLOCK_REALTIME, clockGettime, clockSettime } from '../src/sys/clock.ts';
import { sethostname } from '../src/sys/process.ts';
import { kilnVersion } from '../src/version.ts';
import { AgentError } from './errors.ts';
import { takeIdentity } from './identity.ts';
import { prepareVolumes } from './volumes.ts';

/** proc_pid_stat(5): `starttime` counts in these, whatever the kernel's own tick is (USER_HZ is 100 everywhere). */
const NANOSECONDS_PER_TICK = 10_000_000n;

/** What this agent can do beyond the protocol number. */
const features: string[] = [
  'resources',
  'identity',
  'volumes',
  'network',
  'slew',
  'devices',
  'localhost',
  'files',
  'ps',
  'outputs',
  'ended-stdin',
];

/** What the first Hello called the sandbox's session. */
let session = '';

/**
 * @param owner true in a guest, where clock and hostname are ours to set; false on a host (tests)
 * @param connectedAt when the connection was made: `performance.now()`
 * @throws AgentError failed-precondition when the protocols differ
 */
export function hello(request: HelloRequest, owner: boolean, connectedAt: number): HelloResponse {
  if (request.protocol !== Protocol.PROTOCOL_CURRENT) {
    throw new AgentError(
      'failed-precondition',
      `Kiln ${request.kilnVersion} on the host speaks protocol ${request.protocol}, the guest image (Kiln ${kilnVersion}) ` +
        `speaks protocol ${Protocol.PROTOCOL_CURRENT}: host and guest image must be of the same version`,
    );
  }
  if (owner) {
    if (request.connectedRealtimeNs > 0n) {
      const sinceNs = BigInt(Math.round((performance.now() - connectedAt) * 1e6));
      clockSettime(CLOCK_REALTIME, request.connectedRealtimeNs + sinceNs);
    }
    if (request.hostname !== '') sethostname(request.hostname);
    if (request.identity !== undefined) takeIdentity(request.identity);
    if (request.becomesTemplate) prepareVolumes();
  }
  const told = session;
  if (session === '') session = request.session;
  return {
    protocol: Protocol.PROTOCOL_CURRENT,
    kilnVersion,
    features,
    kernelRelease: release(),
    bootId: request.becomesTemplate ? '' : readFileSync('/proc/sys/kernel/random/boot_id', 'utf8').trim(),
    agentStartedNs: startedNs(),
    answeredNs: clockGettime(CLOCK_BOOTTIME),
    memoryBytes: BigInt(totalmem()),
    vcpus: availableParallelism(),
    session: told,
    realtimeNs: clockGettime(CLOCK_REALTIME),
  };
}

/** Moves the wall clock, and tells what it says then. */
export function adjustClock({ deltaNs, slew }: AdjustClockRequest, owner: boolean): AdjustClockResponse {
  if (owner && deltaNs !== 0n) {
    if (slew) adjtime(deltaNs);
    // What is left of a gradual change goes with it (kernel/time/timekeeping.c, TK_CLEAR_NTP).
    else clockSettime(CLOCK_REALTIME, clockGettime(CLOCK_REALTIME) + deltaNs);
  }
  return { realtimeNs: clockGettime(CLOCK_REALTIME) };
}

/** When the kernel has started this process, CLOCK_BOOTTIME in nanoseconds, to a hundredth of a second. */
function startedNs(): bigint {
  const stat = readFileSync('/proc/self/stat', 'utf8');
  // The second field is the program's name in brackets, which may hold anything; starttime is the 22nd.
  const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ');
  return BigInt(fields[22 - 3] ?? 0) * NANOSECONDS_PER_TICK;
}
