import { closeSync, openSync } from 'node:fs';
import type net from 'node:net';
import { KilnError } from '../errors.ts';
import { abortable } from '../host/abortable.ts';
import { type HostDevices, hostDevices } from './host-devices.ts';

/**
 * The ways a guest reaches its host. All end in a socket on which the agent speaks gRPC; they differ in who carries the
 * bytes: a helper program with Unix sockets (hybrid-vsock.ts), the host's kernel (kernel-vsock.ts), or the VMM itself
 * (virtio-serial.ts).
 */
export type Channel = 'hybrid-vsock' | 'kernel-vsock' | 'virtio-serial';

/**
 * Chooses the kernel's vsock where it is there, since it needs no process per VM, else hybrid vsock.
 * Throws `failed-precondition` when the kernel's is demanded and missing.
 */
export function chooseChannel(wanted: 'auto' | Channel, devices: HostDevices = hostDevices): Channel {
  if (wanted === 'hybrid-vsock' || wanted === 'virtio-serial') return wanted;
  const problem = openProblem(devices.vhostVsock);
  if (problem === undefined) return 'kernel-vsock';
  if (wanted === 'auto') return 'hybrid-vsock';
  throw new KilnError('failed-precondition', `vm.channel is "kernel-vsock", but ${problem}`, {
    hint: 'load the kernel module with `modprobe vhost_vsock`, or set vm.channel = "auto"',
  });
}

/** Opened and not only looked at: the device file exists before its module is loaded, and opening it loads that. */
function openProblem(device: string): string | undefined {
  try {
    closeSync(openSync(device, 'r+'));
    return undefined;
  } catch (error) {
    return `${device} cannot be opened: ${(error as NodeJS.ErrnoException).code ?? String(error)}`;
  }
}

/** The first connection that a server gets, and no other. */
export interface FirstConnection extends AsyncDisposable {
  /** Resolves with the connection, or rejects with the signal's reason; may be called once. */
  accept(signal: AbortSignal): Promise<net.Socket>;
}

/** The host's end of the one connection that the agent dials. */
export interface AgentListener extends FirstConnection {
  /** The vsock port that the agent has to dial. */
  readonly port: number;
}

/**
 * Takes one connection that `isWanted`, and closes the server then; closes every other. The agent dials before any
 * workload runs, so a program in the guest that dials later cannot take its place. Disposing closes the connection too.
 *
 * @param from whose connection it is, for errors
 */
export function firstConnection(
  server: net.Server,
  from: string,
  isWanted: (socket: net.Socket) => boolean = () => true,
): FirstConnection {
  const first = Promise.withResolvers<net.Socket>();
  // It may be refused while nobody waits for it.
  first.promise.catch(() => {});
  let taken: net.Socket | undefined;
  server.on('connection', (socket) => {
    // Until somebody uses it, a connection that breaks must not end kilnd.
    socket.on('error', () => socket.destroy());
    if (taken !== undefined || !isWanted(socket)) {
      socket.destroy();
      return;
    }
    taken = socket;
    server.close();
    first.resolve(socket);
  });
  server.on('error', (cause) => {
    first.reject(new KilnError('internal', `cannot accept the connection of ${from}: ${cause.message}`, { cause }));
  });
  return {
    accept: (signal) => abortable(first.promise, signal),
    async [Symbol.asyncDispose]() {
      if (server.listening) server.close();
      first.reject(new KilnError('unavailable', `the VM was stopped before the connection of ${from}`));
      taken?.destroy();
    },
  };
}
