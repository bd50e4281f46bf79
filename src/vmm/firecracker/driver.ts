import { KilnError } from '../../errors.ts';
import { adoptHelper } from '../../host/helper-process.ts';
import type { Vm, VmConfig, Vmm, VmRecord } from '../vmm.ts';
import { filesOf, listenAndKnock } from './agent-call.ts';
import { FirecrackerApi } from './api.ts';
import { configureAndStart } from './configure.ts';
import { withExitStatus } from './exit-status.ts';
import { roomFor } from './huge-pages.ts';
import { findJail } from './jail.ts';
import { memoryGrowth } from './memory.ts';
import { type FirecrackerHost, type FirecrackerOptions, thisHost } from './options.ts';
import { logName, openPlace } from './place.ts';
import { parseFirecrackerRecord } from './record.ts';
import { holdSocket } from './socket-path.ts';
import { startFirecracker } from './start.ts';
import { Telemetry } from './telemetry.ts';
import { templatesOf } from './templates.ts';
import { FirecrackerVm } from './vm.ts';

export type { FirecrackerHost, FirecrackerOptions, JailSettings } from './options.ts';

/** @param host another one than this, for tests */
export function createFirecracker(options: FirecrackerOptions, host: FirecrackerHost = thisHost): Vmm {
  const templates = templatesOf(options, host);
  return {
    name: 'firecracker',
    boot: (config, signal) => bootFirecracker(options, host, config, signal),
    adopt: (record, directory, signal) => adoptFirecracker({ ...host, ...options }, record, directory, signal),
    ...(templates === undefined ? {} : { templates }),
  };
}

async function bootFirecracker(
  options: FirecrackerOptions,
  host: FirecrackerHost,
  config: VmConfig,
  signal: AbortSignal,
): Promise<Vm> {
  const start = { options, host, config, when: 'at start' };
  return new FirecrackerVm(
    await startFirecracker(start, (started) => configureAndStart(started, config, options), signal),
  );
}

/** Takes over a VM whose kilnd is gone: its API is there, and the agent dials again. */
async function adoptFirecracker(
  { jails, devices, logger, count, hugePages }: FirecrackerHost & FirecrackerOptions,
  given: VmRecord,
  directory: string,
  signal: AbortSignal,
): Promise<Vm> {
  const record = parseFirecrackerRecord(given);
  await using stack = new AsyncDisposableStack();
  const { jail, memory, usedSlots, nics } = record;
  const place = stack.use(jail === undefined ? openPlace(directory) : findJail(directory, jail.uid, jails));
  const found = adoptHelper(record.firecracker, { directory, logName });
  if (found === undefined) {
    throw new KilnError('not-found', `Firecracker (pid ${record.firecracker.pid}) has ended`);
  }
  const firecracker = stack.use(withExitStatus(found));
  const api = stack.use(new FirecrackerApi(holdSocket(place.apiSocket.host)));
  const telemetry = stack.use(Telemetry.resume(place, { logger, ...(count === undefined ? {} : { count }) }));
  const { state } = await api.describe(signal);
  if (state !== 'Running') throw new KilnError('internal', `the VM does not run; Firecracker says "${state}"`);
  const files = stack.use(filesOf(place));
  const resources = stack.move();
  const accept = async (accepting: AbortSignal) => {
    return resources.use(await listenAndKnock(place)).accept(accepting);
  };
  const agent = { accept };
  const growth = memoryGrowth(api, memory, roomFor({ hugePages }, devices));
  const parts = { firecracker, api, place, telemetry, agent, files, nics, memory, growth, usedSlots, resources };
  return new FirecrackerVm(parts);
}
