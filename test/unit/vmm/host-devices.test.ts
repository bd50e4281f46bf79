import { mkdirSync } from 'node:fs';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { KilnError } from '../../../src/errors.ts';
import { chooseChannel } from '../../../src/vmm/channel.ts';
import { chooseAccelerator, hostTscKhz } from '../../../src/vmm/qemu/accelerator.ts';
import { Workspace } from './workspace.ts';

let workspace: Workspace;
beforeEach(() => {
  workspace = new Workspace();
});
afterEach(() => workspace[Symbol.dispose]());

function load(module: string): void {
  mkdirSync(workspace.path(`modules/${module}`), { recursive: true });
}

function thrownBy(action: () => unknown): KilnError {
  try {
    action();
  } catch (error) {
    if (error instanceof KilnError) return error;
    throw error;
  }
  throw new Error('nothing was thrown');
}

describe('the accelerator', () => {
  test.each(['kvm_intel', 'kvm_amd'])('is KVM where %s is loaded and /dev/kvm can be opened', (module) => {
    load(module);
    workspace.file('kvm');
    expect(chooseAccelerator('auto', workspace.devices()).accelerator).toBe('kvm');
    expect(chooseAccelerator('kvm', workspace.devices()).accelerator).toBe('kvm');
  });

  test('is TCG without /dev/kvm, and says so', () => {
    load('kvm_intel');
    expect(chooseAccelerator('auto', workspace.devices())).toEqual({
      accelerator: 'tcg',
      reason: `${workspace.path('kvm')} cannot be opened: ENOENT`,
    });
  });

  test('is TCG under kvm_pvm, although there is a /dev/kvm', () => {
    load('kvm');
    load('kvm_pvm');
    workspace.file('kvm');
    const { accelerator, reason } = chooseAccelerator('auto', workspace.devices());
    expect(accelerator).toBe('tcg');
    expect(reason).toBe('none of the kernel modules kvm_intel, kvm_amd is loaded');
  });

  test('needs no vendor module on arm64', () => {
    workspace.file('kvm');
    expect(chooseAccelerator('auto', workspace.devices({ arch: 'arm64' })).accelerator).toBe('kvm');
  });

  test('is TCG where that is asked for, whatever the host has', () => {
    load('kvm_intel');
    workspace.file('kvm');
    expect(chooseAccelerator('tcg', workspace.devices()).accelerator).toBe('tcg');
  });

  test('that is demanded and missing is an error with a way out', () => {
    const error = thrownBy(() => chooseAccelerator('kvm', workspace.devices()));
    expect(error.code).toBe('failed-precondition');
    expect(error.message).toBe('vm.accelerator is "kvm", but none of the kernel modules kvm_intel, kvm_amd is loaded');
    expect(error.hint).toContain('vm.accelerator = "auto"');
  });
});

test('reads the frequency of the TSC in kHz, or nothing where the host does not say', () => {
  expect(hostTscKhz(workspace.devices())).toBe(2_799_998);
  expect(hostTscKhz(workspace.devices({ cpuinfo: workspace.file('arm', 'BogoMIPS\t: 50.00\n') }))).toBeUndefined();
});

describe('the channel', () => {
  test('is the kernel’s vsock where its device can be opened, else hybrid vsock', () => {
    expect(chooseChannel('auto', workspace.devices())).toBe('hybrid-vsock');
    workspace.file('vhost-vsock');
    expect(chooseChannel('auto', workspace.devices())).toBe('kernel-vsock');
    expect(chooseChannel('kernel-vsock', workspace.devices())).toBe('kernel-vsock');
  });

  test('is hybrid vsock, or virtio-serial, where that is asked for', () => {
    workspace.file('vhost-vsock');
    for (const channel of ['hybrid-vsock', 'virtio-serial'] as const) {
      expect(chooseChannel(channel, workspace.devices())).toBe(channel);
    }
  });

  test('that is demanded and missing is an error that names device and module', () => {
    const error = thrownBy(() => chooseChannel('kernel-vsock', workspace.devices()));
    expect(error.code).toBe('failed-precondition');
    expect(error.message).toBe(
      `vm.channel is "kernel-vsock", but ${workspace.path('vhost-vsock')} cannot be opened: ENOENT`,
    );
    expect(error.hint).toContain('modprobe vhost_vsock');
  });
});
