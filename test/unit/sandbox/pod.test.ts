import { existsSync, mkdirSync, readFileSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterEach, describe, expect, it, vi } from 'vitest';
import { loggerTo } from '../../../src/observe/logger.ts';
import { Pod, Pods } from '../../../src/sandbox/pod.ts';
import { type PodRecord, readContainerRecord } from '../../../src/sandbox/record.ts';
import type { Sandbox } from '../../../src/sandbox/sandbox.ts';
import { canMakeNetns, Workbench } from './workbench.ts';

const lines: string[] = [];
const logger = loggerTo({ write: (line) => void lines.push(line) }, 'warn');
afterEach(() => void lines.splice(0));

interface Guest {
  containers(): Promise<readonly string[]>;
  removeContainer?(id: string): Promise<void>;
  detachUnknown?(): Promise<void>;
}

function podOf(directory: string, guest: Guest, end = async () => {}): Pod {
  const sandbox = {
    guest,
    vm: { wait: () => new Promise(() => {}) },
    detachUnknown: async () => guest.detachUnknown?.(),
    [Symbol.asyncDispose]: end,
  } as unknown as Sandbox;
  return new Pod({ directory, sandbox, pid: 1, save: () => {}, logger });
}

const patient = new AbortController().signal;
const nothing: Guest = { containers: async () => [] };

describe('pods that were taken over', () => {
  it('get new containers when their own guest is cleared, whatever the others do', async () => {
    const answer = Promise.withResolvers<readonly string[]>();
    const silent = podOf('/silent', { containers: () => answer.promise });
    const well = podOf('/well', nothing);
    const pods = new Pods();
    pods.add('/silent', Promise.resolve(silent));
    pods.add('/well', Promise.resolve(well));
    pods.settleAfter(Promise.resolve(), logger);
    const waiting = pods.findForNew('/silent', 'silent', patient);
    expect(await Promise.race([waiting, pods.findForNew('/well', 'well', patient)])).toBe(well);
    answer.reject(new Error('the guest hangs'));
    expect(await waiting).toBe(silent);
    expect(lines.join()).toContain('cannot remove from a pod what no kilnd knows');
  });
});

it('a new container that nobody wants any more does not wait for the guest of its pod', async () => {
  const pods = new Pods();
  pods.add('/silent', Promise.resolve(podOf('/silent', { containers: () => new Promise(() => {}) })));
  pods.settleAfter(Promise.resolve(), logger);
  const given = new AbortController();
  const waiting = pods.findForNew('/silent', 'silent', given.signal);
  given.abort(new Error('nobody wants it'));
  await expect(waiting).rejects.toThrow('nobody wants it');
});

it('of a pod that is taken over, all containers are removed that no kilnd knows, and their disks when all are', async () => {
  const removed: string[] = [];
  let stays = true;
  const pod = podOf('/c/p', {
    containers: async () => ['stays', 'goes'],
    removeContainer: async (id) => {
      if (id === 'stays' && stays) throw new Error('its disk is in use');
      removed.push(id);
    },
    detachUnknown: async () => void removed.push('disks'),
  });
  await expect(pod.removeUnknown()).rejects.toThrow('its disk is in use');
  expect(removed).toEqual(['goes']);
  stays = false;
  await pod.removeUnknown();
  expect(removed).toEqual(['goes', 'stays', 'goes', 'disks']);
});

describe('a pod whose VM cannot be released', () => {
  it('gives back what was held for its end', async () => {
    const pod = podOf('/c/p', nothing, () => Promise.reject(new Error('EBUSY: jail')));
    let released = 0;
    const held = {
      [Symbol.asyncDispose]: async () => {
        released += 1;
      },
    };
    pod.holdUntilEnd(held);
    await expect(pod.end()).rejects.toThrow('EBUSY: jail');
    expect(released).toBe(1);
    pod.holdUntilEnd(held);
    expect(released).toBe(2);
  });

  it('tells what cannot be given back after its end, and lives on', async () => {
    const pod = podOf('/c/p', nothing);
    await pod.end();
    pod.holdUntilEnd({ [Symbol.asyncDispose]: () => Promise.reject(new Error('EBUSY: rw.ext4')) });
    await Promise.resolve();
    await Promise.resolve();
    expect(lines.join()).toContain('EBUSY: rw.ext4');
  });
});

describe.skipIf(!canMakeNetns)('the container that stands for a pod', () => {
  it('says when nothing is left of it, so that kilnd forgets the pod', async () => {
    await using bench = new Workbench({ preparePod: (_call, done) => done(null, {}) });
    let gone = false;
    const { container } = await bench.createPod(() => {
      gone = bench.clean;
    });
    expect(gone).toBe(false);
    await container.delete();
    expect(gone).toBe(true);
  });

  it("answers for the guest until it is stopped, which is nobody's failure", async () => {
    await using bench = new Workbench({ preparePod: (_call, done) => done(null, {}) });
    const { container } = await bench.createPod(() => {});
    await container.start();
    await container.ping();
    expect(bench.agent.calls).toContain('listContainers');
    expect(container.describe()).toMatchObject({ processStatus: 'running', containers: [], vm: { vcpus: 2 } });
    await container.stop(100);
    await container.stop();
    expect((await container.exit.wait()).status).toBe(0);
    expect(container.describe()).toMatchObject({ processStatus: 'stopped' });
    await expect(container.ping()).rejects.toMatchObject({ code: 'failed-precondition' });
    await container.destroy();
  });

  it('does not answer for a guest that does not', async () => {
    await using bench = new Workbench({
      preparePod: (_call, done) => done(null, {}),
      listContainers: (_call, done) => done({ code: 14, details: 'no' }),
    });
    const { container } = await bench.createPod(() => {});
    await expect(container.ping()).rejects.toMatchObject({ code: 'unavailable' });
    await container.destroy();
  });

  it('has the files of the pod, which are written down, and go with it', async () => {
    await using bench = new Workbench({ preparePod: (_call, done) => done(null, {}) });
    const files = { hostname: 'web-0\n', hosts: '127.0.0.1 localhost\n', 'resolv.conf': '' };
    const at = join(bench.root, 'etc');
    // As a kilnd that was killed leaves it.
    mkdirSync(at);
    writeFileSync(join(at, 'hostname'), 'web');
    const { container, pod } = await bench.createPod(() => {}, { directory: at, texts: files });
    expect(pod.filesDirectory).toBe(at);
    expect((readContainerRecord(bench.directory) as PodRecord).filesDirectory).toBe(at);
    for (const [name, text] of Object.entries(files)) {
      expect(readFileSync(join(at, name), 'utf8')).toBe(text);
      expect(statSync(join(at, name)).mode & 0o777).toBe(0o644);
    }
    await container.destroy();
    expect(existsSync(at)).toBe(false);
  });

  it('has written down that the guest has its volumes before a container has them', async () => {
    const recorded = () => (readContainerRecord(bench.directory) as PodRecord).volumes;
    let seen: unknown;
    const writes = async () => {
      await vi.waitFor(() => expect(recorded()?.connected).toBe(true));
      seen = recorded();
    };
    await using bench = new Workbench({
      createContainer: (_call, done) => void writes().then(() => done(null, { pid: 12 }), done),
    });
    bench.fileServers = {
      start: async () => ({
        ended: new Promise(() => {}),
        add: async () => [0],
        remove: async () => {},
        serve: async () => {},
        record: () => ({ pid: 7 }),
        [Symbol.asyncDispose]: async () => {},
      }),
      adopt: () => Promise.reject(new Error('nothing is taken over here')),
    };
    bench.vmHooks.acceptFiles = async () => 12;
    const { container, pod } = await bench.createPod(() => {});
    bench.volumes = [{ source: bench.root, destination: '/data', readOnly: 'no', recursive: true, follows: false }];
    const member = await bench.createMember(pod);
    expect(seen).toEqual({ server: { pid: 7 }, connected: true });
    await member.destroy();
    await container.destroy();
  });
});
