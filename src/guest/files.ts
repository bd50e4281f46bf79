/** A container's files between the agent's streams and the host's: tar streams in messages of any size. */
import { once } from 'node:events';
import type { AgentClient, ReadChangesRequest, ReadFilesRequest } from '../../gen/kiln/agent/v1/agent.ts';
import { KilnError } from '../errors.ts';
import { toKilnError } from './call.ts';

/** The most bytes in one message: big enough to amortise a message, small against HTTP/2's window. */
const chunkBytes = 128 * 1024;

/** What a container has written, as a tar stream. */
export interface ChangesStream {
  /** What may be said as `changedSinceNs` the next time; settled with the first piece. */
  readonly nowNs: Promise<bigint>;
  readonly pieces: AsyncGenerator<Buffer>;
}

export interface FilesTarget {
  readonly id: string;
  /** The directory, in bytes; absolute. */
  readonly path: Buffer;
  /** Files become whose the stream says; else root's. */
  readonly keepOwners: boolean;
}

/** What the agent's streams have in common. */
interface FilesCall<Message> extends AsyncIterable<Message> {
  cancel(): void;
  on(event: 'error', listener: () => void): unknown;
}

/**
 * What a container that is paused or has ended has written.
 *
 * @param limitMs the stream fails with `deadline-exceeded` when it is not at its end by then
 */
export function readChanges(client: AgentClient, request: ReadChangesRequest, limitMs: number): ChangesStream {
  const now = Promise.withResolvers<bigint>();
  // Whoever fails with the pieces may not look at it.
  now.promise.catch(() => {});
  const call = client.readChanges(request, { deadline: Date.now() + limitMs });
  const pieces = async function* () {
    try {
      yield* piecesOf(call, ({ nowNs }) => now.resolve(nowNs));
    } catch (error) {
      now.reject(error);
      throw error;
    }
  };
  return { nowNs: now.promise, pieces: pieces() };
}

export function readFiles(client: AgentClient, request: ReadFilesRequest): AsyncGenerator<Buffer> {
  return piecesOf(client.readFiles(request), () => {});
}

/** @param look gets every message, before its piece is taken */
async function* piecesOf<Message extends { readonly data: Buffer }>(
  call: FilesCall<Message>,
  look: (message: Message) => void,
): AsyncGenerator<Buffer> {
  // The loop below reports errors; one that comes after it (the cancellation is one) has nobody else to go to.
  call.on('error', () => {});
  try {
    for await (const message of call) {
      look(message);
      if (message.data.length > 0) yield message.data;
    }
  } catch (error) {
    throw toKilnError(error);
  } finally {
    call.cancel();
  }
}

/** Puts the files of a stream into a directory of a container; see agent.proto for the one that has no path. */
export async function writeFiles(
  client: AgentClient,
  { id, path, keepOwners }: FilesTarget,
  stream: AsyncIterable<Buffer>,
  signal?: AbortSignal,
): Promise<void> {
  const { promise: answered, resolve, reject } = Promise.withResolvers<void>();
  const call = client.writeFiles((error) => (error === null ? resolve() : reject(toKilnError(error))));
  call.on('error', () => {});
  const settled = answered.then(
    () => true,
    () => true,
  );
  const abort = () => call.cancel();
  signal?.addEventListener('abort', abort, { once: true });
  try {
    call.write({ id, path, keepOwners, data: Buffer.alloc(0) });
    let over = false;
    void settled.then(() => {
      over = true;
    });
    for await (const piece of stream) {
      for (let at = 0; at < piece.length && !over; at += chunkBytes) {
        const data = piece.subarray(at, at + chunkBytes);
        const room = call.write({ id: '', path: Buffer.alloc(0), keepOwners: false, data });
        if (!room) await Promise.race([once(call, 'drain'), settled]);
      }
      if (over) break;
    }
    call.end();
    await answered;
  } catch (error) {
    // Whatever was sent is no whole stream, and the agent must not take it for one.
    call.cancel();
    throw error;
  } finally {
    signal?.removeEventListener('abort', abort);
  }
}

/**
 * Creates a container that awaits files, and gives them to it.
 *
 * @param create asks for the creation
 */
export async function provideFiles<T>(
  client: AgentClient,
  id: string,
  stream: AsyncIterable<Buffer>,
  create: () => Promise<T>,
): Promise<T> {
  const failed = new AbortController();
  const target = { id, path: Buffer.alloc(0), keepOwners: true };
  const written = writeFiles(client, target, stream, failed.signal);
  const created = create();
  // When the files fail, so does the creation; and without it, nobody takes the files.
  created.catch(() => failed.abort());
  const [files, container] = await Promise.allSettled([written, created]);
  if (container.status === 'fulfilled') return container.value;
  // What the files failed with is the cause, unless they failed because of the creation.
  const cause = files.status === 'rejected' ? files.reason : undefined;
  throw cause instanceof KilnError && cause.code !== 'canceled' ? cause : container.reason;
}
