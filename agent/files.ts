/**
 * A container's files as tar streams: what it has written, what its processes see, and what the host puts there.
 */
import { constants, openSync } from 'node:fs';
import { setImmediate } from 'node:timers/promises';
import type { ServerReadableStream, ServerWritableStream } from '@grpc/grpc-js';
import type {
  Mount,
  ReadChangesRequest,
  ReadChangesResponse,
  ReadFilesRequest,
  ReadFilesResponse,
  WriteFilesRequest,
} from '../gen/kiln/agent/v1/agent.ts';
import { packFiles } from '../src/files/pack.ts';
import { Place, splitPath } from '../src/files/place.ts';
import { FilesError } from '../src/files/tar-entry.ts';
import { opaqueXattr, type UnpackOptions, unpackFiles } from '../src/files/unpack.ts';
import { CLOCK_REALTIME, clockGettime } from '../src/sys/clock.ts';
import { AgentError } from './errors.ts';

/** Extended attributes that are a file's own. overlayfs's and the kernel's are not. */
const ownXattr = /^(user\.(?!overlay\.)|security\.capability$|system\.posix_acl_(access|default)$)/;

const own = (name: string) => (ownXattr.test(name) ? name : undefined);

/**
 * How much older than the last look a file's change must be to count as seen, in ns: the clock of files moves in steps,
 * and the guest's may have been set back a little.
 */
const slackNs = 2_000_000_000n;

/** Pieces of a stream that are sent as one message, at most. */
const messageBytes = 256 * 1024;

/** A container's root filesystem in the guest: where the overlay is, and what was written to it. */
interface Root {
  readonly target: string;
  readonly upper: string;
}

/** @throws AgentError failed-precondition for a root filesystem to which nothing can be written */
function rootOf(id: string, mounts: readonly Mount[]): Root {
  const overlay = mounts.find(({ type }) => type === 'overlay');
  const upper = overlay?.options.find((option) => option.startsWith('upperdir='))?.slice('upperdir='.length);
  if (overlay !== undefined && upper !== undefined) return { target: overlay.target, upper };
  throw new AgentError('failed-precondition', `the root filesystem of container "${id}" cannot be written to`);
}

/** Answers ReadChanges. Never rejects. */
export async function sendChanges(
  { id, changedSinceNs }: ReadChangesRequest,
  mounts: readonly Mount[],
  call: ServerWritableStream<ReadChangesRequest, ReadChangesResponse>,
): Promise<void> {
  const { upper } = rootOf(id, mounts);
  const nowNs = clockGettime(CLOCK_REALTIME) - slackNs;
  using place = openDirectory(upper);
  const stream = packFiles(
    { place, as: '.' },
    {
      xattr: (name) => (name === opaqueXattr || ownXattr.test(name) ? name : undefined),
      changedSinceNs: changedSinceNs === 0n ? undefined : changedSinceNs,
    },
  );
  call.write({ data: Buffer.alloc(0), nowNs });
  await send(stream, call, (data) => ({ data, nowNs: 0n }));
}

/** Answers ReadFiles. @param root of the container's processes: /proc/PID/root, or the root filesystem */
export async function sendFiles(
  { path }: ReadFilesRequest,
  root: string,
  call: ServerWritableStream<ReadFilesRequest, ReadFilesResponse>,
): Promise<void> {
  const { directory, name } = placeIn(path);
  using top = openDirectory(root);
  // As in rsync and `docker cp`: what is in the directory, to which a link may lead.
  const isContents = /\/\.?$/.test(path.toString('latin1'));
  using place = open(top, isContents ? joined(directory, name) : directory);
  const source = isContents ? { place, as: '.' } : { place, name, as: name };
  await send(packFiles(source, { xattr: own }), call, (data) => ({ data }));
}

/** Does what WriteFiles asks for. @param root as of `sendFiles`; of a container that is being made, its root filesystem */
export async function takeFiles(
  { path, keepOwners, data }: WriteFilesRequest,
  root: string,
  messages: AsyncIterable<WriteFilesRequest>,
): Promise<void> {
  using top = openDirectory(root);
  const awaited = path.length === 0;
  const { directory, name } = awaited ? { directory: '', name: '' } : placeIn(path);
  using place = open(top, joined(directory, name));
  const options: UnpackOptions = {
    walk: 'in-root',
    taken: awaited ? 'replace' : 'same-kind',
    marks: awaited ? 'obey' : 'refuse',
    xattr: own,
    devices: awaited ? 'make' : 'leave-out',
    owner: awaited || keepOwners ? undefined : { uid: 0, gid: 0 },
  };
  const chunks = async function* () {
    if (data.length > 0) yield data;
    for await (const message of messages) if (message.data.length > 0) yield message.data;
  };
  const { leftOut } = await unpackFiles(chunks(), place, options);
  const [device] = leftOut;
  if (device !== undefined) throw new AgentError('invalid-argument', `"${device}" is a device: devices are not copied`);
}

/** The first message of a WriteFiles call, and the others. */
export async function openWrite(
  call: ServerReadableStream<WriteFilesRequest, object>,
): Promise<{ first: WriteFilesRequest; rest: AsyncIterable<WriteFilesRequest> }> {
  call.on('cancelled', () => call.destroy());
  const messages = call[Symbol.asyncIterator]() as AsyncIterableIterator<WriteFilesRequest>;
  const first = await messages.next();
  if (first.done) throw new AgentError('invalid-argument', 'the first message must name the container');
  const rest = async function* () {
    for await (const message of messages) yield message;
    // One that was reset, or whose connection broke, ends as well, and in the same turn says that it was cancelled.
    await setImmediate();
    if (call.cancelled) throw new AgentError('failed-precondition', 'the call was cancelled');
  };
  return { first: first.value, rest: rest() };
}

/** An error of the files' own as an AgentError; any other as it is. @param path that was asked for */
export function filesError(error: unknown, path = ''): unknown {
  if (error instanceof FilesError) {
    const code = error.code === 'resource-exhausted' || error.code === 'unimplemented' ? 'internal' : error.code;
    return new AgentError(code, error.message, { cause: error });
  }
  const { code } = error as NodeJS.ErrnoException;
  // The path by which the kernel was asked says nothing to anybody.
  if (code === 'ENOENT') return new AgentError('not-found', `${path}: no such file or directory`, { cause: error });
  if (code === 'ENOTDIR' && path !== '') {
    return new AgentError('failed-precondition', `${path}: not a directory`, { cause: error });
  }
  if (code === 'ENOTDIR' || code === 'EEXIST')
    return new AgentError('failed-precondition', messageOf(error), { cause: error });
  return error;
}

function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

/** As few messages as the stream's pieces allow; the call's back-pressure is the stream's. */
async function send<Response>(
  stream: AsyncIterable<Buffer>,
  call:
    | ServerWritableStream<never, Response>
    | ServerWritableStream<ReadChangesRequest, Response>
    | ServerWritableStream<ReadFilesRequest, Response>,
  message: (data: Buffer) => Response,
): Promise<void> {
  let parts: Buffer[] = [];
  let length = 0;
  const flush = async () => {
    if (length === 0) return;
    const goesOn = call.write(message(Buffer.concat(parts)));
    parts = [];
    length = 0;
    if (!goesOn) await drained(call);
  };
  for await (const piece of stream) {
    if (call.cancelled) throw new AgentError('failed-precondition', 'the call was cancelled');
    parts.push(piece);
    length += piece.length;
    if (length >= messageBytes) await flush();
  }
  await flush();
  call.end();
}

/** Resolves when there is room again, or nobody reads any more. */
function drained(call: NodeJS.EventEmitter): Promise<void> {
  return new Promise((resolve) => {
    const done = () => {
      for (const name of ['drain', 'close', 'cancelled']) call.off(name, done);
      resolve();
    };
    for (const name of ['drain', 'close', 'cancelled']) call.on(name, done);
  });
}

function placeIn(path: Buffer) {
  const text = path.toString('latin1');
  if (!text.startsWith('/') || text.includes('\0') || text.split('/').includes('..')) {
    throw new AgentError('invalid-argument', `"${path.toString()}" is no absolute path, or has ".." in it`);
  }
  return splitPath(
    text
      .split('/')
      .filter((part) => part !== '' && part !== '.')
      .join('/'),
  );
}

function joined(directory: string, name: string): string {
  return directory === '' ? name : `${directory}/${name}`;
}

function openDirectory(path: string): Place {
  return new Place(openSync(path, constants.O_DIRECTORY | constants.O_RDONLY));
}

function open(top: Place, path: string): Place {
  return Place.open(top.fd, path, 'in-root');
}
