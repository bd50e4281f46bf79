import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { PassThrough } from 'node:stream';
import { text } from 'node:stream/consumers';
import { afterAll, afterEach, beforeAll, describe, expect, test } from 'vitest';
import { Guest } from '../../../src/guest/guest.ts';
import type { GuestContainer } from '../../../src/guest/terms.ts';
import { RootfsStore } from '../../../src/rootfs/index.ts';
import { NetworkNamespace } from '../../../src/sys/netns.ts';
import { buildTemplate } from '../../../src/template/build.ts';
import { createQemu } from '../../../src/vmm/qemu/driver.ts';
import type { TemplateDriver, Vm } from '../../../src/vmm/vmm.ts';
import { projectRoot } from '../../support/paths.ts';
import { noLogger } from '../../unit/vmm/workspace.ts';

/** Real QEMU, the real guest: a template, and what its clones are. */
const guestDir = process.env.KILN_GUEST_DIR ?? path.join(projectRoot, 'dist/guest');
const shape = {
  memoryMib: 256,
  vcpus: 1,
  networkCards: 2,
  kernel: path.join(guestDir, 'vmlinux'),
  initrd: path.join(guestDir, 'initrd'),
  guestImage: path.join(guestDir, 'guest.erofs'),
};
const answerLimitMs = 60_000;
const never = new AbortController().signal;

const parking = NetworkNamespace.create();
const { templates } = createQemu({
  qemu: 'qemu-system-x86_64',
  vsockBackend: '/not/needed',
  accelerator: 'auto',
  channel: 'virtio-serial',
  parking,
  logger: noLogger,
});
const driver = templates as TemplateDriver;

/** As kilnd makes it. */
const makeBlank = (file: string, signal: AbortSignal) => {
  const store = new RootfsStore({ cacheDir: folder });
  return store.makeBlank(file, { signal, writableSizeBytes: 10 * 2 ** 30 });
};

let folder: string;
let template: string;
const vms: Vm[] = [];
const guests: Guest[] = [];

/** A directory of that name below the folder. */
function directory(name: string): string {
  const made = path.join(folder, name);
  mkdirSync(made, { mode: 0o700 });
  return made;
}

/** A clone's agent, as a sandbox meets it. */
async function clone(name: string, from = template): Promise<Guest> {
  const vm = await driver.restore({ ...shape, id: name, directory: directory(name) }, from, never);
  vms.push(vm);
  const socket = await vm.acceptAgent(AbortSignal.timeout(answerLimitMs));
  const guest = await Guest.connect(socket, { hostname: 'kiln', answerLimitMs, session: name });
  guests.push(guest);
  return guest;
}

/** By how much a clock is slow, in ms, at least and at most: as a few answers tell, of which the quickest tells the most. */
async function clockError(guest: Guest): Promise<{ least: number; most: number }> {
  let [least, most] = [Number.NEGATIVE_INFINITY, Number.POSITIVE_INFINITY];
  for (let reading = 0; reading < 5; reading += 1) {
    const { askedAt, answeredAt, guestMs } = await guest.readClock();
    least = Math.max(least, askedAt - guestMs);
    most = Math.min(most, answeredAt - guestMs);
  }
  return { least, most };
}

/** Processes whose sandbox is below the folder. */
function processes(): string[] {
  return readdirSync('/proc').filter((pid) => {
    try {
      return readFileSync(`/proc/${pid}/environ`, 'utf8').includes(`KILN_SANDBOX_DIR=${folder}`);
    } catch {
      return false;
    }
  });
}

async function endClones(): Promise<void> {
  for (const guest of guests.splice(0)) guest[Symbol.dispose]();
  await Promise.all(vms.splice(0).map((vm) => vm.kill()));
}

/** What a program of the guest's own says; it sees the guest's /run at /mnt. */
async function inGuest(guest: Guest, id: string, script: string): Promise<string> {
  const base = `/run/kiln/roots/${id}`;
  const container: GuestContainer = {
    id,
    stdio: { stdin: false, stdout: true, stderr: false, terminal: false, size: undefined },
    mounts: [
      { source: { device: 'tmpfs' }, target: `${base}/rw`, type: 'tmpfs', options: [], directories: ['u', 'w'] },
      {
        source: { device: 'overlay' },
        target: `${base}/rootfs`,
        type: 'overlay',
        options: ['lowerdir=/', `upperdir=${base}/rw/u`, `workdir=${base}/rw/w`],
        directories: [],
      },
    ],
    spec: JSON.stringify({
      ociVersion: '1.0.2',
      root: { path: `${base}/rootfs` },
      process: { args: ['/bin/sh', '-c', script], cwd: '/', env: ['PATH=/bin'], user: { uid: 0, gid: 0 } },
      mounts: [
        { destination: '/proc', type: 'proc', source: 'proc' },
        { destination: '/dev', type: 'tmpfs', source: 'tmpfs' },
        { destination: '/mnt', type: 'bind', source: '/run', options: ['bind'] },
        { destination: '/sys', type: 'bind', source: '/sys', options: ['rbind', 'ro'] },
      ],
      linux: { namespaces: [{ type: 'mount' }, { type: 'pid' }], cgroupsPath: `/kiln/${id}` },
    }),
  };
  await guest.createContainer(container);
  const output = new PassThrough();
  const said = text(output);
  const target = { stream: 'stdout', from: 0, sink: output, onDelivered: () => {} } as const;
  const [piped] = guest.pipeOutputs({ id, execId: '' }, [target]);
  await guest.startContainer(id);
  await guest.waitExit({ id, execId: '' });
  await piped?.ended;
  output.end();
  await guest.removeContainer(id, { force: true, guestEnds: false });
  return (await said).trim();
}

beforeAll(async () => {
  folder = mkdtempSync(path.join(tmpdir(), 'kiln-t'));
  template = directory('template');
  await buildTemplate(template, { driver, shape, limitMs: answerLimitMs, makeBlank }, never);
}, 120_000);
afterEach(endClones);
afterAll(() => {
  try {
    expect(processes()).toEqual([]);
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
});

describe('clones of a template', () => {
  test('have nothing in common that must be their own, and the right time', async () => {
    // Two at a time come up, as in kilnd, and all are there together.
    const count = 20;
    const clones: Guest[] = [];
    for (let at = 0; at < count; at += 2) {
      clones.push(...(await Promise.all([clone(`twin-${at}`), clone(`twin-${at + 1}`)])));
    }
    const samples = await Promise.all(clones.map((guest) => guest.sampleRandomness()));
    const bytes = samples.flatMap(({ kernel, urandom, tls, publicKey }) => [kernel, urandom, tls, publicKey]);
    expect(bytes.every((sample) => sample.length >= 32)).toBe(true);
    expect(new Set(bytes.map((sample) => sample.toString('hex'))).size).toBe(4 * count);
    expect(new Set(samples.map(({ uuid }) => uuid)).size).toBe(count);
    expect(new Set(clones.map(({ facts }) => facts.bootId)).size).toBe(count);
    const ids = [];
    for (const [index, guest] of clones.entries()) {
      ids.push(await inGuest(guest, `c${index}`, 'cat /mnt/machine-id /proc/sys/kernel/random/boot_id'));
    }
    expect(new Set(ids.flatMap((lines) => lines.split('\n'))).size).toBe(2 * count);
    expect(ids[0]).toMatch(/^[0-9a-f]{32}\n[0-9a-f-]{36}$/);
    for (const guest of clones) {
      const { least, most } = await clockError(guest);
      expect([least < 50, most > -50], `slow by ${least} to ${most} ms`).toEqual([true, true]);
    }
    // And no clock that counts ticks, of which those are lost that a busy host does not give.
    for (const [index, guest] of clones.entries()) {
      const clocksource = '/sys/devices/system/clocksource/clocksource0/current_clocksource';
      expect(await inGuest(guest, `k${index}`, `cat ${clocksource}`)).toMatch(/^(tsc|kvm-clock)$/);
    }
  }, 120_000);

  test('have the state that the template was saved with', async () => {
    const planted = directory('planted');
    const vmDirectory = directory('planter');
    const vm = await driver.boot({ ...shape, id: 'planter', directory: vmDirectory }, planted, never);
    vms.push(vm);
    const hello = { hostname: '', session: '', becomesTemplate: true, answerLimitMs };
    const guest = await Guest.connect(await vm.acceptAgent(never), hello);
    await inGuest(guest, 'planter', 'echo from the template >/mnt/planted');
    guest[Symbol.dispose]();
    await vm.acceptAgent(never);
    await vm.save(never);
    await endClones();
    for (const name of ['first', 'second']) {
      const restored = await clone(name, planted);
      expect(await inGuest(restored, 'reader', 'cat /mnt/planted')).toBe('from the template');
      // What a clone writes is its own.
      await inGuest(restored, 'writer', `echo by ${name} >/mnt/planted`);
    }
  }, 120_000);

  test('live on when the template is removed', async () => {
    const removed = directory('removed');
    for (const name of driver.files) writeFileSync(path.join(removed, name), readFileSync(path.join(template, name)));
    const guest = await clone('survivor', removed);
    rmSync(removed, { recursive: true });
    expect(await inGuest(guest, 'one', 'echo here')).toBe('here');
  });
});

describe('files that are no template', () => {
  const copy = (name: string): string => {
    const made = directory(name);
    for (const file of driver.files) writeFileSync(path.join(made, file), readFileSync(path.join(template, file)));
    return made;
  };
  test.each<[string, (directory: string) => void, RegExp]>([
    [
      'the state is rubbish',
      (made) => writeFileSync(path.join(made, 'state'), 'rubbish'.repeat(10_000)),
      /^QEMU ended at the restore of its state \(exit code 1\): .*Not a migration stream/s,
    ],
    [
      'the state is cut off',
      (made) => truncateSync(path.join(made, 'state'), 20_000),
      /^QEMU ended at the restore of its state \(exit code 1\): .*load of migration failed/s,
    ],
    [
      'the state is missing',
      (made) => rmSync(path.join(made, 'state')),
      /state of the template cannot be read: ENOENT/,
    ],
    [
      'the memory is of another size',
      (made) => truncateSync(path.join(made, 'memory'), 128 << 20),
      /^QEMU ended at start \(exit code 1\): .*backing store size 0x8000000 does not match 'size' option 0x10000000/,
    ],
  ])('because %s are refused, with the reason, and nothing is left', async (what, damage, reason) => {
    const made = copy(`no-${what.replaceAll(' ', '-')}`);
    damage(made);
    await expect(clone(`clone-of-${path.basename(made)}`, made)).rejects.toThrow(reason);
    expect(processes()).toEqual([]);
  });

  test('because the VM that was saved had more memory are refused', async () => {
    const restored = driver.restore(
      { ...shape, memoryMib: 128, id: 'small', directory: directory('small') },
      template,
      never,
    );
    await expect(restored).rejects.toThrow(/^QEMU ended at /);
    expect(processes()).toEqual([]);
  });
});

test('a template that takes too long to make says so, and ends its VM', async () => {
  const slow = directory('slow');
  await expect(buildTemplate(slow, { driver, shape, limitMs: 300, makeBlank }, never)).rejects.toMatchObject({
    code: 'deadline-exceeded',
    message: 'no virtual machine was booted and saved within 0.3 s',
  });
  expect(processes()).toEqual([]);
});
