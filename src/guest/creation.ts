/** The creation of a container or a process in the guest, and what the same call tells of it afterwards. */
import type { ClientReadableStream } from '@grpc/grpc-js';
import type { CreateContainerResponse, ExecProcessResponse } from '../../gen/kiln/agent/v1/agent.ts';
import { KilnError } from '../errors.ts';
import { abortable } from '../host/abortable.ts';
import { TimeLimit } from '../host/time-limit.ts';
import { type CallOptions, silent, toKilnError } from './call.ts';
import { pidOf } from './terms.ts';
import { type GuestExit, readExit } from './wait.ts';

type CreationCall = ClientReadableStream<CreateContainerResponse | ExecProcessResponse>;

/** A container or a process that has been made. */
export class Creation {
  readonly #call: CreationCall;
  #pid = 0;
  #broken: unknown;

  private constructor(call: CreationCall) {
    this.#call = call;
    // From the beginning: it may come at once after the first message.
    call.on('error', (error) => {
      this.#broken = error;
    });
  }

  /** Of the process, a container's init, in the guest. */
  get pid(): number {
    return this.#pid;
  }

  /**
   * @param path of the call's method
   * @param limitMs for the first answer
   */
  static async of(
    begin: () => CreationCall,
    { path }: { readonly path: string },
    { limitMs, signal }: CallOptions & { readonly limitMs: number },
  ): Promise<Creation> {
    signal?.throwIfAborted();
    const call = begin();
    const creation = new Creation(call);
    using limit = new TimeLimit(limitMs, signal);
    try {
      creation.#pid = pidOf(await abortable(firstOf(call), limit.signal));
      return creation;
    } catch (error) {
      call.cancel();
      throw limit.expired ? silent(path, limitMs, error) : error;
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
function firstOf(call: CreationCall): Promise<{ readonly pid: number }> {
  return new Promise((resolve, reject) => {
    // One that comes later (the cancellation is one) changes nothing.
    call.on('error', (error) => reject(toKilnError(error)));
    const onEnd = () => {
      reject(new KilnError('internal', 'the agent in the guest does not tell what it has created'));
    };
    call.on('end', onEnd);
    call.once('data', (message: { readonly pid: number }) => {
      call.off('end', onEnd);
      call.pause();
      resolve(message);
    });
  });
}
