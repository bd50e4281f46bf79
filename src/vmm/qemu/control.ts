import net from 'node:net';
import { KilnError } from '../../errors.ts';
import { abortable } from '../../host/abortable.ts';
import { describeExit, type HelperProcess } from '../../host/helper-process.ts';
import { TimeLimit } from '../../host/time-limit.ts';
import { guestStop } from './guest-stop.ts';
import { loadState, type SavedState } from './migration.ts';
import { QmpClient } from './qmp.ts';

/** How long QEMU may take until it answers: some 50 ms in fact, so this only bounds a wrong program. */
const startLimitMs = 30_000;

/** How long a QEMU that restores a VM is left unheard, in ms: it may have refused a command. */
const unheardMs = 1000;

/** QEMU's control connection, and what it tells of the guest. */
export interface Control {
  readonly qmp: QmpClient;
  readonly guestStopped: Promise<'guest'>;
}

export interface ControlOptions {
  /** On which QEMU listens, or will. */
  readonly socket: string;
  readonly qemu: HelperProcess;
  /** Closes the connection. */
  readonly stack: AsyncDisposableStack;
}

/** To a QEMU whose VM runs, or is about to: it takes commands when this resolves. A failure carries QEMU's own last words. */
export async function connectQmp(options: ControlOptions, signal: AbortSignal): Promise<Control> {
  const qmp = connect(options);
  const negotiated = qmp.negotiate();
  const guestStopped = guestStop(qmp, 'unknown');
  await taken(negotiated, qmp, options.qemu, signal);
  return { qmp, guestStopped };
}

/**
 * To a QEMU that waits for a saved state: the VM runs with it when this resolves. QEMU is told all at once, and what it
 * says to that is left unheard until the agent has answered: each of its words would wake kilnd for nothing.
 *
 * @param answered resolves when the agent has answered
 */
export async function connectRestoring(
  options: ControlOptions,
  { state, answered }: { readonly state: SavedState; readonly answered: Promise<void> },
  signal: AbortSignal,
): Promise<Control> {
  const { qemu } = options;
  const qmp = connect(options, { unheard: true });
  const negotiated = qmp.negotiate();
  const guestStopped = guestStop(qmp, 'nothing');
  const loaded = loadState(qmp, state, signal);
  for (const each of [negotiated, loaded]) each.catch(() => {});
  {
    using limit = new TimeLimit(unheardMs, signal);
    await abortable(Promise.race([answered, qemu.exited]), limit.signal).catch((error: unknown) => {
      if (!limit.caused(error)) throw error;
    });
  }
  qmp.hear();
  await taken(negotiated, qmp, qemu, signal);
  await orLastWords(loaded, 'the restore of its state', { qmp, qemu }, signal);
  return { qmp, guestStopped };
}

function connect({ socket, stack }: ControlOptions, how?: { readonly unheard: boolean }): QmpClient {
  return stack.adopt(new QmpClient(net.connect(socket), how), (client) => client.close());
}

/** @throws KilnError deadline-exceeded for a QEMU that is silent */
async function taken(negotiated: Promise<void>, qmp: QmpClient, qemu: HelperProcess, signal: AbortSignal) {
  using limit = new TimeLimit(startLimitMs, signal);
  try {
    await orLastWords(negotiated, 'start', { qmp, qemu }, limit.signal);
  } catch (error) {
    if (!limit.caused(error)) throw error;
    const message = `QEMU took no commands within ${startLimitMs / 1000} s: ${qemu.lastWords()}`;
    throw new KilnError('deadline-exceeded', message);
  }
}

/** Where QEMU hangs up, how it has ended, in its own last words. */
async function orLastWords(
  done: Promise<void>,
  step: string,
  { qmp, qemu }: { readonly qmp: QmpClient; readonly qemu: HelperProcess },
  signal: AbortSignal,
): Promise<void> {
  try {
    await abortable(done, signal);
  } catch (cause) {
    // QEMU closes its connection a moment before it has exited, and its exit says more.
    if (!qmp.closedByPeer) throw cause;
    const exit = await abortable(qemu.exited, signal);
    throw new KilnError('internal', `QEMU ended at ${step} ${describeExit(exit)}: ${qemu.lastWords()}`, { cause });
  }
}
