import { listenUnix } from '../host/unix-socket.ts';
import { type AgentListener, firstConnection } from './channel.ts';

/*
 * Hybrid vsock: the guest speaks AF_VSOCK, the host speaks Unix sockets. The VMM (Firecracker) or its helper
 * (vhost-device-vsock) owns one Unix socket path U per VM:
 *   guest -> host: a guest that connects to CID 2, port P makes the VMM connect to the Unix socket "U_P";
 *   host -> guest: the host connects to U and sends "CONNECT P\n"; the answer is "OK <port>\n", then bytes flow.
 * Kiln uses only the first direction: the agent dials port 1024, and that the connection arrives is the ready signal.
 * Who may connect to U_P is a matter of file permissions: its directory is open to root only.
 */

/** The Unix socket on which a guest's connection to `port` of the host arrives. */
export function hostSocketFor(udsPath: string, port: number): string {
  return `${udsPath}_${port}`;
}

/** Listens for the agent. Throws `failed-precondition` when the socket's path is too long. */
export async function listenHybrid(udsPath: string, port: number): Promise<AgentListener> {
  const server = await listenUnix(hostSocketFor(udsPath, port));
  return { port, ...firstConnection(server, 'the agent') };
}
