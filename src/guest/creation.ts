/** The creation of a container in the guest, and what the same call tells of its init afterwards. */
import type { ClientReadableStream } from '@grpc/grpc-js';
import {
  type AgentClient,
  AgentService,
  type CreateContainerRequest,
  type CreateContainerResponse,
} from '../../gen/kiln/agent/v1/agent.ts';
import { KilnError } from '../errors.ts';
import { abortable } from '../host/abortable.ts';
import { TimeLimit } from '../host/time-limit.ts';
import { type CallOptions, silent, toKilnError } from './call.ts';
import { pidOf } from './terms.ts';
import { type GuestExit, readExit } from './wait.ts';

/** A container that has been made. */
export class Creation {
  readonly #call: ClientReadableStream<CreateContainerResponse>;
  #pid = 0;
  #broken: unknown;

  private constructor(call: ClientReadableStream<CreateContainerResponse>) {
    this.#call = call;
    // From the beginning: it may come at once after the first message.
    call.on('error', (error) => {
      this.#broken = error;
    });
  }

  /** Of its init, in the guest. */
  get pid(): number {
    return this.#pid;
  }

  /** @param limitMs for the container to be made */
  static async of(
    client: AgentClient,
    request: CreateContainerRequest,
    { limitMs, signal }: CallOptions & { readonly limitMs: number },
  ): Promise<Creation> {
    signal?.throwIfAborted();
    const call = client.createContainer(request);
    const creation = new Creation(call);
    using limit = new TimeLimit(limitMs, signal);
    try {
      creation.#pid = pidOf(await abortable(firstOf(call), limit.signal));
      return creation;
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
function firstOf(call: ClientReadableStream<CreateContainerResponse>): Promise<CreateContainerResponse> {
  return new Promise((resolve, reject) => {
    // One that comes later (the cancellation is one) changes nothing.
    call.on('error', (error) => reject(toKilnError(error)));
    call.on('end', () => reject(new KilnError('internal', 'the agent in the guest does not tell what it has created')));
    call.once('data', (message: CreateContainerResponse) => {
      call.pause();
      resolve(message);
    });
  });
}
