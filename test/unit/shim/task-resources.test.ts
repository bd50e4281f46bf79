/** Pause, Resume, Stats, Update and TaskOOM of the task service. */
import { existsSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, describe, expect, it, onTestFinished } from 'vitest';
import * as v1 from '../../../gen/containerd/metrics_v1.ts';
import * as v2 from '../../../gen/containerd/metrics_v2.ts';
import { Status } from '../../../gen/containerd/task_types.ts';
import { encodeCreateOptions } from '../../../src/shim/create-options.ts';
import { hostCgroupMode } from '../../../src/shim/metrics.ts';
import { oomFileOf } from '../../../src/shim/oom-file.ts';
import { Gate } from './scripted-container.ts';
import { Bench, id } from './task-bench.ts';
import { errorOf } from './task-client.ts';

const benches: Bench[] = [];
afterEach(async () => {
  for (const made of benches.splice(0)) await made.server.close(0);
});

async function running(start?: Gate) {
  const made = new Bench();
  benches.push(made);
  const { container, events, slot, client } = made;
  if (start !== undefined) container.gates.start = start;
  await client.create();
  const started = client.start();
  return { container, events, slot, client, started, types: () => made.types };
}

describe('Pause and Resume', () => {
  it('show in State, and are told of', async () => {
    const { client, events, started, container } = await running();
    await started;
    const gate = new Gate();
    container.gates.pause = gate;
    const paused = client.pause();
    await gate.entered;
    container.state = { kind: 'pausing' };
    expect((await client.state()).status).toBe(Status.PAUSING);
    gate.open();
    await paused;
    expect((await client.state()).status).toBe(Status.PAUSED);
    await client.resume();
    expect((await client.state()).status).toBe(Status.RUNNING);
    expect(events.slice(2)).toEqual([
      { type: 'TaskPaused', message: { containerId: id } },
      { type: 'TaskResumed', message: { containerId: id } },
    ]);
  });

  it('in the wrong state are refused with the state, and not told of', async () => {
    const { client, started, types } = await running();
    await started;
    expect(await errorOf(client.resume())).toBe('FailedPrecondition: cannot resume container c1: it is running');
    await client.pause();
    expect(await errorOf(client.pause())).toBe('FailedPrecondition: cannot pause container c1: it is paused');
    await client.kill(9);
    expect(await errorOf(client.pause())).toBe('FailedPrecondition: cannot pause container c1: it is stopped');
    expect(types()).toEqual(['TaskCreate', 'TaskStart', 'TaskPaused', 'TaskExit']);
  });
});

describe('Stats', () => {
  it("are metrics in the words of the host's cgroups", async () => {
    const { client, started } = await running();
    await started;
    const { stats } = await client.stats();
    if (stats === undefined) throw new Error('no stats');
    if (hostCgroupMode() === 'unified') {
      expect(stats.typeUrl).toBe('io.containerd.cgroups.v2.Metrics');
      expect(v2.Metrics.decode(stats.value).pids).toEqual({ current: 3n, limit: 50n });
    } else {
      expect(stats.typeUrl).toBe('io.containerd.cgroups.v1.Metrics');
      expect(v1.Metrics.decode(stats.value).pids).toEqual({ current: 3n, limit: 50n });
    }
  });

  it('are answered while a Delete and a Kill are under way', async () => {
    const { client, container, started } = await running();
    await started;
    container.gates.kill = new Gate();
    const killed = client.kill(9);
    await container.gates.kill.entered;
    expect((await client.stats()).stats?.typeUrl).toMatch(/^io\.containerd\.cgroups\./);
    container.gates.kill.open();
    await killed;
    container.gates.delete = new Gate();
    const deleted = client.delete();
    await container.gates.delete.entered;
    expect((await client.stats()).stats?.typeUrl).toMatch(/^io\.containerd\.cgroups\./);
    container.gates.delete.open();
    await deleted;
    expect(await errorOf(client.stats())).toBe('NotFound: container c1 does not exist');
  });
});

describe('Update', () => {
  it('takes LinuxResources by either prefix of its type', async () => {
    const { client, container, started } = await running();
    await started;
    await client.update({ pids: { limit: 7 } });
    const value = Buffer.from('{"pids":{"limit":8}}');
    const typeUrl = 'types.containerd.io/opencontainers/runtime-spec/1/LinuxResources';
    await client.update({}, { resources: { typeUrl, value } });
    expect(container.calls.filter((call) => call.startsWith('update'))).toEqual([
      'update {"pids":{"limit":7}}',
      'update {"pids":{"limit":8}}',
    ]);
  });

  it('of anything else is refused', async () => {
    const { client, started } = await running();
    await started;
    const windows = {
      typeUrl: 'types.containerd.io/opencontainers/runtime-spec/1/WindowsResources',
      value: Buffer.of(),
    };
    expect(await errorOf(client.update({}, { resources: windows }))).toMatch(
      /^InvalidArgument: container c1: cannot update resources of type "types.*WindowsResources", only runtime-spec/,
    );
    expect(await errorOf(client.update({}, { resources: undefined }))).toContain('resources of type ""');
    expect(await errorOf(client.update({ pids: 7 }))).toMatch(/^InvalidArgument: resources: pids: /);
  });

  it('of a task that has stopped is refused', async () => {
    const { client, container, started } = await running();
    await started;
    container.end(0);
    expect(await errorOf(client.update({}))).toBe('FailedPrecondition: cannot update container c1: it is stopped');
  });
});

describe('TaskOOM', () => {
  it('comes before the exit, also where both come at once, and never before the start', async () => {
    const gate = new Gate();
    const { client, container, started, types } = await running(gate);
    await gate.entered;
    container.oom.count(1);
    container.oom.count(1);
    gate.open();
    await started;
    expect(types()).toEqual(['TaskCreate', 'TaskStart', 'TaskOOM']);
    container.oom.count(4);
    container.end(137);
    await client.wait();
    await client.delete();
    expect(types().slice(3)).toEqual(['TaskOOM', 'TaskExit', 'TaskDelete']);
  });

  it('is noted in the file that the command line names, by then; a place that cannot be written to is logged', async () => {
    const directory = mkdtempSync(join(tmpdir(), 'kiln-oom-'));
    onTestFinished(() => rmSync(directory, { recursive: true }));
    const spec = { annotations: { 'io.container.manager': 'cri-o' } };
    for (const bundle of [directory, join(directory, 'missing')]) {
      const made = new Bench();
      benches.push(made);
      await made.client.create({ options: encodeCreateOptions({ processPid: 1, oomFile: oomFileOf(bundle, spec) }) });
      await made.client.start();
      expect(existsSync(join(bundle, 'oom'))).toBe(false);
      made.container.oom.count(1);
      expect(existsSync(join(bundle, 'oom'))).toBe(bundle === directory);
      const warnings = made.log.map(({ msg }) => msg).filter((message) => message.startsWith('cannot note'));
      expect(warnings).toHaveLength(bundle === directory ? 0 : 1);
    }
    expect(oomFileOf(directory, {})).toBe('');
    expect(oomFileOf(directory, { annotations: { 'io.container.manager': 'someone' } })).toBe('');
  });

  it('is not told of once containerd has declared the task dead', async () => {
    const { container, slot, started, types } = await running();
    await started;
    await slot.forceDelete();
    container.oom.count(1);
    expect(types()).toEqual(['TaskCreate', 'TaskStart']);
  });
});
