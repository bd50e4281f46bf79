import { once } from 'node:events';
import {
  appendFileSync,
  chmodSync,
  existsSync,
  mkdirSync,
  readFileSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest';
import { createQemu, type QemuOptions } from '../../../src/vmm/qemu/driver.ts';
import type { SavableVm, TemplateDriver, Vm, Vmm } from '../../../src/vmm/vmm.ts';
import { savedState } from './fake-qemu.ts';
import { noLogger, parking, Workspace } from './workspace.ts';

/** Saving and restoring, with QEMU played by fake-qemu.ts. */
let workspace: Workspace;
let template: string;
let vms: Vm[];
beforeEach(() => {
  workspace = new Workspace();
  template = workspace.path('template');
  mkdirSync(template);
  vms = [];
});
afterEach(async () => {
  for (const vm of vms) await vm.kill();
  workspace[Symbol.dispose]();
});

const never = new AbortController().signal;

function vmm(options: Partial<QemuOptions> = {}): Vmm {
  const usual = { vsockBackend: '/no/backend', accelerator: 'auto', channel: 'virtio-serial', parking } as const;
  return createQemu({ qemu: workspace.path('qemu'), logger: noLogger, ...usual, ...options }, workspace.devices());
}

function templates(options: Partial<QemuOptions> = {}): TemplateDriver {
  const { templates: driver } = vmm(options);
  if (driver === undefined) throw new Error('this QEMU has no templates');
  return driver;
}

async function boot(mode = 'running', signal = never): Promise<SavableVm> {
  workspace.qemu(mode);
  const vm = await templates().boot(workspace.vm(), template, signal);
  vms.push(vm);
  return vm;
}

async function restore(mode = 'running', signal = never): Promise<Vm> {
  workspace.qemu(mode);
  const vm = await templates().restore(workspace.vm(), template, signal);
  vms.push(vm);
  return vm;
}

const memoryFile = () => path.join(template, 'memory');
const stateFile = () => path.join(template, 'state');
const modeOf = (file: string) => (statSync(file).mode & 0o777).toString(8);

/** A template as `save` has made it, of which a test may spoil a file. */
function makeTemplate(): void {
  writeFileSync(memoryFile(), '');
  writeFileSync(stateFile(), savedState);
}

/** What QEMU was told and what it told of its migration, in order, without the questions that come at any time. */
function conversation(): string[] {
  const lines = readFileSync(workspace.path('qemu.commands'), 'utf8').trim().split('\n');
  const words = lines.map((line) => {
    const { execute, event, data } = JSON.parse(line);
    return execute ?? (data ? `${event} ${data.status}` : event);
  });
  return words.filter((word) => !['qmp_capabilities', 'query-status', 'ringbuf-read'].includes(word));
}

function argumentsOf(command: string): unknown {
  return allArgumentsOf(command)[0];
}

function allArgumentsOf(command: string): unknown[] {
  const lines = readFileSync(workspace.path('qemu.commands'), 'utf8').trim().split('\n');
  const commands = lines.map((line) => JSON.parse(line)).filter(({ execute }) => execute === command);
  return commands.map((one) => one.arguments);
}

const capabilities = [
  { capability: 'events', state: true },
  { capability: 'x-ignore-shared', state: true },
];

function expectNothingLeft(): void {
  expect(workspace.processes()).toEqual([]);
  expect(workspace.files()).toEqual([]);
}

describe('the templates of QEMU', () => {
  test.each(['auto', 'hybrid-vsock', 'kernel-vsock'] as const)('are none where the channel is %s', (channel) => {
    expect(vmm({ channel }).templates).toBeUndefined();
  });

  test('have two files', () => {
    expect(templates().files).toEqual(['memory', 'state']);
  });

  test('depend on QEMU’s program, and on how it is told to run', () => {
    workspace.qemu('running');
    const before = templates().fingerprint(workspace.vm());
    expect(templates().fingerprint(workspace.vm())).toEqual(before);
    expect(before[0]).toContain(workspace.path('qemu'));
    expect(before.join(' ')).toMatch(/ -M microvm,accel=tcg,\S+ -cpu max,-erms /);
    // The CPU's clock changes all the time, and each clone has a name and a directory of its own.
    workspace.devices({ cpuinfo: workspace.file('cpuinfo', 'cpu MHz\t\t: 1200.0\n') });
    expect(templates().fingerprint(workspace.vm({ id: 'two', directory: '/elsewhere' }))).toEqual(before);
    expect(templates().fingerprint(workspace.vm({ memoryMib: 256 }))).not.toEqual(before);
    appendFileSync(workspace.path('qemu'), '// upgraded\n');
    expect(templates().fingerprint(workspace.vm())).not.toEqual(before);
  });

  test('depend on no program that there is not', () => {
    expect(() => templates({ qemu: 'no-such-qemu' }).fingerprint(workspace.vm())).toThrow(
      expect.objectContaining({ code: 'failed-precondition', message: 'there is no program no-such-qemu' }),
    );
  });
});

describe('a VM that can be saved', () => {
  test('writes its memory to a file that only its owner reads', async () => {
    const vm = await boot();
    expect(modeOf(memoryFile())).toBe('600');
    const args = workspace.qemuStarts()[0] ?? [];
    expect(args).toContain(`memory-backend-file,id=mem,size=128M,share=on,mem-path=${memoryFile()}`);
    expect(args).not.toContain('-incoming');
    const agent = await vm.acceptAgent(never);
    agent.resume();
    expect(String((await once(agent, 'data'))[0])).toBe('hello');
  });

  test('is not booted into a template that has a memory', async () => {
    writeFileSync(memoryFile(), 'of another');
    await expect(boot()).rejects.toThrow(`EEXIST: file already exists, open '${memoryFile()}'`);
    expect(readFileSync(memoryFile(), 'utf8')).toBe('of another');
    expect(workspace.has('qemu.starts')).toBe(false);
    expectNothingLeft();
  });

  test('is stopped by QEMU, and all that QEMU knows of it is in a file that only its owner reads', async () => {
    const vm = await boot();
    const files = workspace.files();
    await vm.save(never);
    expect(readFileSync(stateFile()).equals(savedState)).toBe(true);
    expect(modeOf(stateFile())).toBe('600');
    expect(argumentsOf('migrate-set-capabilities')).toEqual({ capabilities });
    expect(argumentsOf('migrate')).toEqual({ uri: expect.stringMatching(/^unix:\//) });
    expect(conversation()).toEqual([
      'migrate-set-capabilities',
      'migrate',
      'MIGRATION setup',
      'MIGRATION active',
      'MIGRATION completed',
    ]);
    expect(workspace.files()).toEqual(files);
    await vm.kill();
    expectNothingLeft();
  });
});

describe('a save that fails', () => {
  test.each([
    ['QEMU refuses it', 'refuses', 'internal', "QEMU refused migrate: State blocked by non-migratable device 'vsock'"],
    ['QEMU could not send the state', 'reaches-nobody', 'internal', 'QEMU could not save the VM'],
    ['QEMU could not send all of it', 'fails', 'internal', 'QEMU could not save the VM'],
    ['QEMU ends', 'ends', 'unavailable', 'QEMU ended before it could save the VM'],
  ])('because %s says so, and leaves no socket', async (_why, detail, code, message) => {
    const vm = await boot(`running=${detail}`);
    const files = workspace.files();
    await expect(vm.save(never)).rejects.toMatchObject({ code, message });
    expect(workspace.files()).toEqual(files);
    await vm.kill();
    expectNothingLeft();
  });

  test('because there is a state already names it, and leaves that as it is', async () => {
    const vm = await boot();
    const files = workspace.files();
    writeFileSync(stateFile(), 'of another');
    await expect(vm.save(never)).rejects.toThrow(`EEXIST: file already exists, open '${stateFile()}'`);
    expect(readFileSync(stateFile(), 'utf8')).toBe('of another');
    await workspace.appears('qemu.hung-up');
    expect(workspace.files()).toEqual(files);
  });

  test('because it is aborted while QEMU sends hangs up on QEMU', async () => {
    const vm = await boot('running=stalls');
    const files = workspace.files();
    const controller = new AbortController();
    const reason = new Error('enough');
    const saved = expect(vm.save(controller.signal)).rejects.toBe(reason);
    // It is there as soon as somebody reads what QEMU sends.
    await vi.waitFor(() => expect(existsSync(stateFile())).toBe(true), { interval: 1 });
    controller.abort(reason);
    await saved;
    await workspace.appears('qemu.hung-up');
    expect(workspace.files()).toEqual(files);
  });

  test('because it was aborted before hangs up on QEMU just the same', async () => {
    const vm = await boot('running=stalls');
    const files = workspace.files();
    const reason = new Error('enough');
    await expect(vm.save(AbortSignal.abort(reason))).rejects.toBe(reason);
    await workspace.appears('qemu.hung-up');
    expect(workspace.files()).toEqual(files);
  });
});

describe('a restored VM', () => {
  beforeEach(makeTemplate);

  test('shares the memory until it writes to it, and has the state that was saved', async () => {
    await restore();
    const args = workspace.qemuStarts()[0] ?? [];
    expect(args).toContain(`memory-backend-file,id=mem,size=128M,share=off,mem-path=${memoryFile()}`);
    expect(args.join(' ')).toContain(' -incoming defer ');
    expect(argumentsOf('migrate-set-capabilities')).toEqual({ capabilities });
    // Which fake QEMU has read there, and compared.
    expect(allArgumentsOf('migrate-incoming')).toEqual([{ uri: `file:${stateFile()}` }, { uri: 'fd:5' }]);
  });

  test('is given its state by name where QEMU takes it by no descriptor', async () => {
    const vm = await restore('running=eleven');
    expect(conversation().slice(-2)).toEqual(['RESUME', 'MIGRATION completed']);
    await vm.attachDisk('ro0', '/l.erofs');
  });

  test('runs when it is complete, without being told to', async () => {
    const vm = await restore();
    expect(conversation()).toEqual([
      'migrate-set-capabilities',
      'migrate-set-parameters',
      'migrate-incoming',
      'migrate-incoming',
      'MIGRATION setup',
      'MIGRATION active',
      'RESUME',
      'MIGRATION completed',
    ]);
    expect(readFileSync(stateFile()).equals(savedState)).toBe(true);
    await vm.attachDisk('ro0', '/l.erofs');
  });

  test('has a host at its serial port before it has its state, and keeps it', async () => {
    const vm = await restore();
    expect(readFileSync(workspace.path('qemu.hosts-at-load'), 'utf8')).toBe('1');
    const agent = await vm.acceptAgent(never);
    agent.resume();
    expect(String((await once(agent, 'data'))[0])).toBe('hello');
  });

  test('is there also when its agent does not answer', async () => {
    const vm = await restore('running=deaf');
    expect(conversation()).toContain('MIGRATION completed');
    await expect(vm.acceptAgent(AbortSignal.timeout(20))).rejects.toThrow('timeout');
    await vm.kill();
    expectNothingLeft();
  });

  test('that stopped as soon as it ran says so, without being asked', async () => {
    const vm = await restore('running=panics');
    expect(await vm.wait()).toMatchObject({ guestStopped: true });
    expect(readFileSync(workspace.path('qemu.commands'), 'utf8')).not.toContain('query-status');
  });

  test('can be there more than once', async () => {
    const one = await restore();
    const directory = workspace.path('second');
    mkdirSync(directory);
    const two = await templates().restore(workspace.vm({ id: 'two', directory }), template, never);
    vms.push(two);
    for (const vm of [one, two]) (await vm.acceptAgent(never)).destroy();
    expect(two.pid).not.toBe(one.pid);
  });

  test('is ended as any other, and leaves the template as it was', async () => {
    const vm = await restore();
    await vm.kill();
    expectNothingLeft();
    expect(await vm.wait()).toMatchObject({ code: null, signal: 'SIGKILL', guestStopped: false });
    expect(readFileSync(stateFile()).equals(savedState)).toBe(true);
    expect(existsSync(memoryFile())).toBe(true);
  });

  test('is taken over as any other', async () => {
    const first = await restore();
    (await first.acceptAgent(never)).destroy();
    await first.attachDisk('rw0', '/disk');
    const record = JSON.parse(JSON.stringify(first.record()));
    const second = await vmm().adopt(record, workspace.sandbox, never);
    vms.push(second);
    expect(second.pid).toBe(first.pid);
    expect(second.record()).toEqual(record);
    (await second.acceptAgent(never)).destroy();
    await second.kill();
    expectNothingLeft();
  });
});

describe('a restore that fails', () => {
  beforeEach(makeTemplate);

  test('because the state is none carries QEMU’s exit code and words', async () => {
    writeFileSync(stateFile(), 'rubbish');
    await expect(restore()).rejects.toMatchObject({
      code: 'internal',
      message: expect.stringMatching(
        /^QEMU ended at the restore of its state \(exit code 1\): .*Not a migration stream.*Invalid argument$/,
      ),
    });
    expectNothingLeft();
  });

  test('because the VM was saved when it did not run says so', async () => {
    await expect(restore('running=paused')).rejects.toMatchObject({
      code: 'internal',
      message: 'QEMU has restored the VM, but does not let it run',
    });
    expectNothingLeft();
  });

  test('because QEMU is killed carries the signal', async () => {
    const restored = restore('running=stalls');
    await workspace.appears('qemu.stalled');
    process.kill(Number(workspace.processes()[0]), 'SIGKILL');
    await expect(restored).rejects.toThrow('QEMU ended at the restore of its state (SIGKILL): ');
    expectNothingLeft();
  });

  test('because QEMU speaks no QMP any more ends QEMU', async () => {
    await expect(restore('running=babbles')).rejects.toMatchObject({
      code: 'unavailable',
      message: 'QEMU sent a line that is not QMP: 220 mail.example.org ESMTP (at migrate-incoming)',
    });
    expectNothingLeft();
  });

  test.each(['state', 'memory'])('because the template’s %s is missing names it, and starts nothing', async (name) => {
    const file = path.join(template, name);
    rmSync(file);
    await expect(restore()).rejects.toMatchObject({
      code: 'not-found',
      message: expect.stringContaining(`${file} of the template cannot be read: ENOENT`),
    });
    expect(workspace.has('qemu.starts')).toBe(false);
    expect(existsSync(file)).toBe(false);
    expectNothingLeft();
  });

  test('because a file of the guest’s is missing names it, and starts nothing', async () => {
    const config = workspace.vm({ kernel: '/no/such/file' });
    await expect(templates().restore(config, template, never)).rejects.toMatchObject({
      code: 'failed-precondition',
      message: 'the guest kernel /no/such/file cannot be read: ENOENT',
    });
    expectNothingLeft();
  });

  test('because QEMU may not be executed says so', async () => {
    chmodSync(workspace.qemu('running'), 0o644);
    await expect(templates().restore(workspace.vm(), template, never)).rejects.toThrow(/cannot run QEMU .*EACCES/);
    expectNothingLeft();
  });

  test('because it is aborted before the state is there ends QEMU', async () => {
    const controller = new AbortController();
    const restored = restore('running=stalls', controller.signal);
    await workspace.appears('qemu.stalled');
    const reason = new Error('enough');
    controller.abort(reason);
    await expect(restored).rejects.toBe(reason);
    expectNothingLeft();
  });
});
