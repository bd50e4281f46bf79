/**
 * The control protocol: how the launcher (native/launcher.c) and the `kiln` command talk to kilnd.
 *
 * One connection to `<state>/kilnd.sock` carries one request and one reply; the end of each is the end of the stream.
 *
 *   request = *( key "=" value NUL ) NUL payload        then shutdown(SHUT_WR)
 *   reply   = one byte exit code, relay socket path NUL, then the bytes for stdout, until EOF
 *
 * NUL ends a field because it is the one byte that no argument, path or environment variable can hold: the launcher,
 * in C, needs no escaping. Every request has `protocol` (2) and `action`: `start` and `delete` come from containerd by
 * way of the launcher, `status`, `stop` and `timeline` from the command line. Unknown keys are skipped, so that a newer
 * launcher can say more to an older kilnd; a key said twice, or one that is missing, is an error. The payload is what
 * containerd wrote to the launcher's stdin; bootstrap.ts tells what that is.
 * A reply with a path asks the launcher to have a relay listen there before it prints anything (native/relay.c).
 * A connection that ends before the first reply byte means "I was stopping": the launcher asks a fresh kilnd.
 */
import { KilnError } from '../../errors.ts';

/** Bytes of a whole request, and of a whole reply. The same number stands in native/launcher.c. */
export const controlMessageLimit = 8 * 1024 * 1024;

/** The same stands in native/launcher.h. */
export const protocolVersion = '2';
const equalsSign = 0x3d;

/** containerd pkg/identifiers: at most 76 bytes; letters, digits and separators, so never a path. */
const identifier = /^[A-Za-z0-9](?:[A-Za-z0-9._-]{0,75})$/;

/** Whether this may be the name of a namespace, a container or an exec, which become parts of paths. */
export function isIdentifier(value: string): boolean {
  return identifier.test(value);
}

/** What containerd says, by flags and environment, about the container a launcher was run for. */
export interface LauncherContext {
  readonly namespace: string;
  readonly id: string;
  /** Absolute path of the bundle. It may be gone already when the action is `delete`. */
  readonly bundle: string;
  /** containerd's gRPC socket, a bare path; empty when not given. */
  readonly address: string;
  /** containerd's ttrpc socket, where events go; empty when not given. */
  readonly ttrpcAddress: string;
  /** The containerd binary, whose `publish` verb can send events too; empty when not given. */
  readonly publishBinary: string;
  /** True when containerd logs at debug level. */
  readonly debug: boolean;
  /** The highest version of the task service that containerd wants (MAX_SHIM_VERSION); 0 when it does not say. */
  readonly maxShimVersion: number;
  /** When the launcher's main began: CLOCK_REALTIME in ns, the first mark of the start timeline. */
  readonly launcherStartedNs: bigint;
}

export interface StartRequest extends LauncherContext {
  readonly kind: 'start';
  /** The launcher's stdin, as it was. */
  readonly payload: Uint8Array;
}

export interface DeleteRequest extends LauncherContext {
  readonly kind: 'delete';
}

/** Asks for the timeline of a container, which may have ended. */
export interface TimelineRequest {
  readonly kind: 'timeline';
  readonly namespace: string;
  readonly id: string;
}

/** Asks for files of a running container as a tar stream, or brings some. */
export interface CopyRequest {
  readonly kind: 'copy';
  readonly namespace: string;
  /** The container's id, or how it begins. */
  readonly id: string;
  /** "probe": whether the path is a directory, which is all of the answer. */
  readonly direction: 'out' | 'in' | 'probe';
  /** In the container. */
  readonly path: string;
  /** Where the asker listens for the stream; empty for none. */
  readonly socket: string;
  /** Files that are brought become whose the stream says. */
  readonly keepOwners: boolean;
}

/** What the `kiln` command asks for. */
export type OperatorRequest = CopyRequest | { readonly kind: 'status' } | { readonly kind: 'stop' } | TimelineRequest;

export type ControlRequest = StartRequest | DeleteRequest | OperatorRequest;

export interface ControlReply {
  /** 0 to 255. */
  readonly exitCode: number;
  readonly stdout: Uint8Array;
  /** Where the launcher shall have a relay listen; absent where it need not. */
  readonly relaySocket?: string;
}

/**
 * The request in these bytes.
 * @throws {KilnError} `invalid-argument`, naming the field, for anything that is not a request; `unimplemented` for
 * another protocol version or an unknown action.
 */
export function parseControlRequest(bytes: Uint8Array): ControlRequest {
  checkSize(bytes.length, 'request');
  const { fields, payload } = splitFields(bytes);
  const protocol = required(fields, 'protocol');
  if (protocol !== protocolVersion) {
    throw new KilnError(
      'unimplemented',
      `control request has protocol ${quote(protocol)}, this kilnd speaks ${protocolVersion}`,
      { hint: 'launcher and kilnd are of different versions of Kiln: stop the running kilnd with "kiln stop"' },
    );
  }
  const action = required(fields, 'action');
  if (action !== 'start' && payload.length > 0) {
    throw invalid(`action ${quote(action)} takes no payload, but there are ${payload.length} bytes`);
  }
  switch (action) {
    case 'start':
      return { kind: 'start', ...launcherContext(fields), payload };
    case 'delete':
      return { kind: 'delete', ...launcherContext(fields) };
    case 'status':
    case 'stop':
      return { kind: action };
    case 'copy':
      return copyRequest(fields);
    case 'timeline':
      return { kind: action, namespace: identifierOf(fields, 'namespace'), id: identifierOf(fields, 'id') };
    default:
      throw new KilnError('unimplemented', `control request has the unknown action ${quote(action)}`);
  }
}

/**
 * The bytes of a request; the inverse of {@link parseControlRequest}.
 * @throws {KilnError} `invalid-argument` when a value holds a NUL, `resource-exhausted` above the size limit.
 */
export function encodeControlRequest(request: ControlRequest): Uint8Array {
  const fields: [string, string][] = [
    ['protocol', protocolVersion],
    ['action', request.kind],
  ];
  if (request.kind === 'start' || request.kind === 'delete') {
    fields.push(
      ['namespace', request.namespace],
      ['id', request.id],
      ['bundle', request.bundle],
      ['address', request.address],
      ['ttrpc_address', request.ttrpcAddress],
      ['publish_binary', request.publishBinary],
      ['debug', request.debug ? '1' : '0'],
      ['max_shim_version', request.maxShimVersion === 0 ? '' : request.maxShimVersion.toString()],
      ['launcher_started_ns', request.launcherStartedNs.toString()],
    );
  }
  if (request.kind === 'copy') {
    const { namespace, id, direction, path, socket, keepOwners } = request;
    fields.push(['namespace', namespace], ['id', id], ['direction', direction], ['path', path]);
    fields.push(['socket', socket], ['keep_owners', keepOwners ? '1' : '0']);
  }
  if (request.kind === 'timeline') fields.push(['namespace', request.namespace], ['id', request.id]);
  for (const [key, value] of fields) {
    if (value.includes('\0')) throw invalid(`field "${key}" must not hold a NUL byte`);
  }
  const header = Buffer.from(`${fields.map(([key, value]) => `${key}=${value}\0`).join('')}\0`);
  const bytes = request.kind === 'start' ? Buffer.concat([header, request.payload]) : header;
  checkSize(bytes.length, 'request');
  return bytes;
}

/**
 * The bytes of a reply.
 * @throws {KilnError} `invalid-argument` for an exit code that is no byte, `resource-exhausted` above the size limit.
 */
export function encodeControlReply(reply: ControlReply): Uint8Array {
  const { exitCode, stdout, relaySocket = '' } = reply;
  if (!Number.isInteger(exitCode) || exitCode < 0 || exitCode > 255) {
    throw new KilnError('invalid-argument', `exit code ${exitCode} is not an integer from 0 to 255`);
  }
  if (relaySocket.includes('\0')) throw new KilnError('invalid-argument', 'a socket path must not hold a NUL byte');
  const head = Buffer.concat([Uint8Array.of(exitCode), Buffer.from(`${relaySocket}\0`)]);
  checkSize(head.length + stdout.length, 'reply');
  return Buffer.concat([head, stdout]);
}

/** The reply in these bytes; null for none at all, which means that kilnd was stopping. */
export function parseControlReply(bytes: Uint8Array): ControlReply | null {
  const exitCode = bytes[0];
  if (exitCode === undefined) return null;
  checkSize(bytes.length, 'reply');
  const end = bytes.indexOf(0, 1);
  if (end < 0) throw new KilnError('unavailable', 'kilnd stopped in the middle of its answer');
  const relaySocket = Buffer.from(bytes.subarray(1, end)).toString();
  const stdout = bytes.subarray(end + 1);
  return relaySocket === '' ? { exitCode, stdout } : { exitCode, stdout, relaySocket };
}

/** The fields of a request or of a relay's header, and what follows their end. Throws `invalid-argument`. */
export function splitFields(bytes: Uint8Array): { fields: Map<string, string>; payload: Uint8Array } {
  const fields = new Map<string, string>();
  for (let start = 0; ; ) {
    const end = bytes.indexOf(0, start);
    if (end < 0) throw invalid('ends within its header');
    if (end === start) return { fields, payload: bytes.subarray(end + 1) };
    const equals = bytes.indexOf(equalsSign, start);
    if (equals < 0 || equals > end) throw invalid(`has the field ${quote(text(bytes, start, end))} without "="`);
    const key = text(bytes, start, equals);
    if (fields.has(key)) throw invalid(`has the field ${quote(key)} twice`);
    fields.set(key, text(bytes, equals + 1, end));
    start = end + 1;
  }
}

/** What is told about a launcher in these fields. Throws `invalid-argument`, naming the field. */
export function launcherContext(fields: ReadonlyMap<string, string>): LauncherContext {
  const bundle = required(fields, 'bundle');
  if (!bundle.startsWith('/')) throw invalid(`field "bundle" must be an absolute path, not ${quote(bundle)}`);
  const debug = required(fields, 'debug');
  if (debug !== '0' && debug !== '1') throw invalid(`field "debug" must be 0 or 1, not ${quote(debug)}`);
  const maxShimVersion = required(fields, 'max_shim_version');
  const startedNs = required(fields, 'launcher_started_ns');
  if (!/^\d{1,19}$/.test(startedNs)) {
    throw invalid(`field "launcher_started_ns" must be a number of nanoseconds, not ${quote(startedNs)}`);
  }
  return {
    namespace: identifierOf(fields, 'namespace'),
    id: identifierOf(fields, 'id'),
    bundle,
    address: required(fields, 'address'),
    ttrpcAddress: required(fields, 'ttrpc_address'),
    publishBinary: required(fields, 'publish_binary'),
    debug: debug === '1',
    // From an environment that others may have filled: what is no number says nothing.
    maxShimVersion: /^\d{1,9}$/.test(maxShimVersion) ? Number(maxShimVersion) : 0,
    launcherStartedNs: BigInt(startedNs),
  };
}

function copyRequest(fields: ReadonlyMap<string, string>): CopyRequest {
  const direction = required(fields, 'direction');
  if (direction !== 'out' && direction !== 'in' && direction !== 'probe') {
    throw invalid(`field "direction" must be out, in or probe, not ${quote(direction)}`);
  }
  const [path, socket] = [required(fields, 'path'), required(fields, 'socket')];
  if (!path.startsWith('/')) throw invalid(`field "path" must be an absolute path, not ${quote(path)}`);
  if (socket !== '' && !socket.startsWith('/'))
    throw invalid(`field "socket" must be an absolute path, not ${quote(socket)}`);
  const names = { namespace: identifierOf(fields, 'namespace'), id: identifierOf(fields, 'id') };
  return { kind: 'copy', ...names, direction, path, socket, keepOwners: required(fields, 'keep_owners') === '1' };
}

/** Checked here because both become parts of paths. */
function identifierOf(fields: ReadonlyMap<string, string>, key: 'namespace' | 'id'): string {
  const value = required(fields, key);
  if (isIdentifier(value)) return value;
  throw invalid(`field "${key}" must be 1 to 76 letters, digits, ".", "_" or "-", not ${quote(value)}`);
}

function required(fields: ReadonlyMap<string, string>, key: string): string {
  const value = fields.get(key);
  if (value === undefined) throw invalid(`lacks the field "${key}"`);
  return value;
}

function text(bytes: Uint8Array, start: number, end: number): string {
  try {
    return new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(bytes.subarray(start, end));
  } catch (cause) {
    throw new KilnError('invalid-argument', 'control request has a field that is not UTF-8', { cause });
  }
}

function checkSize(length: number, what: 'request' | 'reply'): void {
  if (length <= controlMessageLimit) return;
  throw new KilnError('resource-exhausted', `control ${what} has ${length} bytes, the limit is ${controlMessageLimit}`);
}

function invalid(what: string): KilnError {
  return new KilnError('invalid-argument', `control request ${what}`);
}

/** For messages: what may come from anywhere, made visible and kept short. */
function quote(value: string): string {
  return JSON.stringify(value.length <= 80 ? value : `${value.slice(0, 80)}…`);
}
