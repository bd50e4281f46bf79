/** A process's end, and before it who of the container was killed for want of memory. */
import type { ClientReadableStream } from '@grpc/grpc-js';
import type { AgentClient, WaitProcessResponse } from '../../gen/kiln/agent/v1/agent.ts';
import { KilnError } from '../errors.ts';
import { toKilnError } from './call.ts';
import { type ContainerStats, toContainerStats } from './stats.ts';
import type { OutputName } from './streams.ts';
import type { ProcessRef } from './terms.ts';

/** The least time between two messages of one call that are read, in ms: a guest may send as many as it likes. */
const messageMs = 20;

/** How a process ended. */
export interface GuestExit {
  /** 0 to 255; 128 + n for signal n. */
  readonly status: number;
  /** Bytes that the process itself had written when it ended; undefined where the guest cannot tell. */
  readonly written: Readonly<Record<OutputName, number | undefined>>;
  /** Of a container's init: what the container has used. Undefined where the guest does not tell it here. */
  readonly stats?: ContainerStats | undefined;
}

/**
 * Resolves when the process has ended.
 *
 * @param onOomKills of a container's init: called whenever processes of the container were killed for want of memory, with
 *   their number so far
 */
export async function waitExit(
  client: AgentClient,
  { id, execId }: ProcessRef,
  onOomKills?: (kills: number) => void,
): Promise<GuestExit> {
  const exit = await readExit(client.waitProcess({ id, execId }), (message) => message, onOomKills);
  if (exit === undefined) {
    throw new KilnError('internal', 'the agent in the guest does not tell how a process ended');
  }
  return exit;
}

/**
 * Reads a call that tells of a process until it tells of its end; undefined when the call ends without that.
 *
 * @param told what a message tells of the process
 */
export function readExit<Message>(
  call: ClientReadableStream<Message>,
  told: (message: Message) => WaitProcessResponse | undefined,
  onOomKills: (kills: number) => void = () => {},
): Promise<GuestExit | undefined> {
  return new Promise((resolve, reject) => {
    let over = false;
    call.on('data', (message: Message) => {
      const process = told(message);
      if (over || process === undefined) {
        call.cancel();
        return;
      }
      if (process.oomKills === undefined) {
        over = true;
        resolve(toExit(process));
        return;
      }
      call.pause();
      setTimeout(() => call.resume(), messageMs).unref();
      onOomKills(Number(process.oomKills));
    });
    call.on('error', (error) => reject(toKilnError(error)));
    call.on('end', () => resolve(undefined));
    // It may stand still.
    call.resume();
  });
}

function toExit({ exitStatus, stdoutBytes, stderrBytes, stats }: WaitProcessResponse): GuestExit {
  return {
    // A guest that is not ours any more may say anything.
    status: exitStatus & 0xff,
    written: { stdout: toNumber(stdoutBytes), stderr: toNumber(stderrBytes) },
    stats: stats && toContainerStats(stats),
  };
}

function toNumber(value: bigint | undefined): number | undefined {
  return value === undefined ? undefined : Number(value);
}
