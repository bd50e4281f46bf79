import net from 'node:net';
import { KilnError } from '../errors.ts';
import { openSerialSession } from '../rpc/serial-session.ts';
import { abortable } from './abortable.ts';
import type { FirstConnection } from './channel.ts';

/*
 * virtio-serial: the guest has a port of a virtio console, the VMM a Unix socket on which it listens for the one program
 * that may be at the other end. It needs no kernel module of the host and no process beside the VMM. There is one byte
 * stream and no connections: see rpc/serial-session.ts.
 */

/** The agent's connection at the VMM's socket, once the agent is there. */
export function serialConnection(socketPath: string): FirstConnection {
  const stopped = new AbortController();
  let socket: net.Socket | undefined;
  return {
    async accept(signal) {
      socket = net.connect(socketPath);
      // Until somebody uses it, a connection that breaks must not end kilnd.
      socket.on('error', () => {});
      try {
        await abortable(openSerialSession(socket), AbortSignal.any([signal, stopped.signal]));
        return socket;
      } catch (cause) {
        socket.destroy();
        if (signal.aborted || cause instanceof KilnError) throw cause;
        throw new KilnError('unavailable', 'the VM closed its end of the virtio-serial port', { cause });
      }
    },
    async [Symbol.asyncDispose]() {
      stopped.abort(new KilnError('unavailable', 'the VM was stopped before the connection of the agent'));
      socket?.destroy();
    },
  };
}
