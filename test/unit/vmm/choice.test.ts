import { mkdirSync, readFileSync } from 'node:fs';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { chooseVmm, type Wishes } from '../../../src/vmm/choice.ts';
import { Workspace } from './workspace.ts';

let workspace: Workspace;
beforeEach(() => {
  workspace = new Workspace();
});
afterEach(() => workspace[Symbol.dispose]());

function choose(wishes: Partial<Wishes>, kvm = true) {
  if (kvm) {
    mkdirSync(workspace.path('modules/kvm_amd'), { recursive: true });
    workspace.file('kvm');
  }
  const all = {
    vmm: 'auto',
    firecracker: 'no-such-firecracker',
    accelerator: 'auto',
    channel: 'auto',
    ...wishes,
  } as const;
  return chooseVmm(all, workspace.devices());
}

test('Firecracker is chosen where it is there, is supported, and has hardware', async () => {
  expect(await choose({ firecracker: workspace.firecracker('running') })).toEqual({
    name: 'firecracker',
    reason: 'Firecracker 1.16.1 and hardware KVM are there',
  });
});

test('QEMU is chosen where there is no hardware', async () => {
  expect(await choose({ firecracker: workspace.firecracker('running') }, false)).toEqual({
    name: 'qemu',
    reason: 'Firecracker needs hardware KVM, but none of the kernel modules kvm_intel, kvm_amd is loaded',
  });
});

test('QEMU is chosen where there is no Firecracker, or an old one, or something else', async () => {
  expect(await choose({})).toEqual({
    name: 'qemu',
    reason: 'there is no program "no-such-firecracker" (vm.firecracker)',
  });
  const old = workspace.firecracker('version=1.12.0');
  expect(await choose({ firecracker: old })).toEqual({
    name: 'qemu',
    reason: `version 1.12.0 of ${old} is not supported`,
  });
  expect(await choose({ firecracker: '/bin/true' })).toMatchObject({
    reason: 'version unknown of /bin/true is not supported',
  });
  expect(await choose({ firecracker: '/bin/false' })).toMatchObject({
    reason: expect.stringMatching(/^version unknown \(Command failed: .*\) of \/bin\/false is not supported$/),
  });
});

test('a program that was replaced is asked again', async () => {
  expect(await choose({ firecracker: workspace.firecracker('version=1.12.0') })).toMatchObject({ name: 'qemu' });
  expect(await choose({ firecracker: workspace.firecracker('version=1.14.0') })).toMatchObject({ name: 'firecracker' });
});

test('a program is asked once, but again after it has failed to answer', async () => {
  const count = `echo >>${workspace.path('asked')}`;
  const answers = workspace.program('vmm', `#!/bin/sh\n${count}; echo 'Firecracker v1.16.1'\n`);
  for (const _ of [1, 2]) expect(await choose({ firecracker: answers })).toMatchObject({ name: 'firecracker' });
  expect(readFileSync(workspace.path('asked'), 'utf8')).toBe('\n');
  const fails = workspace.program('other', `#!/bin/sh\n${count}; exit 1\n`);
  for (const _ of [1, 2]) expect(await choose({ firecracker: fails })).toMatchObject({ name: 'qemu' });
  expect(readFileSync(workspace.path('asked'), 'utf8')).toBe('\n\n\n');
});

test('what only QEMU has chooses QEMU', async () => {
  const firecracker = workspace.firecracker('running');
  expect(await choose({ firecracker, accelerator: 'tcg' })).toEqual({ name: 'qemu', reason: 'vm.accelerator = "tcg"' });
  expect(await choose({ firecracker, channel: 'virtio-serial' })).toMatchObject({
    reason: 'vm.channel = "virtio-serial"',
  });
  expect(await choose({ firecracker, channel: 'hybrid-vsock' })).toMatchObject({ name: 'firecracker' });
});

test.each(['qemu', 'firecracker'] as const)('%s is chosen where it is asked for, whatever the host', async (vmm) => {
  expect(await choose({ vmm }, false)).toEqual({ name: vmm, reason: `${vmm} is asked for` });
});
