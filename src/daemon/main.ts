import { mkdirSync, openSync } from 'node:fs';
import { availableParallelism } from 'node:os';
import path from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { loadConfig } from '../config/config.ts';
import { KilnError } from '../errors.ts';
import { networks } from '../network/networks.ts';
import { createLogger, type DaemonLog, type Logger } from '../observe/logger.ts';
import { Metrics } from '../observe/metrics.ts';
import { parseAddress, serveMetrics } from '../observe/metrics-server.ts';
import { RootfsStore } from '../rootfs/index.ts';
import { BootSlots } from '../sandbox/boot-slots.ts';
import { GuestClocks } from '../sandbox/guest-clocks.ts';
import { Pods } from '../sandbox/pod.ts';
import { SandboxPool } from '../sandbox/pool.ts';
import { Readiness } from '../shim/control/readiness.ts';
import { controlSocketIsServed } from '../shim/control/server.ts';
import { flock } from '../sys/lock.ts';
import { NetworkNamespace } from '../sys/netns.ts';
import { TemplateStore } from '../template/store.ts';
import { kilnVersion } from '../version.ts';
import { adoptContainer, adoptSandbox } from './adopt.ts';
import { createContainer, keepPool, prepareExec } from './containers.ts';
import { Daemon } from './daemon.ts';
import { poolName } from './earlier.ts';
import { fileServers } from './file-servers.ts';
import { defaultGuestDir, standInProgram } from './installation.ts';
import { endRemains } from './remains.ts';
import { createSandbox } from './sandboxes.ts';
import { firecrackerCounters } from './vmm.ts';

/**
 * How long a new kilnd waits for one that is just ending: containers that are told to end at once, and a client that does
 * not read its output, may take some ten seconds. The launcher waits for a minute.
 */
const lockPatienceMs = 30_000;

/** Virtual machines that boot at a time: two, since one may wait for its disk while the other has the CPU. */
const bootsPerCpu = 2;

const readiness = Readiness.take(process.env);

async function main(): Promise<void> {
  if (process.getuid?.() !== 0) {
    throw new KilnError('permission-denied', 'kilnd must run as root', {
      hint: 'it starts VMs and mounts filesystems',
    });
  }
  const load = () => loadConfig({ env: process.env, guestDir: defaultGuestDir });
  const { config, paths } = load();
  mkdirSync(paths.stateDir, { recursive: true, mode: 0o711 });
  await takeLock(paths.stateDir);
  const log = createLogger({ stateDir: paths.stateDir, level: config.daemon.logLevel });
  const { logger } = log;
  logger.info({ version: kilnVersion, paths }, 'kilnd starts');
  process.on('uncaughtException', (error) => {
    logger.fatal({ err: error }, 'uncaught exception');
    process.exit(70);
  });
  process.on('SIGHUP', () => reopen(log));
  const rootfs = new RootfsStore({ cacheDir: paths.cacheDir, logger });
  const bootSlots = new BootSlots(bootsPerCpu * availableParallelism());
  const takeTurn = (signal: AbortSignal) => bootSlots.take(signal);
  const makeBlank = async (file: string, signal: AbortSignal) => {
    // As containers have it.
    const { writableSizeGib } = load().config.storage;
    await rootfs.makeBlank(file, { signal, writableSizeBytes: writableSizeGib * 2 ** 30 });
  };
  const templates = new TemplateStore({ cacheDir: paths.cacheDir, logger, takeTurn, makeBlank, endRemains });
  const poolDirectory = path.join(paths.stateDir, poolName);
  const pool = new SandboxPool({ directory: poolDirectory, templates, bootSlots, makeBlank, logger });
  const parking = NetworkNamespace.create();
  const clocks = new GuestClocks({ logger });
  const host = { rootfs, standInProgram, bootSlots, templates, pool, fileServers, parking, networks, clocks };
  const pods = new Pods();
  const installation = { host, pods, load };
  const { metricsAddress } = config.daemon;
  // They cost something, so only where somebody wants them.
  const metrics =
    metricsAddress === ''
      ? undefined
      : new Metrics({
          containers: () => daemon.containers,
          templates: () => ({ ...templates.counts }),
          pool: () => pool.status(),
          firecracker: () => firecrackerCounters.sums,
        });
  const daemon: Daemon = new Daemon({
    paths,
    // Who wants virtual machines to wait wants kilnd to.
    idleTimeoutMs: config.pool.min > 0 ? 0 : config.daemon.idleTimeoutS * 1000,
    createContainer: (request, context, signal) => createContainer(installation, request, context, signal),
    createSandbox: (request, context, signal) => createSandbox(installation, request, context, signal),
    adoptContainer: (state, context, signal) => adoptContainer(installation, state, context, signal),
    adoptSandbox: (context, signal) => adoptSandbox(installation, context, signal),
    prepareExec,
    onRestoring: (restored) => pods.settleAfter(restored, logger),
    collectGarbage: () => Promise.all([rootfs.collectGarbage(), templates.collectGarbage(config.template)]),
    status: () => ({ templates: templates.counts, pool: pool.status() }),
    onStarted: (timeline) => metrics?.noteStart(timeline),
    release: () => pool[Symbol.asyncDispose](),
    log,
    onStopped: () => {
      // Only where the stop came before the end of the start.
      readiness.failed(new KilnError('unavailable', 'kilnd was told to stop'));
      process.exit(0);
    },
  });
  for (const signal of ['SIGTERM', 'SIGINT'] as const) process.on(signal, () => void daemon.stop());
  try {
    await daemon.start();
  } catch (error) {
    logger.fatal({ err: error }, 'kilnd cannot start');
    throw error;
  }
  if (metrics !== undefined) await openMetrics(metrics, metricsAddress, logger);
  readiness.ready();
  if (config.pool.min > 0) await keepPool(installation, logger);
}

/** Where they cannot be served, containers are all the same. */
async function openMetrics(metrics: Metrics, address: string, logger: Logger): Promise<void> {
  try {
    await serveMetrics(metrics, parseAddress(address));
    logger.info({ address }, 'metrics are served');
  } catch (error) {
    logger.error({ err: error, address }, 'cannot serve metrics (daemon.metrics_address in the config file)');
  }
}

/** After a rotation of the log. Keeps the open file where there is no new one. */
function reopen(log: DaemonLog): void {
  try {
    log.reopen();
  } catch (error) {
    log.logger.error({ err: error }, 'cannot open the log anew');
  }
}

/**
 * One kilnd per state folder. The lock lasts as long as the process; its descriptor is never closed. Whoever holds it
 * and serves is refused at once; one that no longer serves is ending, and one that does not serve yet soon will.
 */
async function takeLock(stateDir: string): Promise<void> {
  const fd = openSync(path.join(stateDir, 'kilnd.lock'), 'a', 0o600);
  const deadline = Date.now() + lockPatienceMs;
  while (!flock(fd)) {
    if (Date.now() > deadline || (await controlSocketIsServed(stateDir))) {
      throw new KilnError('already-exists', `another kilnd runs with the state folder ${stateDir}`, {
        hint: 'give this one a state folder of its own with KILN_STATE_DIR',
      });
    }
    // flock(2) has no event, and a thread that blocks in it could not be called off.
    await delay(50);
  }
}

main().catch((error: unknown) => {
  readiness.failed(error);
  process.stderr.write(`kilnd: ${KilnError.from(error).userMessage}\n`);
  process.exit(1);
});
