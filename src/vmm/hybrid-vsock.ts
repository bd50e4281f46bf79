import { rm } from 'node:fs/promises';
import net from 'node:net';
import path from 'node:path';
import { listenUnix } from '../host/unix-socket.ts';
import { type AgentListener, firstConnection } from './channel.ts';

/*
 * Hybrid vsock: the guest speaks AF_VSOCK, the host speaks Unix sockets. The VMM (Firecracker) or its helper
 * (vhost-device-vsock) owns one Unix socket path U per VM:
 *   guest -> host: a guest that connects to CID 2, port P makes the VMM connect to the Unix socket "U_P";
 *   host -> guest: the host connects to U and sends "CONNECT P\n"; the answer is "OK <port>\n", then bytes flow.
 * Kiln uses the first direction: the agent dials port 1024, and that the connection arrives is the ready signal. The second
 * serves only to wake an agent up.
 * Who may connect to U_P is a matter of file permissions: its directory is open to root only, or in a jail to its
 * user.
 */

/** The agent's port for that. */
const knockPort = 1025;

/** The Unix socket on which a guest's connection to `port` of the host arrives. */
export function hostSocketFor(udsPath: string, port: number): string {
  return `${udsPath}_${port}`;
}

/**
 * Tells the agent of a VM that was taken over that somebody waits for its call (agent/main.ts, KNOCK_PORT). Resolves when
 * the backend has passed that on, or cannot; never rejects: an agent that has noticed itself dials anyway.
 */
export async function knock(udsPath: string): Promise<void> {
  const socket = net.connect(udsPath);
  await new Promise<void>((resolve) => {
    socket.on('error', () => {});
    socket.on('close', resolve);
    // The answer, "OK <port>" or the end.
    socket.once('data', () => socket.destroy());
    // In one piece: the backend reads the line once.
    socket.write(`CONNECT ${knockPort}\n`);
  });
}

/** Where a VM's socket U is, in its directory. */
export function udsPathIn(directory: string): string {
  return path.join(directory, 'vsock');
}

/** Listens in an earlier kilnd's place for the agent, and asks it to call. Throws as `listenHybrid`. */
export async function listenHybridAgain(udsPath: string, port: number): Promise<AgentListener> {
  await rm(hostSocketFor(udsPath, port), { force: true });
  const listener = await listenHybrid(udsPath, port);
  void knock(udsPath);
  return listener;
}

/** Listens for the agent. Throws `failed-precondition` when the socket's path is too long. */
export async function listenHybrid(udsPath: string, port: number): Promise<AgentListener> {
  const server = await listenUnix(hostSocketFor(udsPath, port));
  return { port, ...firstConnection(server, 'the agent') };
}
