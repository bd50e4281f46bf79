import net from 'node:net';
import { KilnError } from '../errors.ts';

/*
 * Hybrid vsock: the guest speaks AF_VSOCK, the host speaks Unix sockets. The VMM (Firecracker) or its helper
 * (vhost-device-vsock) owns one Unix socket path U per VM:
 *   guest -> host: a guest that connects to CID 2, port P makes the VMM connect to the Unix socket "U_P";
 *   host -> guest: the host connects to U and sends "CONNECT P\n"; the answer is "OK <port>\n", then bytes flow.
 * Kiln uses only the first direction: the agent dials port 1024, and that the connection arrives is the ready signal.
 */

/** The Unix socket on which a guest's connection to `port` of the host arrives. */
export function hostSocketFor(udsPath: string, port: number): string {
  return `${udsPath}_${port}`;
}

/** The host's end of the one connection that the agent dials. */
export interface AgentListener extends AsyncDisposable {
  /** Resolves with the agent's connection; may be called once. */
  accept(signal: AbortSignal): Promise<net.Socket>;
}

/**
 * Listens for the agent. Only the first connection counts: the agent dials before any workload runs, so a program in
 * the guest that dials later cannot take its place; the socket is closed then.
 */
export async function listenHybrid(udsPath: string, port: number): Promise<AgentListener> {
  const path = hostSocketFor(udsPath, port);
  const first = Promise.withResolvers<net.Socket>();
  first.promise.catch(() => {});
  const server = net.createServer((socket) => {
    socket.on('error', () => socket.destroy());
    server.close();
    first.resolve(socket);
  });
  await new Promise<void>((resolve, reject) => {
    server.once('error', reject);
    server.listen(path, () => resolve());
  }).catch((error: unknown) => {
    throw new KilnError('internal', `cannot listen for the agent on ${path}`, { cause: error });
  });
  return {
    accept: (signal) => abortable(first.promise, signal),
    async [Symbol.asyncDispose]() {
      if (server.listening) server.close();
      first.reject(new KilnError('unavailable', 'the VM was stopped before the agent called'));
      await first.promise.then(
        (socket) => socket.destroy(),
        () => {},
      );
    },
  };
}

/** The promise's outcome, or the signal's reason if that comes first. */
export function abortable<T>(promise: Promise<T>, signal: AbortSignal): Promise<T> {
  if (signal.aborted) return Promise.reject(signal.reason);
  return new Promise((resolve, reject) => {
    const onAbort = () => reject(signal.reason);
    signal.addEventListener('abort', onAbort, { once: true });
    promise.then(resolve, reject).finally(() => signal.removeEventListener('abort', onAbort));
  });
}
