/**
 * The relay's protocol, kilnd's end (the other: native/relay.c, which tells the story).
 *
 * A relay owns the socket that containerd dials for one endpoint, and containerd's connections to it, and outlives kilnd.
 * It connects to `<state>/relay.sock`: once as *keeper*, which lasts as long as kilnd, and once per connection of
 * containerd as *session*. Each begins with a header in the form of the control protocol (../control/request.ts),
 *
 *   header  = *( key "=" value NUL ) NUL
 *             protocol (2), role (keeper | session), socket (what the relay listens on), relay_pid, client (the number of
 *             containerd's connection), replayed, and what the launcher was started with
 *
 * which is enough for a new kilnd to make the endpoint again. Then a session carries ttrpc frames, of which the first
 * `replayed` requests were given to an earlier kilnd that did not answer; a keeper carries the messages of keeper.ts.
 */
import { KilnError } from '../../errors.ts';
import { type LauncherContext, launcherContext, protocolVersion, splitFields } from '../control/request.ts';

/** Bytes of a header; its values are at most four paths and two identifiers. */
export const headerLimit = 64 * 1024;

export interface RelayHeader {
  readonly role: 'keeper' | 'session';
  /** What the launcher was started with that made the relay. */
  readonly context: LauncherContext;
  /** The path that the relay listens on. */
  readonly socketPath: string;
  readonly relayPid: number;
  /** Counts containerd's connections to this relay, from 1; 0 for a keeper. */
  readonly client: number;
  /** How many of the session's first requests an earlier kilnd was given and did not answer. */
  readonly replayed: number;
}

/**
 * The header in the first bytes of a connection, and what follows it; undefined while it has not come to its end.
 * @throws {KilnError} `invalid-argument` for what is no header, `unimplemented` for another protocol version.
 */
export function parseRelayHeader(bytes: Uint8Array): { header: RelayHeader; rest: Uint8Array } | undefined {
  const end = endOfHeader(bytes);
  if (end === undefined) {
    if (bytes.length > headerLimit) throw invalid(`has more than ${headerLimit} bytes`);
    return undefined;
  }
  const { fields } = splitFields(bytes.subarray(0, end));
  const protocol = fields.get('protocol');
  if (protocol !== protocolVersion) {
    throw new KilnError('unimplemented', `a relay speaks protocol ${protocol}, this kilnd speaks ${protocolVersion}`);
  }
  const role = fields.get('role');
  if (role !== 'keeper' && role !== 'session') throw invalid('has neither the role keeper nor session');
  const socketPath = fields.get('socket') ?? '';
  if (!socketPath.startsWith('/')) throw invalid('has no absolute socket path');
  const header = {
    role,
    context: launcherContext(fields),
    socketPath,
    relayPid: count(fields, 'relay_pid'),
    client: count(fields, 'client'),
    replayed: count(fields, 'replayed'),
  } as const;
  return { header, rest: bytes.subarray(end) };
}

/** Behind the empty field. */
function endOfHeader(bytes: Uint8Array): number | undefined {
  if (bytes[0] === 0) return 1;
  const end = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length).indexOf('\0\0');
  return end < 0 ? undefined : end + 2;
}

function count(fields: ReadonlyMap<string, string>, key: string): number {
  const value = fields.get(key) ?? '';
  if (!/^\d{1,9}$/.test(value)) throw invalid(`field "${key}" is no number`);
  return Number(value);
}

function invalid(what: string): KilnError {
  return new KilnError('invalid-argument', `relay header ${what}`);
}
