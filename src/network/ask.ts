/** One DNS query from a socket of some network namespace, and its answer. */
import { createSocket } from 'node:dgram';
import { isIPv6, Socket, type SocketConstructorOpts } from 'node:net';
import { DnsMessages, frameDnsMessage } from '../sys/dns-stream.ts';

const domainPort = 53;

export interface NameQuery {
  /** An IP address. */
  readonly nameserver: string;
  readonly transport: 'udp' | 'tcp';
  /** A DNS message. */
  readonly message: Buffer;
}

/** A DNS message; or nobody listens there, or none has come. */
export type NameAnswer = Buffer | 'refused' | 'none';

/**
 * Sends the query, and resolves with what comes of it; with "none" when the signal is aborted. Never rejects.
 *
 * @param fd a new socket of the query's family and transport, which is this function's then
 * @param port for tests
 */
export function ask(fd: number, query: NameQuery, signal: AbortSignal, port = domainPort): Promise<NameAnswer> {
  const { promise, resolve } = Promise.withResolvers<NameAnswer>();
  const send = query.transport === 'udp' ? askByUdp : askByTcp;
  const close = send(fd, port, query, resolve);
  const giveUp = () => resolve('none');
  if (signal.aborted) giveUp();
  signal.addEventListener('abort', giveUp, { once: true });
  return promise.finally(() => {
    signal.removeEventListener('abort', giveUp);
    close();
  });
}

/** @returns what closes the socket */
type Send = (fd: number, port: number, query: NameQuery, done: (answer: NameAnswer) => void) => () => void;

const askByUdp: Send = (fd, port, { nameserver, message }, done) => {
  const socket = createSocket(isIPv6(nameserver) ? 'udp6' : 'udp4');
  socket.on('message', (answer) => {
    if (isAnswerTo(message, answer)) done(answer);
  });
  // Connected, so that the kernel takes datagrams of the server alone, and tells that there is none.
  socket.on('error', () => done('refused'));
  socket.once('connect', () => socket.send(message));
  socket.bind({ fd });
  socket.connect(port, nameserver);
  return () => socket.close();
};

const askByTcp: Send = (fd, port, { nameserver, message }, done) => {
  // Node's types leave the option out: nothing is read before it is connected.
  const socket = new Socket({ fd, manualStart: true } as SocketConstructorOpts);
  const messages = new DnsMessages();
  let connected = false;
  socket.on('data', (data: Buffer) => {
    for (const answer of messages.push(data)) if (isAnswerTo(message, answer)) done(answer);
  });
  socket.on('error', () => done(connected ? 'none' : 'refused'));
  socket.on('end', () => done('none'));
  socket.once('connect', () => {
    connected = true;
    socket.write(frameDnsMessage(message));
  });
  socket.connect({ port, host: nameserver });
  return () => socket.destroy();
};

/** By its id, RFC 1035, 4.1.1. */
function isAnswerTo(query: Buffer, answer: Buffer): boolean {
  return answer.length >= 2 && answer.readUInt16BE() === query.readUInt16BE();
}
