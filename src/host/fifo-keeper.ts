import { rmSync } from 'node:fs';
import path from 'node:path';
import { startHelper } from './helper-process.ts';

export interface FifoKeeperOptions {
  /** The private directory of the container or exec. */
  readonly directory: string;
  /** Open ends of FIFOs; they stay the caller's to close. */
  readonly fds: readonly number[];
}

export interface FifoKeeper {
  /** Closes the ends that it keeps. Safe to call twice. */
  release(): Promise<void>;
}

/**
 * Starts a process that holds ends of FIFOs open. A FIFO ends for its reader when the last write end is closed, so
 * without it a killed kilnd would end every logger, which the next kilnd could then not take over.
 */
export async function startFifoKeeper({ directory, fds }: FifoKeeperOptions): Promise<FifoKeeper> {
  const logName = 'fifo-keeper.log';
  const removeLog = () => rmSync(path.join(directory, logName), { force: true });
  try {
    const helper = await startHelper({
      program: 'sleep',
      args: ['infinity'],
      directory,
      logName,
      title: 'the keeper of the FIFOs',
      hint: 'sleep(1) is part of coreutils',
      inherit: fds,
    });
    return { release: () => helper.kill().then(removeLog) };
  } catch (error) {
    removeLog();
    throw error;
  }
}
