import { existsSync, mkdtempSync, readdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest';
import { loggerTo } from '../../../src/observe/logger.ts';
import { BootSlots } from '../../../src/sandbox/boot-slots.ts';
import { type PoolLimits, SandboxPool, type ShelfStatus } from '../../../src/sandbox/pool.ts';
import type { Sandbox } from '../../../src/sandbox/sandbox.ts';
import type { Template, TemplateRequest } from '../../../src/template/store.ts';
import type { VmConfig, Vmm } from '../../../src/vmm/vmm.ts';
import { endWithStdin, helloResponse, ScriptedAgent } from '../guest/scripted-agent.ts';
import { ScriptedVm } from './workbench.ts';

/** A pool of virtual machines that are played, with agents that are real gRPC servers. */
class Bench implements AsyncDisposable {
  readonly folder = mkdtempSync(join(tmpdir(), 'kiln-pool-'));
  readonly directory = join(this.folder, 'p');
  readonly vms: ScriptedVm[] = [];
  readonly warnings: string[] = [];
  readonly failures: string[] = [];
  readonly bootIds: string[] = [];
  hasTemplate = true;
  beforeRestore: (config: VmConfig, signal: AbortSignal) => Promise<void> = async () => {};
  readonly template: Template = {
    key: 'k1',
    directory: '/templates/k1',
    driver: {
      files: [],
      clonesAreCold: false,
      fingerprint: () => [],
      boot: () => Promise.reject(new Error('no template is made here')),
      restore: async (config, _template, signal) => {
        await this.beforeRestore(config, signal);
        return this.#vm(config);
      },
    },
  };
  readonly request: TemplateRequest = {
    vmm: { name: 'scripted', templates: this.template.driver } as Vmm,
    shape: { memoryMib: 256, vcpus: 1, networkCards: 0, kernel: '/k', initrd: undefined, guestImage: '/g' },
    bootTimeoutMs: 5000,
  };
  readonly pool = new SandboxPool({
    directory: this.directory,
    bootSlots: new BootSlots(4),
    makeBlank: async () => {},
    logger: loggerTo(
      {
        write: (line) => {
          const { level, msg } = JSON.parse(line) as { level: string; msg: string };
          if (level !== 'info') this.warnings.push(msg);
        },
      },
      'info',
    ),
    templates: {
      provide: async () => (this.hasTemplate ? this.template : undefined),
      noteRestored: (bootId) => void this.bootIds.push(bootId),
      noteFailure: (_template, error) => void this.failures.push((error as Error).message),
    },
  });

  #vm(config: VmConfig): ScriptedVm {
    const number = this.vms.length + 1;
    const agent: ScriptedAgent = new ScriptedAgent({
      hello: (_call, done) => done(null, helloResponse({ bootId: `b${number}` })),
      ...endWithStdin(() => agent),
    });
    const vm = new ScriptedVm(config, agent, [], {});
    this.vms.push(vm);
    return vm;
  }

  take(limits: PoolLimits): Promise<Sandbox | undefined> {
    return this.pool.take(this.template, this.request, limits);
  }

  keep(limits: PoolLimits): void {
    this.pool.keep(this.template, this.request, limits);
  }

  get shelf(): ShelfStatus | undefined {
    return this.pool.status()[0];
  }

  /** Waits until so many sandboxes wait. */
  async waiting(count: number): Promise<void> {
    await vi.waitFor(() => expect(this.shelf?.waiting).toBe(count), { interval: 1 });
  }

  /** Their directories. */
  directories(): string[] {
    return readdirSync(this.directory);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.pool[Symbol.asyncDispose]();
    rmSync(this.folder, { recursive: true });
  }
}

let bench: Bench;
beforeEach(() => {
  bench = new Bench();
});
afterEach(() => bench[Symbol.asyncDispose]());

describe('a pool', () => {
  test('that has nothing yet is a miss, and then has one for the next container', async () => {
    expect(await bench.take({ min: 0, max: 4 })).toBeUndefined();
    await bench.waiting(1);
    await using sandbox = await bench.take({ min: 0, max: 4 });
    expect(sandbox?.guest.facts.bootId).toBe('b1');
    expect(bench.shelf).toMatchObject({ template: 'k1', memoryMib: 256, vcpus: 1, hits: 1, misses: 1, died: 0 });
    expect(bench.bootIds).toContain('b1');
  });

  test('has virtual machines that keep what they have at hand until one leaves it', async () => {
    bench.keep({ min: 2, max: 2 });
    await bench.waiting(2);
    expect(bench.vms.map(({ config, leftPool }) => [config.pooled, leftPool])).toEqual([
      [true, false],
      [true, false],
    ]);
    await using _ = await bench.take({ min: 2, max: 2 });
    expect(bench.vms.map(({ leftPool }) => leftPool)).toEqual([true, false]);
  });

  test('of size 0 is none', async () => {
    expect(await bench.take({ min: 0, max: 0 })).toBeUndefined();
    expect(bench.pool.status()).toEqual([]);
  });

  test('keeps the least number ready, and fills up after each take', async () => {
    bench.keep({ min: 2, max: 4 });
    await bench.waiting(2);
    await using sandbox = await bench.take({ min: 2, max: 4 });
    expect(sandbox).toBeDefined();
    await bench.waiting(2);
    expect(bench.vms.length).toBe(3);
  });

  test('whose clones are cold makes one ready at a time, and none while a container is created', async () => {
    Object.assign(bench.template.driver, { clonesAreCold: true });
    let atOnce = 0;
    let most = 0;
    bench.beforeRestore = async () => {
      atOnce += 1;
      most = Math.max(most, atOnce);
      await Promise.resolve();
      atOnce -= 1;
    };
    const creations = [bench.pool.creating(), bench.pool.creating()];
    bench.keep({ min: 2, max: 2 });
    expect(await bench.take({ min: 2, max: 2 })).toBeUndefined();
    creations[0]?.[Symbol.dispose]();
    expect(bench.vms.length).toBe(0);
    creations[1]?.[Symbol.dispose]();
    await vi.waitFor(() => expect(bench.shelf?.waiting).toBe(2), { timeout: 10_000 });
    expect(most).toBe(1);
  });

  test('wants as many as were taken at once, and at most the most', async () => {
    await Promise.all(Array.from({ length: 3 }, () => bench.take({ min: 0, max: 8 })));
    expect(bench.shelf?.wanted).toBe(3);
    await Promise.all(Array.from({ length: 9 }, () => bench.take({ min: 0, max: 8 })));
    expect(bench.shelf?.wanted).toBe(8);
    await bench.waiting(8);
  });

  test('gives each sandbox to one container', async () => {
    bench.keep({ min: 3, max: 3 });
    await bench.waiting(3);
    const taken = await Promise.all(Array.from({ length: 5 }, () => bench.take({ min: 3, max: 3 })));
    const ids = taken.flatMap((sandbox) => sandbox?.guest.facts.bootId ?? []);
    expect(ids.length).toBe(3);
    expect(new Set(ids).size).toBe(3);
    for (const sandbox of taken) await sandbox?.[Symbol.asyncDispose]();
  });

  test('has a directory for each sandbox, which goes with it and is written down for the next kilnd', async () => {
    bench.keep({ min: 1, max: 1 });
    await bench.waiting(1);
    const sandbox = await bench.take({ min: 1, max: 1 });
    const directory = bench.vms[0]?.config.directory ?? '';
    expect(sandbox?.record().vmDirectory).toBe(directory);
    expect(existsSync(directory)).toBe(true);
    await sandbox?.[Symbol.asyncDispose]();
    expect(existsSync(directory)).toBe(false);
  });

  test('that is closed ends what waits and what is being made, and gives nothing any more', async () => {
    bench.keep({ min: 1, max: 2 });
    await bench.waiting(1);
    const restoring = Promise.withResolvers<void>();
    bench.beforeRestore = (_config, signal) =>
      new Promise((_resolve, reject) => {
        signal.addEventListener('abort', () => reject(signal.reason));
        restoring.resolve();
      });
    bench.keep({ min: 2, max: 2 });
    await restoring.promise;
    await bench.pool[Symbol.asyncDispose]();
    expect(await bench.vms[0]?.wait()).toMatchObject({ signal: 'SIGKILL' });
    expect(bench.directories()).toEqual([]);
    expect(await bench.take({ min: 2, max: 2 })).toBeUndefined();
    expect([bench.warnings, bench.failures]).toEqual([[], []]);
  });
});

describe('a sandbox of the pool', () => {
  test('that ends while it waits is told of and replaced', async () => {
    bench.keep({ min: 1, max: 1 });
    await bench.waiting(1);
    bench.vms[0]?.end({ signal: 'SIGKILL' });
    await vi.waitFor(() => expect(bench.shelf).toMatchObject({ waiting: 1, died: 1 }), { interval: 1 });
    expect(bench.warnings).toEqual(['a virtual machine has ended while it waited for a container']);
    await vi.waitFor(() => expect(bench.directories().length).toBe(1), { interval: 1 });
    await using sandbox = await bench.take({ min: 1, max: 1 });
    expect(sandbox?.guest.facts.bootId).toBe('b2');
  });

  test('whose agent does not answer is ended, and the next one is taken', async () => {
    bench.keep({ min: 2, max: 2 });
    await bench.waiting(2);
    bench.vms[0]?.agent.disconnect();
    await using sandbox = await bench.take({ min: 2, max: 2 });
    expect(sandbox?.guest.facts.bootId).toBe('b2');
    expect(await bench.vms[0]?.wait()).toMatchObject({ signal: 'SIGKILL' });
    expect(bench.shelf).toMatchObject({ hits: 1, misses: 0, died: 1 });
    expect(bench.warnings).toEqual(['a waiting virtual machine does not answer']);
  });

  test('that cannot be restored ends the template, leaves nothing, and is not tried again at once', async () => {
    bench.beforeRestore = () => Promise.reject(new Error('QEMU ended'));
    bench.keep({ min: 2, max: 2 });
    await vi.waitFor(() => expect(bench.failures).toEqual(['QEMU ended', 'QEMU ended']), { interval: 1 });
    await vi.waitFor(() => expect(bench.warnings.length).toBe(2), { interval: 1 });
    expect(await bench.take({ min: 2, max: 2 })).toBeUndefined();
    expect(bench.warnings[0]).toBe('cannot make a virtual machine ready for the pool');
    expect([bench.failures.length, bench.directories()]).toEqual([2, []]);
  });

  test('without a template is none', async () => {
    bench.hasTemplate = false;
    bench.keep({ min: 1, max: 1 });
    await vi.waitFor(() => expect(bench.warnings.length).toBe(1), { interval: 1 });
    expect([bench.vms, bench.directories()]).toEqual([[], []]);
  });
});
