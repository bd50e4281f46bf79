import { mkdirSync, openSync } from 'node:fs';
import path from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { loadConfig } from '../config/config.ts';
import { KilnError } from '../errors.ts';
import { createLogger } from '../observe/logger.ts';
import { RootfsStore } from '../rootfs/index.ts';
import { controlCall } from '../shim/control/client.ts';
import { Readiness } from '../shim/control/readiness.ts';
import { flock } from '../sys/lock.ts';
import { kilnVersion } from '../version.ts';
import { Daemon } from './daemon.ts';
import { defaultGuestDir, standInProgram } from './installation.ts';

/** How long a new kilnd waits for one that is just ending. */
const lockPatienceMs = 10_000;

const readiness = Readiness.take(process.env);

async function main(): Promise<void> {
  if (process.getuid?.() !== 0) {
    throw new KilnError('permission-denied', 'kilnd must run as root', {
      hint: 'it starts VMs and mounts filesystems',
    });
  }
  const { config, paths } = loadConfig({ env: process.env, guestDir: defaultGuestDir });
  mkdirSync(paths.stateDir, { recursive: true, mode: 0o711 });
  await takeLock(paths.stateDir);
  const log = createLogger({ stateDir: paths.stateDir, level: config.daemon.logLevel });
  const { logger } = log;
  logger.info({ version: kilnVersion, pid: process.pid, paths }, 'kilnd starts');
  const rootfs = new RootfsStore({ cacheDir: paths.cacheDir, logger });
  const daemon = new Daemon({
    paths,
    idleTimeoutMs: config.daemon.idleTimeoutS * 1000,
    host: { rootfs, standInProgram },
    log,
    onStopped: () => process.exit(0),
  });
  for (const signal of ['SIGTERM', 'SIGINT'] as const) process.on(signal, () => void daemon.stop());
  process.on('uncaughtException', (error) => {
    logger.fatal({ err: error }, 'uncaught exception');
    process.exit(70);
  });
  await daemon.start();
  readiness.ready();
}

/** One kilnd per state folder. The lock lasts as long as the process; its descriptor is never closed. */
async function takeLock(stateDir: string): Promise<void> {
  const fd = openSync(path.join(stateDir, 'kilnd.lock'), 'a', 0o600);
  const deadline = Date.now() + lockPatienceMs;
  while (!flock(fd)) {
    if (Date.now() > deadline || (await isServed(stateDir))) {
      throw new KilnError('already-exists', `another kilnd runs with the state folder ${stateDir}`, {
        hint: 'give this one a state folder of its own with KILN_STATE_DIR',
      });
    }
    await delay(50);
  }
}

async function isServed(stateDir: string): Promise<boolean> {
  try {
    await controlCall(stateDir, { kind: 'status' });
    return true;
  } catch {
    return false;
  }
}

main().catch((error: unknown) => {
  readiness.failed(error);
  process.stderr.write(`kilnd: ${KilnError.from(error).userMessage}\n`);
  process.exit(1);
});
