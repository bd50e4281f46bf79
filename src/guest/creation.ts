/** The creation of a container in the guest, and what the same call tells of its init afterwards. */
import type { ClientReadableStream } from '@grpc/grpc-js';
import {
  type AgentClient,
  AgentService,
  type CreateContainerRequest,
  type CreateContainerResponse,
} from '../../gen/kiln/agent/v1/agent.ts';
import { KilnError } from '../errors.ts';
import { TimeLimit } from '../host/time-limit.ts';
import { silent, toKilnError } from './call.ts';
import { pidOf } from './terms.ts';
import { type GuestExit, readExit } from './wait.ts';

export interface CreationOptions {
  /** Milliseconds for the container to be made. */
  readonly limitMs: number;
  /** Gives the call up: it rejects with the signal's reason, and the agent is told. */
  readonly signal?: AbortSignal | undefined;
}

/** A container that has been made. */
export class Creation {
  /** Of its init, in the guest. */
  readonly pid: number;
  readonly #call: ClientReadableStream<CreateContainerResponse>;
  #broken: unknown;

  private constructor(call: ClientReadableStream<CreateContainerResponse>, pid: number) {
    this.#call = call;
    this.pid = pid;
    call.on('error', (error) => {
      this.#broken = error;
    });
  }

  static async of(
    client: AgentClient,
    request: CreateContainerRequest,
    { limitMs, signal }: CreationOptions,
  ): Promise<Creation> {
    signal?.throwIfAborted();
    const call = client.createContainer(request);
    using limit = new TimeLimit(limitMs, signal);
    try {
      const first = await firstOf(call, limit.signal);
      return new Creation(call, pidOf(first));
    } catch (error) {
      call.cancel();
      throw limit.expired ? silent(AgentService.createContainer.path, limitMs, error) : error;
    }
  }

  /** As `waitExit` of wait.ts; undefined when the agent ends the call before. To be called once. */
  exit(onOomKills?: (kills: number) => void): Promise<GuestExit | undefined> {
    if (this.#broken !== undefined) return Promise.reject(toKilnError(this.#broken));
    return readExit(this.#call, ({ process }) => process, onOomKills);
  }

  /** For what nobody will wait for. */
  [Symbol.dispose](): void {
    this.#call.cancel();
  }
}

/** The first message; the call stands still after it. */
function firstOf(
  call: ClientReadableStream<CreateContainerResponse>,
  signal: AbortSignal,
): Promise<CreateContainerResponse> {
  return new Promise((resolve, reject) => {
    // One that comes later (the cancellation is one) changes nothing.
    call.on('error', (error) => reject(toKilnError(error)));
    call.on('end', () => reject(new KilnError('internal', 'the agent in the guest does not tell what it has created')));
    call.once('data', (message: CreateContainerResponse) => {
      call.pause();
      resolve(message);
    });
    signal.addEventListener('abort', () => reject(signal.reason), { once: true });
  });
}
