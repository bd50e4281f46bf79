import net from 'node:net';
import { setTimeout as delay } from 'node:timers/promises';
import { KilnError } from '../errors.ts';
import { abortable } from '../host/abortable.ts';
import { TimeLimit } from '../host/time-limit.ts';
import { openSerialSession } from '../rpc/serial-session.ts';
import type { FirstConnection } from './channel.ts';

/*
 * virtio-serial: the guest has a port of a virtio console, the VMM a listening Unix socket for the one program that may be
 * at the other end. It needs no kernel module of the host and no process beside the VMM. There is one byte stream and no
 * connections: see rpc/serial-session.ts.
 */

export interface SerialConnection extends FirstConnection {
  /**
   * Takes the host's end of a clone's port now, and says the first words. Its agent waits for them with its end open, and
   * would be told that the other is closed, and have to open it again, if nobody held that when the clone begins to run.
   *
   * @returns resolves when the agent has answered, or cannot any more
   */
  open(): Promise<void>;
}

/**
 * How long an agent that had a host before may take to answer the next one, in ms; then that hangs up. One whose host was
 * another kilnd has seen its end, and may just be slow; one whose host was we just now, maybe not.
 */
const answerMs = 200;
const answerAfterRestartMs = 1000;

/** How often the host says its first words to a clone's agent, in ms: that waits for them, and each time costs it some. */
const repeatToCloneMs = 1000;

/** How long the host's end then stays closed, in ms: the agent has to see it. Twice as long each time, to a limit. */
const firstPauseMs = 50;
const lastPauseMs = 800;

/**
 * The agent's connection at the VMM's socket, once the agent is there; the next one when the first has been closed.
 *
 * @param hadHost the agent has spoken with a host before
 */
export function serialConnection(socketPath: string, { hadHost = false } = {}): SerialConnection {
  const stopped = new AbortController();
  let patienceMs = hadHost ? answerAfterRestartMs : answerMs;
  /** Opened, and not accepted yet. */
  let waiting: { readonly socket: net.Socket; readonly answered: Promise<void> } | undefined;
  let accepted: net.Socket | undefined;
  const open = (everyMs?: number) => {
    if (waiting !== undefined) return waiting;
    const socket = net.connect(socketPath);
    // Until somebody uses it, a connection that breaks must not end kilnd.
    socket.on('error', () => {});
    waiting = { socket, answered: openSerialSession(socket, everyMs) };
    waiting.answered.catch(() => {});
    return waiting;
  };
  const session = async (signal: AbortSignal) => {
    const { socket, answered } = open();
    try {
      await abortable(answered, signal);
      return socket;
    } catch (error) {
      socket.destroy();
      throw error;
    } finally {
      waiting = undefined;
    }
  };
  return {
    open: () => open(repeatToCloneMs).answered.catch(() => {}),
    async accept(signal) {
      const either = AbortSignal.any([signal, stopped.signal]);
      try {
        accepted = hadHost ? await hangingUp(session, patienceMs, either) : await session(either);
        hadHost = true;
        patienceMs = answerMs;
        return accepted;
      } catch (cause) {
        if (signal.aborted || cause instanceof KilnError) throw cause;
        throw new KilnError('unavailable', 'the VM closed its end of the virtio-serial port', { cause });
      }
    },
    async [Symbol.asyncDispose]() {
      stopped.abort(new KilnError('unavailable', 'the VM was stopped before the connection of the agent'));
      waiting?.socket.destroy();
      accepted?.destroy();
    },
  };
}

/**
 * Tries until the agent answers, with pauses. An agent whose host's end was closed and opened again before it looked does
 * not know it, and takes what the new host says for garbage of the old one.
 */
async function hangingUp(
  session: (signal: AbortSignal) => Promise<net.Socket>,
  patienceMs: number,
  signal: AbortSignal,
): Promise<net.Socket> {
  for (let pauseMs = firstPauseMs; ; pauseMs = Math.min(2 * pauseMs, lastPauseMs)) {
    using limit = new TimeLimit(patienceMs + pauseMs, signal);
    try {
      return await session(limit.signal);
    } catch (error) {
      if (!limit.caused(error)) throw error;
    }
    // The signal's reason, and not the delay's own error.
    await delay(pauseMs, undefined, { signal }).catch(() => signal.throwIfAborted());
  }
}
