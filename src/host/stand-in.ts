import { setTimeout as delay } from 'node:timers/promises';
import { KilnError } from '../errors.ts';
import type { ControlGroup } from './control-group.ts';
import { adoptHelper, type HelperProcess, startHelper } from './helper-process.ts';
import type { ProcessIdentity } from './process-identity.ts';

/** What the stand-in says, in the sandbox's directory: at most why it could not start. */
export const standInLog = { logName: 'standin.log', quiet: true } as const;

/** How long a stand-in of the caller's may take to end once its container's end is known, in ms; it writes output until then. */
const callersEndLimitMs = 15_000;

/** The process that stands for a container on the host. */
export interface StandIn extends HelperProcess {
  /** It is a process of who called Kiln, and ends by itself when it is told of the container's end: native/process.c. */
  readonly callers?: boolean;
}

export interface StandInOptions {
  /** The kiln-standin program. */
  readonly program: string;
  /** The container's id, shown in the process list. */
  readonly id: string;
  /** The sandbox's private directory. */
  readonly directory: string;
  /** An existing network namespace to join, by its path; without it, a new one is made. */
  readonly networkNamespace?: string | undefined;
  /** The control group that it is in. */
  readonly controlGroup?: ControlGroup | undefined;
}

/**
 * Starts the process whose pid containerd gets for a container. It sits in a network namespace with an
 * empty read-only root, so that whatever a client does with the pid (`/proc/<pid>/root`, `/proc/<pid>/ns/net`,
 * `kill -0`) meets the right and harmless thing. It lives until it is killed.
 */
export async function startStandIn(options: StandInOptions): Promise<HelperProcess> {
  const standIn = await startHelper({
    program: options.program,
    // "-": a new one. The directory is where the root is mounted, for the stand-in alone to see.
    args: [options.networkNamespace ?? '-', options.directory, options.id],
    directory: options.directory,
    ...standInLog,
    title: 'the stand-in',
    hint: 'run `npm run build`',
    statusPipe: true,
    controlGroup: options.controlGroup,
  });
  const status = (await standIn.status).trim();
  if (status === 'ready') return standIn;
  await standIn.kill();
  const reason = status.replace(/^error: /, '') || standIn.lastWords() || 'it ended at once';
  throw new KilnError('internal', `cannot start the container's stand-in process: ${reason}`);
}

/**
 * A process of the caller's as the stand-in, which ends the container by its own end; undefined when it has ended. When it is
 * to be killed because the container has ended, it is left to end by itself: it may have output to write. One whose container
 * never came is killed.
 */
export function adoptCallersStandIn(identity: ProcessIdentity, directory: string): StandIn | undefined {
  const adopted = adoptHelper(identity, { directory, ...standInLog });
  if (adopted === undefined) return undefined;
  let knowsOfEnd = false;
  const kill = async () => {
    knowsOfEnd = true;
  };
  const endInTime = async () => {
    if (knowsOfEnd) await Promise.race([adopted.exited, delay(callersEndLimitMs, undefined, { ref: false })]);
    await adopted.kill();
  };
  return { ...adopted, callers: true, kill, [Symbol.asyncDispose]: endInTime };
}
