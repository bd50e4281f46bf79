/** TCP connections to what listens in the guest. The protocol is told in agent.proto, feature "localhost". */
import type net from 'node:net';
import { setTimeout as delay } from 'node:timers/promises';
import type { AgentClient, DialRequest, DialResponse } from '../../gen/kiln/agent/v1/agent.ts';
import type { LoopbackFamily } from '../sys/loopback.ts';
import { endSocket, readSocket, resetSocket, writeSocket } from '../sys/socket-bytes.ts';
import { cancelling, toKilnError } from './call.ts';

/** The least time between two reports of listeners that are read, in ms: a guest may send as many as it likes. */
const reportMs = 20;

/** The most ports of a family that are looked at: a guest may name as many as it likes. */
const maxPorts = 1024;

/** A port of the guest's loopback address of a family. */
export interface LoopbackPort {
  readonly family: LoopbackFamily;
  readonly port: number;
}

/** The guest's ports with listeners, ascending; the guest may say anything. */
export interface ListeningPorts {
  readonly ipv4Ports: readonly number[];
  readonly ipv6Ports: readonly number[];
}

/** As the protocol has it: AF_INET and AF_INET6, linux/socket.h. */
const familyNumbers = { ipv4: 2, ipv6: 10 } as const;

const nothing = Buffer.alloc(0);

/**
 * Calls `onPorts` now and whenever the guest's listeners have changed, until the signal is aborted.
 *
 * @throws KilnError unavailable when the guest is lost
 */
export async function watchListeners(
  client: AgentClient,
  onPorts: (ports: ListeningPorts) => void,
  signal: AbortSignal,
): Promise<void> {
  const call = client.watchListeners({});
  using _ = cancelling(call, signal);
  try {
    for await (const { ipv4Ports, ipv6Ports } of call) {
      onPorts({ ipv4Ports: decodePorts(ipv4Ports), ipv6Ports: decodePorts(ipv6Ports) });
      await delay(reportMs, undefined, { ref: false });
    }
  } catch (error) {
    if (!signal.aborted) throw toKilnError(error);
  }
}

function decodePorts(bytes: Buffer): number[] {
  const count = Math.min(Math.floor(bytes.length / 2), maxPorts);
  return Array.from({ length: count }, (_, index) => bytes.readUInt16BE(2 * index));
}

/**
 * Connects a socket with a port of the guest, until both directions have ended. Takes the socket over; it is reset when the
 * guest refuses the connection, it breaks, or the signal is aborted.
 *
 * @throws KilnError failed-precondition when nobody listens there, aborted when either side's connection broke, unavailable
 *   when the guest is lost
 */
export async function relayConnection(
  client: AgentClient,
  { family, port }: LoopbackPort,
  socket: net.Socket,
  signal: AbortSignal,
): Promise<void> {
  const call = client.dial();
  // The loops below report errors; one that comes after them (the cancellation is one) has nobody else to go to.
  call.on('error', () => {});
  socket.on('error', () => {});
  const abort = () => {
    resetSocket(socket);
    call.cancel();
  };
  signal.addEventListener('abort', abort, { once: true });
  try {
    call.write({ family: familyNumbers[family], port, data: nothing, end: false });
    const toGuest = async () => {
      await readSocket(socket, (data) => send(call, { family: 0, port: 0, data, end: false }));
      await send(call, { family: 0, port: 0, data: nothing, end: true });
      call.end();
    };
    await Promise.all([toGuest(), fromGuest(call, socket)]);
    socket.destroy();
  } catch (error) {
    resetSocket(socket);
    throw toKilnError(error);
  } finally {
    signal.removeEventListener('abort', abort);
    call.cancel();
  }
}

async function fromGuest(call: AsyncIterable<DialResponse>, socket: net.Socket): Promise<void> {
  for await (const { data, end } of call) {
    if (data.length > 0) await writeSocket(socket, data);
    if (end) await endSocket(socket);
  }
}

/** Resolves when there is room for more. */
function send(call: ReturnType<AgentClient['dial']>, message: DialRequest): Promise<void> {
  return new Promise((resolve, reject) => {
    call.write(message, (error?: Error | null) => (error ? reject(error) : resolve()));
  });
}
