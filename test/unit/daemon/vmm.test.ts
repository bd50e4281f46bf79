import { mkdirSync } from 'node:fs';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { defaultConfig, type KilnConfig } from '../../../src/config/config.ts';
import { jailSettings, selectVmm, vmmNamed } from '../../../src/daemon/vmm.ts';
import { loggerTo } from '../../../src/observe/logger.ts';
import { parking, Workspace } from '../vmm/workspace.ts';

let workspace: Workspace;
let log: Record<string, unknown>[];
const logger = loggerTo({ write: (line) => void log.push(JSON.parse(line)) }, 'trace');
const services = { logger, parking };
beforeEach(() => {
  workspace = new Workspace();
  log = [];
});
afterEach(() => workspace[Symbol.dispose]());

function config(vm: Partial<KilnConfig['vm']>, storage: Partial<KilnConfig['storage']> = {}): KilnConfig {
  const storageWithDefaults = { ...defaultConfig.storage, ...storage };
  return { ...defaultConfig, vm: { ...defaultConfig.vm, ...vm }, storage: storageWithDefaults };
}

function withKvm() {
  mkdirSync(workspace.path('modules/kvm_intel'), { recursive: true });
  workspace.file('kvm');
  return workspace.devices();
}

test('the choice and its reason are told once at info level', async () => {
  const wanted = config({ firecracker: workspace.firecracker('version=1.15.7') });
  for (const _ of [1, 2]) expect((await selectVmm(wanted, services, withKvm())).name).toBe('firecracker');
  const reason = 'Firecracker 1.15.7 and hardware KVM are there';
  const told = log.filter(({ level }) => level === 'info');
  expect(told).toMatchObject([{ vmm: 'firecracker', reason, msg: 'chose the virtual machine monitor' }]);
  const other = config({ firecracker: '/no/firecracker', accelerator: 'tcg' });
  expect((await selectVmm(other, services, withKvm())).name).toBe('qemu');
  expect(log).toContainEqual(expect.objectContaining({ vmm: 'qemu', reason: 'vm.accelerator = "tcg"' }));
});

test.each([
  ['vm.boot_timer', config({ vmm: 'qemu', bootTimer: true })],
  ['vm.huge_pages', config({ vmm: 'qemu', hugePages: true })],
  ['memory that grows (memory_max_mib)', config({ vmm: 'qemu', memoryMaxMib: 1024 })],
  ['a limit of network bandwidth (network_mib_per_s)', config({ vmm: 'qemu', networkMibPerS: 1 })],
  ['a limit of disk bandwidth (disk_mib_per_s)', config({ vmm: 'qemu' }, { diskMibPerS: 1 })],
  ['a limit of disk requests (disk_ops_per_s)', config({ vmm: 'qemu' }, { diskOpsPerS: 1 })],
])('%s is refused where QEMU runs the VM, with the reason why that is so', async (what, wanted) => {
  await expect(selectVmm(wanted, services, workspace.devices())).rejects.toMatchObject({
    code: 'failed-precondition',
    message: `${what} needs Firecracker, but this VM runs under QEMU: qemu is asked for`,
  });
});

test('a jail is what there is a jailer for, and without one none, with a warning', () => {
  const jailer = workspace.jailer('jail');
  const uids = { first: 7000, count: 9 };
  const jail = (vm: Partial<KilnConfig['vm']>) => jailSettings(config({ jailer, ...vm }).vm, logger);
  for (const how of ['auto', 'on'] as const) {
    expect(jail({ jail: how, jailUidFirst: 7000, jailUids: 9 })).toEqual({ jailer, uids });
  }
  expect(jail({ jail: 'off' })).toBeUndefined();
  expect(log).toEqual([]);
  for (const _ of [1, 2]) expect(jail({ jailer: 'no-such-jailer' })).toBeUndefined();
  const reason = 'there is no program "no-such-jailer" (vm.jailer)';
  expect(log).toMatchObject([{ level: 'warn', reason, msg: 'Firecracker runs without a jail, as root' }]);
});

test('a jail that is demanded and cannot be had is an error, but not for a VM that runs already', async () => {
  const wanted = config({ jail: 'on', jailer: 'no-such-jailer' });
  expect(() => jailSettings(wanted.vm, logger)).toThrow(
    expect.objectContaining({
      code: 'failed-precondition',
      message: 'vm.jail is "on", but there is no program "no-such-jailer" (vm.jailer)',
    }),
  );
  const taking = vmmNamed('firecracker', wanted, services).adopt({}, workspace.sandbox, new AbortController().signal);
  await expect(taking).rejects.toMatchObject({ code: 'invalid-argument' });
});
