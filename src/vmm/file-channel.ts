import { rmSync } from 'node:fs';
import net from 'node:net';
import { KilnError } from '../errors.ts';
import { abortable } from '../host/abortable.ts';
import { requireSocketPath } from '../host/unix-socket.ts';
import { duplicate } from '../sys/terminal.ts';
import { connectToPeer, setBlocking } from '../sys/unix-fd.ts';
import { VMADDR_PORT_ANY } from '../sys/vsock.ts';
import { hostSocketFor } from './hybrid-vsock.ts';
import { isFrom, listen } from './kernel-vsock.ts';
import { filesPort } from './vmm.ts';

/*
 * The way of a guest's files: bytes of 9P between the guest's kernel and a file server of the host, which gets the host's end
 * as a descriptor. So what is accepted here is taken out of Node's hands, before it has read anything.
 *
 * Over vsock the guest dials, and nobody but it can: see hybrid-vsock.ts and kernel-vsock.ts. The agent is told to dial when
 * somebody waits; a program of the guest that dials earlier finds nobody there, or is hung up on.
 */

export interface FileChannel extends AsyncDisposable {
  /** As `Vm.acceptFiles`. With vsock the host listens from the moment of this call. */
  accept(signal: AbortSignal): Promise<number>;
}

/** @param admit lets the VMM connect to a socket of ours */
export function hybridFiles(udsPath: string, admit: (socket: string) => void = () => {}): FileChannel {
  const socketPath = hostSocketFor(udsPath, filesPort);
  return {
    async accept(signal) {
      signal.throwIfAborted();
      requireSocketPath(socketPath);
      // Of an earlier kilnd's.
      rmSync(socketPath, { force: true });
      const server = net.createServer({ pauseOnConnect: true });
      const connected = nextConnection(server);
      // It is bound when this returns, and listens.
      server.listen(socketPath);
      try {
        admit(socketPath);
        return await abortable(connected, signal);
      } finally {
        server.close();
      }
    },
    async [Symbol.asyncDispose]() {
      rmSync(socketPath, { force: true });
    },
  };
}

/** The host's kernel gives ports to all VMs together, so each has one of its own for as long as it lives. */
export interface KernelFiles extends FileChannel {
  readonly port: number;
}

/** @param wantedPort of a VM that is taken over. Throws as `listenKernel` */
export function kernelFiles(cid: number, wantedPort: number = VMADDR_PORT_ANY): KernelFiles {
  const { server, port } = listen(wantedPort, { pauseOnConnect: true });
  let take: ((socket: net.Socket) => void) | undefined;
  server.on('connection', (socket) => {
    socket.on('error', () => {});
    if (take === undefined || !isFrom(socket, cid)) socket.destroy();
    else take(socket);
  });
  // Whoever waits then waits on, to the end of its patience.
  server.on('error', () => {});
  return {
    port,
    async accept(signal) {
      const { promise, resolve } = Promise.withResolvers<number>();
      take = (socket) => {
        take = undefined;
        resolve(descriptorOf(socket));
      };
      try {
        return await abortable(promise, signal);
      } finally {
        take = undefined;
      }
    },
    async [Symbol.asyncDispose]() {
      server.close();
    },
  };
}

/** @param socketPath where the VMM listens for the one that may be at the port's other end */
export function serialFiles(socketPath: string): FileChannel {
  return {
    async accept(signal) {
      signal.throwIfAborted();
      try {
        return connectToPeer(socketPath);
      } catch (cause) {
        throw new KilnError('unavailable', `the VM's file channel cannot be used: ${(cause as Error).message}`, {
          cause,
        });
      }
    },
    async [Symbol.asyncDispose]() {},
  };
}

function nextConnection(server: net.Server): Promise<number> {
  const { promise, resolve, reject } = Promise.withResolvers<number>();
  promise.catch(() => {});
  let taken = false;
  server.on('connection', (socket) => {
    if (taken) socket.destroy();
    else resolve(descriptorOf(socket));
    taken = true;
  });
  server.on('error', (cause) => {
    reject(new KilnError('internal', `cannot listen for the guest's files: ${cause.message}`, { cause }));
  });
  return promise;
}

/** The connection as a descriptor and no more: blocking and close-on-exec. Nothing of it has been read. */
function descriptorOf(socket: net.Socket): number {
  // The handle that Node's stream reads from; its types leave it out.
  const handle = (socket as unknown as { readonly _handle: { readonly fd: number } | null })._handle;
  const fd = duplicate(handle?.fd ?? -1);
  // Closes Node's descriptor; the connection is not shut down.
  socket.destroy();
  setBlocking(fd);
  return fd;
}
