import { mkdirSync } from 'node:fs';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { createFirecracker } from '../../../src/vmm/firecracker/driver.ts';
import { hostDevices } from '../../../src/vmm/host-devices.ts';
import type { Vm } from '../../../src/vmm/vmm.ts';
import { projectRoot } from '../../support/paths.ts';
import { Workspace } from '../../unit/vmm/workspace.ts';

/**
 * The real Firecracker, where KILN_FIRECRACKER names it and /dev/kvm opens, whatever is behind that: Firecracker must accept
 * all that Kiln asks of it. That the guest comes up is another matter: that takes hardware.
 */
const program = process.env.KILN_FIRECRACKER;
const guest = (name: string): string => path.join(projectRoot, 'dist/guest', name);
const never = new AbortController().signal;

describe.runIf(program !== undefined)('the real Firecracker', () => {
  let workspace: Workspace;
  let vm: Vm;
  beforeEach(async () => {
    workspace = new Workspace();
    mkdirSync(workspace.path('modules/kvm_intel'), { recursive: true });
    const devices = { ...hostDevices, modules: workspace.path('modules') };
    const files = { kernel: guest('vmlinux'), initrd: guest('initrd'), guestImage: guest('guest.erofs') };
    const vmm = createFirecracker({ firecracker: program ?? '' }, devices);
    vm = await vmm.boot({ ...workspace.vm(), ...files, id: 'my_c.1', memoryMib: 256 }, never);
  });
  afterEach(async () => {
    await vm.kill();
    workspace[Symbol.dispose]();
  });

  test('takes the configuration, starts the VM, swaps a drive, and leaves nothing', async () => {
    const disk = workspace.file('disk', Buffer.alloc(4096));
    expect(await vm.attachDisk('ro0', disk)).toMatch(/^\d{1,20}$/);
    expect(await vm.attachDisk('rw1', workspace.file('other', Buffer.alloc(4096)))).toMatch(/^\d{1,20}$/);
    await vm.kill();
    expect(await vm.wait()).toMatchObject({ signal: 'SIGKILL', guestStopped: false });
    expect(workspace.processes()).toEqual([]);
    expect(workspace.files()).toEqual([]);
  });

  test('answers the next kilnd', async () => {
    const vmm = createFirecracker({ firecracker: program ?? '' });
    const adopted = await vmm.adopt(JSON.parse(JSON.stringify(vm.record())), workspace.sandbox, never);
    expect(adopted.pid).toBe(vm.pid);
    await adopted.kill();
    expect(workspace.processes()).toEqual([]);
  });
});
