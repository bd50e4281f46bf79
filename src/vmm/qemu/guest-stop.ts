import type { QmpClient } from './qmp.ts';

/** The states of a VM that will not run again (qapi/run-state.json, RunState). */
const finalStates = ['shutdown', 'guest-panicked', 'internal-error', 'io-error'];

/**
 * Resolves when the guest has stopped, and never when QEMU ends before.
 *
 * @param before `unknown` where the guest may have stopped before QEMU had anybody to tell; to be called after
 *   `QmpClient.negotiate` then, whose answer need not have come
 */
export function guestStop(qmp: QmpClient, before: 'unknown' | 'nothing'): Promise<'guest'> {
  return new Promise((resolve) => {
    const ask = async () => {
      const answer = (await qmp.execute('query-status')) as { status?: string } | null;
      if (finalStates.includes(answer?.status ?? '')) resolve('guest');
    };
    // One question at a time, and one more when something happened since: a QEMU that is not ours any more can send
    // events without end and answer none.
    let asking = false;
    let again = false;
    const look = async (): Promise<void> => {
      again = asking;
      if (asking) return;
      asking = true;
      try {
        await ask();
      } finally {
        asking = false;
      }
      if (again) await look();
    };
    qmp.on('event', (name) => {
      if (name === 'SHUTDOWN' || name === 'GUEST_PANICKED') resolve('guest');
      // Also a pause that was asked for, and an error of KVM's, which has no event of its own.
      else if (name === 'STOP') look().catch(() => {});
    });
    if (before === 'unknown') look().catch(() => {});
  });
}
