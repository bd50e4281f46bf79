import { randomBytes } from 'node:crypto';
import {
  type AgentClient,
  AgentService,
  type HelloResponse,
  type Identity,
  Protocol,
} from '../../gen/kiln/agent/v1/agent.ts';
import { KilnError } from '../errors.ts';
import { printable } from '../host/printable.ts';
import { kilnVersion } from '../version.ts';
import { unary } from './call.ts';
import { type ClockReading, toMs, toNs } from './clock.ts';

/** What the guest says of itself when it connects. */
export interface GuestFacts {
  readonly kernelRelease: string;
  readonly bootId: string;
  readonly memoryBytes: number;
  readonly vcpus: number;
  /** When the agent's process started, on the host's clock (epoch ms): kernel and init were done then. */
  readonly agentStartedAtMs: number;
  /** Whether it gives both outputs of a process in one call (feature "outputs"). */
  readonly joinsOutputs: boolean;
  /** Whether a process's start can say that nothing will come for its stdin (feature "ended-stdin"). */
  readonly takesEndedStdin: boolean;
}

export interface HelloOptions {
  /** The guest's hostname until a container sets its own. */
  readonly hostname: string;
  /** Milliseconds for the agent's answer to one call, before the call fails with `deadline-exceeded`. */
  readonly answerLimitMs: number;
  /** The sandbox's secret, by which a later connection knows the agent again. */
  readonly session: string;
  /** True when the agent was told the session on an earlier connection. */
  readonly returning?: boolean;
  /** The guest is about to be saved as a template: it gets no session (which is empty), and its clones get other identities. */
  readonly becomesTemplate?: boolean;
}

/** The longest text of a guest that is kept, in characters: what uname(2) has room for, and more. */
const maxTextChars = 128;

/** Bytes of entropy that a guest gets: twice what its generator is seeded with. */
const entropyBytes = 64;

const rebuildHint = 'build the guest image again with `npm run setup`';

/**
 * The first call on a connection that the agent dialled. It gives the guest an identity of its own, and the time.
 *
 * @param connectedAtMs when the agent's connection came, since the epoch
 * @returns what the guest says of itself, and its clock at its answer where it tells that
 * @throws KilnError `failed-precondition` when host and guest speak different protocols, `permission-denied` when the caller is
 *   not the agent that was told the session
 */
export async function sayHello(
  client: AgentClient,
  { hostname, answerLimitMs, session, returning = false, becomesTemplate = false }: HelloOptions,
  connectedAtMs: number,
): Promise<{ readonly facts: GuestFacts; readonly reading: ClockReading | undefined }> {
  const hello = {
    protocol: Protocol.PROTOCOL_CURRENT,
    kilnVersion,
    features: [],
    connectedRealtimeNs: toNs(connectedAtMs),
    hostname,
    session,
    identity: returning ? undefined : newIdentity(),
    becomesTemplate,
  };
  const askedAt = Date.now();
  const answer = await unary(client, AgentService.hello, hello, { limitMs: answerLimitMs }).catch(withHint);
  const answeredAt = Date.now();
  if (answer.protocol !== Protocol.PROTOCOL_CURRENT) {
    throw new KilnError(
      'failed-precondition',
      `the guest image speaks agent protocol ${answer.protocol} (Kiln ${shortText(answer.kilnVersion)}), ` +
        `this kilnd speaks ${Protocol.PROTOCOL_CURRENT} (Kiln ${kilnVersion})`,
      { hint: rebuildHint },
    );
  }
  if (returning && answer.session !== session) {
    throw new KilnError('permission-denied', 'the caller is not the agent of this VM');
  }
  const reading = answer.realtimeNs === 0n ? undefined : { askedAt, answeredAt, guestMs: toMs(answer.realtimeNs) };
  return { facts: factsOf(answer, answeredAt), reading };
}

function factsOf(answer: HelloResponse, answeredAt: number): GuestFacts {
  const ageMs = Number(answer.answeredNs - answer.agentStartedNs) / 1e6;
  return {
    kernelRelease: shortText(answer.kernelRelease),
    bootId: shortText(answer.bootId),
    memoryBytes: Number(answer.memoryBytes),
    vcpus: answer.vcpus,
    // No time in the future, nor before there were clocks.
    agentStartedAtMs: answeredAt - Math.min(Math.max(ageMs, 0), answeredAt),
    joinsOutputs: answer.features.includes('outputs'),
    takesEndedStdin: answer.features.includes('ended-stdin'),
  };
}

/** The agent found the mismatch: its message names both versions, and the remedy is the same. */
function withHint(error: unknown): never {
  if (!(error instanceof KilnError) || error.code !== 'failed-precondition' || error.hint !== undefined) throw error;
  throw new KilnError(error.code, error.message, { hint: rebuildHint, cause: error });
}

function newIdentity(): Identity {
  return { entropy: randomBytes(entropyBytes), machineId: randomBytes(16).toString('hex') };
}

function shortText(text: string): string {
  return printable(text.slice(0, maxTextChars)).replaceAll('\n', ' ');
}
