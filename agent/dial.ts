/** Connections from the host to what listens at the guest's loopback addresses. */
import { once } from 'node:events';
import { connect, type Socket } from 'node:net';
import type { ServerDuplexStream } from '@grpc/grpc-js';
import type { DialRequest, DialResponse } from '../gen/kiln/agent/v1/agent.ts';
import { endSocket, readSocket, resetSocket, writeSocket } from '../src/sys/socket-bytes.ts';
import { AgentError, describe } from './errors.ts';

export type DialCall = ServerDuplexStream<DialRequest, DialResponse>;

/** By address family, linux/socket.h. */
const loopback = new Map([
  [2, '127.0.0.1'],
  [10, '::1'],
]);

const nothing = Buffer.alloc(0);

/**
 * Carries bytes both ways until both directions have ended. Whatever else ends it, the connection is reset.
 *
 * @throws AgentError failed-precondition when nobody listens, aborted when the connection breaks
 */
export async function relayDial(call: DialCall): Promise<void> {
  call.on('error', () => {});
  // A stream that is cancelled does not end by itself.
  call.on('cancelled', () => call.destroy());
  const messages = call[Symbol.asyncIterator]() as AsyncIterableIterator<DialRequest>;
  const first = await messages.next();
  if (first.done) throw new AgentError('invalid-argument', 'the first message must name the port');
  const { family, port } = first.value;
  const host = loopback.get(family);
  if (host === undefined) throw new AgentError('invalid-argument', `there is no address family ${family}`);
  const socket = connect({ host, port, allowHalfOpen: true, noDelay: true });
  // Whoever reads or writes it is told of an error as well.
  socket.on('error', () => {});
  call.on('cancelled', () => resetSocket(socket));
  try {
    await connected(socket);
    await Promise.all([fromListener(socket, call), toListener(messages, socket)]);
  } catch (error) {
    resetSocket(socket);
    throw error instanceof AgentError ? error : new AgentError('aborted', describe(error));
  }
  socket.destroy();
}

async function connected(socket: Socket): Promise<void> {
  try {
    await once(socket, 'connect');
  } catch (error) {
    throw new AgentError('failed-precondition', `cannot connect in the guest: ${describe(error)}`);
  }
}

async function fromListener(socket: Socket, call: DialCall): Promise<void> {
  await readSocket(socket, (data) => send(call, { data, end: false }));
  await send(call, { data: nothing, end: true });
}

async function toListener(messages: AsyncIterable<DialRequest>, socket: Socket): Promise<void> {
  let ended = false;
  for await (const { data, end } of messages) {
    if (data.length > 0) await writeSocket(socket, data);
    if (end) await endSocket(socket);
    ended ||= end;
  }
  // The stream of a call that is cancelled, or whose connection breaks, ends before that is told.
  if (!ended) throw new AgentError('aborted', 'the call has ended early');
}

/** Resolves when there is room for more. */
function send(call: DialCall, message: DialResponse): Promise<void> {
  return new Promise((resolve, reject) => {
    call.write(message, (error?: Error | null) => (error ? reject(error) : resolve()));
  });
}
