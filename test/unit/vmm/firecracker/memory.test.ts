import { mkdirSync, rmSync } from 'node:fs';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { createFirecracker, type FirecrackerOptions } from '../../../../src/vmm/firecracker/driver.ts';
import type { Vm } from '../../../../src/vmm/vmm.ts';
import { noLogger, parking, playedTaps, Workspace } from '../workspace.ts';
import { FakeKernel } from './fake-kernel.ts';

/** Memory that a VM gets while it runs, with Firecracker played by a program of ours. */
let workspace: Workspace;
let vms: Vm[];
beforeEach(() => {
  workspace = new Workspace();
  vms = [];
  mkdirSync(workspace.path('modules/kvm_intel'), { recursive: true });
  workspace.file('kvm');
});
afterEach(async () => {
  for (const vm of vms) await vm.kill();
  workspace[Symbol.dispose]();
});

const never = new AbortController().signal;

function driver(mode: string, options: Partial<FirecrackerOptions> = {}) {
  const defaults = {
    jail: () => undefined,
    parking,
    hugePages: false,
    bootTimer: false,
    memoryMaxMib: 1000,
    diskLimits: { bytesPerS: 0, opsPerS: 0 },
    networkLimits: { bytesPerS: 0, opsPerS: 0 },
  };
  const jails = { kernel: new FakeKernel(), claims: workspace.path('claims'), mounts: workspace.file('mounts') };
  const host = { devices: workspace.devices(), jails, makeTaps: playedTaps };
  return createFirecracker(
    { firecracker: workspace.firecracker(mode), logger: noLogger, ...defaults, ...options },
    host,
  );
}

async function boot(mode: string, options: Partial<FirecrackerOptions> = {}): Promise<Vm> {
  const vm = await driver(mode, options).boot(workspace.vm({ memoryMib: 256 }), never);
  vms.push(vm);
  return vm;
}

const requests = (name: string) =>
  workspace.firecrackerRequests().flatMap((request) => (request.name === name ? [request.body] : []));

describe('a VM that may grow', () => {
  test('has the rest of its memory ready from the start, and a kernel that uses what comes', async () => {
    const vm = await boot('running');
    // 744 MiB are missing, which are six slots.
    expect(requests('PUT /hotplug/memory')).toEqual([{ total_size_mib: 768 }]);
    expect(vm.memoryGrowth?.limitMib).toBe(256 + 768);
    const [{ boot_args: words }] = requests('PUT /boot-source') as [{ boot_args: string }];
    expect(words.split(' ')).toContain('memhp_default_state=online');
    expect(words.split(' ')).toContain('kiln.modules=virtio_balloon,virtio_mem');
  });

  test('grows by whole blocks, and is not done before the guest has taken them', async () => {
    const vm = await boot('running');
    await vm.memoryGrowth?.growTo(701);
    expect(requests('PATCH /hotplug/memory')).toEqual([{ requested_size_mib: 446 }]);
    // By 128 MiB between two looks.
    expect(requests('GET /hotplug/memory').length).toBeGreaterThan(4);
  });

  test('that is asked for less than it has keeps it, also when both are asked for at once', async () => {
    const vm = await boot('running');
    await Promise.all([vm.memoryGrowth?.growTo(600), vm.memoryGrowth?.growTo(300)]);
    await vm.memoryGrowth?.growTo(200);
    expect(requests('PATCH /hotplug/memory')).toEqual([{ requested_size_mib: 344 }]);
  });

  test("fails with Firecracker's words where the guest has no driver", async () => {
    const vm = await boot('no-memory-driver');
    await expect(vm.memoryGrowth?.growTo(300)).rejects.toMatchObject({
      code: 'internal',
      message: 'Firecracker refused PATCH /hotplug/memory: Device is not active',
      hint: expect.stringContaining('CONFIG_VIRTIO_MEM'),
    });
  });

  test('fails when the guest does not take it, and asks for it no more', async () => {
    const vm = await boot('takes-no-memory');
    await expect(vm.memoryGrowth?.growTo(300)).rejects.toMatchObject({
      code: 'deadline-exceeded',
      message: 'the guest has taken 0 of 44 MiB of further memory in 5 s',
    });
    expect(requests('PATCH /hotplug/memory')).toEqual([{ requested_size_mib: 44 }, { requested_size_mib: 0 }]);
  });

  test('of huge pages takes none that the host does not have', async () => {
    workspace.file('free_hugepages', '128');
    const vm = await boot('running', { hugePages: true });
    await vm.memoryGrowth?.growTo(300);
    workspace.file('free_hugepages', '10');
    await expect(vm.memoryGrowth?.growTo(400)).rejects.toMatchObject({
      code: 'resource-exhausted',
      message: 'vm.huge_pages is set, but the host has 10 free pages of 2 MiB, and the VM needs 50',
    });
  });

  test('grows under the next kilnd from what it had reached', async () => {
    const made = driver('running');
    const vm = await made.boot(workspace.vm({ memoryMib: 256 }), never);
    vms.push(vm);
    await vm.memoryGrowth?.growTo(384);
    const adopted = await made.adopt(JSON.parse(JSON.stringify(vm.record())), workspace.sandbox, never);
    expect(adopted.memoryGrowth?.limitMib).toBe(1024);
    await adopted.memoryGrowth?.growTo(300);
    await adopted.memoryGrowth?.growTo(512);
    expect(requests('PATCH /hotplug/memory')).toEqual([{ requested_size_mib: 128 }, { requested_size_mib: 256 }]);
  });

  test('can be a template, whose clones grow', async () => {
    const { templates } = driver('running');
    const template = workspace.path('template');
    const directory = path.join(template, 'vm');
    mkdirSync(directory, { recursive: true });
    const shape = { memoryMib: 256 };
    const saved = await templates?.boot(workspace.vm({ ...shape, directory }), template, never);
    await saved?.save(never);
    await saved?.kill();
    rmSync(workspace.path('firecracker.requests'));
    const clone = await templates?.restore(workspace.vm(shape), template, never);
    if (clone === undefined) throw new Error('no templates');
    vms.push(clone);
    await clone.memoryGrowth?.growTo(512);
    expect(requests('PUT /hotplug/memory')).toEqual([]);
    expect(requests('PATCH /hotplug/memory')).toEqual([{ requested_size_mib: 256 }]);
  });

  test('is another template than one that may not', () => {
    const settings = [0, 256, 257, 1000].map((memoryMaxMib) => {
      const [, , ...rest] =
        driver('running', { memoryMaxMib }).templates?.fingerprint(workspace.vm({ memoryMib: 256 })) ?? [];
      return rest.join();
    });
    expect(new Set(settings).size).toBe(3);
  });
});

describe('a VM keeps the memory of its start', () => {
  test.each([
    ['where nothing more is asked for', 'running', 0],
    ['where it has as much as may be', 'running', 256],
    ['with a Firecracker before 1.14', 'version=1.13.1', 1000],
  ])('%s', async (_why, mode, memoryMaxMib) => {
    const vm = await boot(mode, { memoryMaxMib });
    expect(vm.memoryGrowth).toBeNull();
    expect(requests('PUT /hotplug/memory')).toEqual([]);
    expect(JSON.stringify(requests('PUT /boot-source'))).not.toContain('memhp');
  });

  test('that an earlier kilnd has written down without any', async () => {
    const made = driver('running', { memoryMaxMib: 0 });
    const vm = await made.boot(workspace.vm(), never);
    vms.push(vm);
    const { memory: _memory, ...earlier } = vm.record();
    const adopted = await made.adopt(JSON.parse(JSON.stringify(earlier)), workspace.sandbox, never);
    expect(adopted.memoryGrowth).toBeNull();
  });
});
