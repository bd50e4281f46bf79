import { randomInt } from 'node:crypto';
import type { default as net, ServerOpts } from 'node:net';
import { KilnError } from '../errors.ts';
import { listenVsock, peerOfVsock, VMADDR_CID_ANY, VMADDR_PORT_ANY, type VsockServer } from '../sys/vsock.ts';
import { type AgentListener, firstConnection } from './channel.ts';

/*
 * Kernel vsock: the host's kernel is the other end of the guest's virtio-vsock device. The VMM opens /dev/vhost-vsock
 * and registers a context id (CID) for the guest; from then on an AF_VSOCK socket of the host is reached by
 *   guest: connect(CID 2, port P)   ->   host: a socket that listens on port P, and sees the guest's CID as its peer.
 * CIDs and ports are the whole host's, not the VM's, which brings three duties:
 *   - a CID that somebody else has is refused to the VMM (EADDRINUSE), so it is chosen anew;
 *   - the port is the kernel's choice, as several kilnd may run on one host; the agent reads it from its command line;
 *   - every guest can call every port, so only a connection from the VM's own CID is taken. The guest cannot forge
 *     that: the kernel drops packets whose source is not the CID of the device (drivers/vhost/vsock.c).
 */

/** 0 to 2 are reserved and 2^32-1 means "any", vsock(7). */
const firstCid = 3;
const lastCid = 0xfffffffe;

/** A CID at random: two of a host's thousand VMs choose the same once in ten thousand hosts. */
export function randomCid(): number {
  return randomInt(firstCid, lastCid + 1);
}

/**
 * Listens for the agent of the VM with this CID, on a port of the kernel's choice unless one is given. Throws
 * `failed-precondition` where the host has no AF_VSOCK, or somebody else has the port.
 */
export function listenKernel(cid: number, wantedPort: number = VMADDR_PORT_ANY): AgentListener {
  const { server, port } = listen(wantedPort);
  return { port, ...firstConnection(server, 'the agent', (socket) => isFrom(socket, cid)) };
}

/** Throws as `listenKernel`. */
export function listen(port: number, options: ServerOpts = {}): VsockServer {
  try {
    return listenVsock(VMADDR_CID_ANY, port, options);
  } catch (cause) {
    throw new KilnError('failed-precondition', `cannot listen for the guest on AF_VSOCK: ${(cause as Error).message}`, {
      hint: 'load the kernel module with `modprobe vhost_vsock`, or set vm.channel = "hybrid-vsock"',
      cause,
    });
  }
}

/** Whether a connection is the guest's with this CID. */
export function isFrom(socket: net.Socket, cid: number): boolean {
  return peerCid(socket) === cid;
}

/** Undefined for a caller that cannot be told, such as one that has hung up already: it is not the one we wait for. */
function peerCid(socket: net.Socket): number | undefined {
  try {
    return peerOfVsock(socket).cid;
  } catch {
    return undefined;
  }
}
