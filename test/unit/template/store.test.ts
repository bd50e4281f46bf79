import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  truncateSync,
  utimesSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest';
import { KilnError } from '../../../src/errors.ts';
import { loggerTo } from '../../../src/observe/logger.ts';
import type { buildTemplate } from '../../../src/template/build.ts';
import { hostFacts, templateKey, templateParts } from '../../../src/template/key.ts';
import { readTemplateRecord, writeTemplateRecord } from '../../../src/template/record.ts';
import { type Template, TemplateStore } from '../../../src/template/store.ts';
import type { TemplateDriver, Vmm, VmShape } from '../../../src/vmm/vmm.ts';

const never = new AbortController().signal;
const days = 24 * 3600;
const noLimits = { keepDays: 1000, maxTotalMib: 1_000_000 };

/** Stores in one folder, with a way to build templates that takes no VM. */
class Bench implements Disposable {
  readonly folder = mkdtempSync(join(tmpdir(), 'kiln-templates-'));
  readonly directory = join(this.folder, 'templates');
  readonly log: { level: string; msg: string; err?: { message: string } }[] = [];
  fingerprint = ['qemu', '7.2'];
  builds = 0;
  turns = 0;
  /** Where remains of VMs were ended. */
  readonly ended: string[] = [];
  build: typeof buildTemplate = async (directory) => this.fill(directory);
  readonly driver: TemplateDriver = {
    files: ['memory', 'state'],
    clonesAreCold: false,
    fingerprint: () => this.fingerprint,
    boot: () => Promise.reject(new Error('nothing boots here')),
    restore: () => Promise.reject(new Error('nothing is restored here')),
  };
  readonly vmm: Vmm = {
    name: 'scripted',
    boot: () => Promise.reject(new Error('nothing boots here')),
    adopt: () => Promise.reject(new Error('nothing is taken over here')),
    templates: this.driver,
  };
  readonly store = this.another();

  constructor() {
    for (const name of ['vmlinux', 'initrd', 'guest.erofs']) writeFileSync(join(this.folder, name), name);
  }

  another(): TemplateStore {
    return new TemplateStore({
      cacheDir: this.folder,
      logger: loggerTo({ write: (line) => void this.log.push(JSON.parse(line)) }, 'trace'),
      takeTurn: async () => {
        this.turns += 1;
        return { [Symbol.dispose]: () => {} };
      },
      endRemains: async (directory) => {
        this.ended.push(directory);
      },
      makeBlank: async () => {},
      build: (directory, options, signal) => {
        this.builds += 1;
        return this.build(directory, options, signal);
      },
    });
  }

  fill(directory: string): void {
    writeFileSync(join(directory, 'memory'), Buffer.alloc(1 << 20, 'memory'));
    writeFileSync(join(directory, 'state'), 'state');
  }

  shape(extra: Partial<VmShape> = {}): VmShape {
    return {
      memoryMib: 16,
      vcpus: 1,
      networkCards: 2,
      kernel: join(this.folder, 'vmlinux'),
      initrd: join(this.folder, 'initrd'),
      guestImage: join(this.folder, 'guest.erofs'),
      ...extra,
    };
  }

  provide(store = this.store, extra: Partial<VmShape> = {}, signal = never): Promise<Template | undefined> {
    return store.provide({ vmm: this.vmm, shape: this.shape(extra), bootTimeoutMs: 1000 }, signal);
  }

  async template(extra: Partial<VmShape> = {}): Promise<Template> {
    const template = await this.provide(this.store, extra);
    if (template === undefined) throw new Error('there is no template');
    return template;
  }

  /** The names in the store's folder. */
  kept(): string[] {
    return readdirSync(this.directory).filter((name) => name !== 'lock');
  }

  warnings(): string[] {
    return this.log.filter(({ level }) => level === 'warn').map(({ msg, err }) => `${msg}: ${err?.message}`);
  }

  [Symbol.dispose](): void {
    rmSync(this.folder, { recursive: true });
  }
}

let bench: Bench;
beforeEach(() => {
  bench = new Bench();
});
afterEach(() => bench[Symbol.dispose]());

describe('a template', () => {
  test('is made once, however many ask for it, and then is there, for the next kilnd too', async () => {
    const all = await Promise.all(Array.from({ length: 20 }, () => bench.provide()));
    expect(new Set(all.map((template) => template?.directory)).size).toBe(1);
    expect([bench.builds, bench.turns, bench.store.counts.built]).toEqual([1, 1, 1]);
    const next = bench.another();
    expect(await bench.provide(next)).toMatchObject({ key: all[0]?.key });
    expect([bench.builds, next.counts.built]).toEqual([1, 0]);
  });

  test('is made once, if several kilnds share the cache', async () => {
    const stores = [bench.store, bench.another(), bench.another()];
    await Promise.all(stores.map((store) => bench.provide(store)));
    expect(bench.builds).toBe(1);
  });

  test('is for root alone', async () => {
    const { directory } = await bench.template();
    expect(statSync(bench.directory).mode & 0o777).toBe(0o700);
    expect(statSync(directory).mode & 0o777).toBe(0o700);
    expect(statSync(join(directory, 'template.json')).mode & 0o777).toBe(0o600);
  });

  test('says what it is made of', async () => {
    const { directory } = await bench.template();
    const { parts } = JSON.parse(readFileSync(join(directory, 'template.json'), 'utf8'));
    expect(parts).toMatchObject({
      vmm: ['qemu', '7.2'],
      memoryMib: 16,
      vcpus: 1,
      networkCards: 2,
      host: { kernel: expect.any(String) },
    });
  });

  test('is there for VMMs that can save VMs, and for guests whose files are there', async () => {
    const { templates: _, ...without } = bench.vmm;
    expect(await bench.store.provide({ vmm: without, shape: bench.shape(), bootTimeoutMs: 1 }, never)).toBeUndefined();
    expect(await bench.provide(bench.store, { kernel: '/no/such/kernel' })).toBeUndefined();
    expect([bench.builds, bench.warnings()]).toEqual([0, []]);
  });

  test.each<[string, (shape: VmShape) => Partial<VmShape> | undefined]>([
    ['memory', () => ({ memoryMib: 32 })],
    ['CPUs', () => ({ vcpus: 2 })],
    ['network cards', () => ({ networkCards: 1 })],
    ['initrd', () => ({ initrd: undefined })],
    ['kernel', ({ kernel }) => void writeFileSync(kernel, 'another kernel')],
    ['guest image', ({ guestImage }) => void utimesSync(guestImage, 1, 1)],
    ['VMM', () => void bench.fingerprint.push('8.0')],
  ])('is another one for another %s', async (_what, change) => {
    const first = await bench.template();
    const second = await bench.template(change(bench.shape()));
    expect(second.key).not.toBe(first.key);
    expect(bench.builds).toBe(2);
  });

  test("is another one on another host's CPU or kernel, whatever its clock is now", () => {
    const cpuinfo = (text: string) => {
      const file = join(bench.folder, 'cpuinfo');
      writeFileSync(file, text);
      return hostFacts(file);
    };
    const intel =
      'processor\t: 0\nmodel name\t: Xeon\nmicrocode\t: 0x1\ncpu MHz\t\t: 2799.9\nflags\t\t: fpu sse\n\nprocessor\t: 1\n';
    const keyOn = (text: string) => templateKey(templateParts(bench.driver, bench.shape(), cpuinfo(text)));
    expect(keyOn(intel.replace('2799.9', '1200.0'))).toBe(keyOn(intel));
    for (const [from, to] of [
      ['Xeon', 'Epyc'],
      ['0x1', '0x2'],
      ['fpu sse', 'fpu'],
    ] as const) {
      expect(keyOn(intel.replace(from, to))).not.toBe(keyOn(intel));
    }
    const here = cpuinfo(intel);
    const keyFor = (kernel: string) => templateKey(templateParts(bench.driver, bench.shape(), { ...here, kernel }));
    expect(keyFor('6.1.0')).not.toBe(keyFor('6.1.1'));
  });
});

describe('a template that cannot be made', () => {
  test('is warned of once, with the reason, leaves nothing, and is not tried again at each start', async () => {
    bench.build = async (directory) => {
      bench.fill(directory);
      throw new KilnError('internal', 'the guest said no');
    };
    const all = await Promise.all(Array.from({ length: 5 }, () => bench.provide()));
    expect(all.every((template) => template === undefined)).toBe(true);
    expect(await bench.provide()).toBeUndefined();
    expect(bench.warnings()).toEqual(['cannot make a template: virtual machines boot instead: the guest said no']);
    expect([bench.builds, bench.store.counts.buildsFailed, bench.kept()]).toEqual([1, 1, []]);
  });

  test('for want of room says how much is there', async () => {
    expect(await bench.provide(bench.store, { memoryMib: 2 ** 40 })).toBeUndefined();
    expect(bench.warnings()[0]).toMatch(
      /a template of 1099511627776 MiB of memory needs as much room in .*, which has \d+ MiB/,
    );
    expect([bench.builds, bench.kept()]).toEqual([0, []]);
  });

  test('because nobody wants it any more leaves nothing, and the next one is made', async () => {
    const giveUp = new AbortController();
    bench.build = async (directory, _options, signal) => {
      bench.fill(directory);
      giveUp.abort(new Error('enough'));
      signal.throwIfAborted();
    };
    await expect(bench.provide(bench.store, {}, giveUp.signal)).rejects.toThrow('enough');
    expect([bench.kept(), bench.warnings()]).toEqual([[], []]);
    bench.build = async (directory) => bench.fill(directory);
    expect(await bench.provide()).toBeDefined();
  });

  test('because kilnd was killed is cleared away, also by who makes it anew', async () => {
    const key = templateKey(templateParts(bench.driver, bench.shape()));
    const half = join(bench.directory, `${key}.new`);
    mkdirSync(join(half, 'vm'), { recursive: true });
    writeFileSync(join(half, 'memory'), 'half');
    const { directory } = await bench.template();
    expect(bench.kept()).toEqual([key]);
    // Its VM may be in a jail, whose mounts would be in the way.
    expect(bench.ended).toEqual([join(half, 'vm')]);
    expect(statSync(join(directory, 'memory')).size).toBe(1 << 20);
    mkdirSync(half);
    await bench.store.collectGarbage(noLimits);
    expect(bench.kept()).toEqual([key]);
  });
});

describe('a template that is not what it was', () => {
  test.each<[string, (directory: string) => void]>([
    ['a byte is another', (directory) => writeFileSync(join(directory, 'memory'), Buffer.alloc(1 << 20, 'memoire'))],
    ['a file is shorter', (directory) => truncateSync(join(directory, 'memory'), 1000)],
    ['a file is missing', (directory) => rmSync(join(directory, 'state'))],
    ['its record is rubbish', (directory) => writeFileSync(join(directory, 'template.json'), 'rubbish')],
  ])('since %s is found by the next kilnd, warned of and made anew', async (_what, damage) => {
    const { directory } = await bench.template();
    damage(directory);
    const next = bench.another();
    expect(await bench.provide(next)).toBeDefined();
    expect(next.counts).toMatchObject({ damaged: 1, built: 1 });
    expect(bench.warnings()[0]).toContain('a template is damaged, and made anew');
    expect(readFileSync(join(directory, 'state'), 'utf8')).toBe('state');
  });

  test('since it was made for another CPU, and copied here, is warned of and made anew', async () => {
    const { directory } = await bench.template();
    const record = readTemplateRecord(directory);
    const foreign = { ...record.parts, host: { ...record.parts.host, cpu: 'another one' } };
    writeTemplateRecord(directory, { ...record, parts: foreign });
    const next = bench.another();
    expect(await bench.provide(next)).toBeDefined();
    expect(next.counts).toMatchObject({ damaged: 1, built: 1 });
    expect(bench.warnings()[0]).toMatch(/^a template is damaged, and made anew: .* was made for something else$/);
  });

  test('is found by the same kilnd where a look at the files tells', async () => {
    const { directory } = await bench.template();
    truncateSync(join(directory, 'memory'), 1000);
    expect(await bench.provide()).toBeDefined();
    expect(bench.store.counts).toMatchObject({ damaged: 1, built: 2 });
  });

  test('because it was removed is made anew, without a warning', async () => {
    const { directory } = await bench.template();
    rmSync(directory, { recursive: true });
    expect(await bench.provide()).toBeDefined();
    expect([bench.builds, bench.warnings()]).toEqual([2, []]);
  });
});

describe('a clone', () => {
  test('is counted, and no two may be the same', () => {
    bench.store.noteRestored('one');
    bench.store.noteRestored('two');
    expect(() => bench.store.noteRestored('one')).toThrow('has the boot id "one" of another one');
    expect(() => bench.store.noteRestored('')).toThrow(KilnError);
    expect(bench.store.counts.restored).toBe(2);
  });

  test('that could not be restored ends its template, and there is none for a while', async () => {
    const template = await bench.template();
    bench.store.noteFailure(template, new Error('QEMU ended'));
    expect(existsSync(template.directory)).toBe(false);
    expect(bench.store.counts.restoresFailed).toBe(1);
    expect(bench.warnings()[0]).toMatch(/^cannot restore from a template, which is removed: .*: QEMU ended$/);
    // However the clock jumps meanwhile.
    const now = Date.now();
    for (const hours of [0, -5, 5]) {
      vi.spyOn(Date, 'now').mockReturnValue(now + hours * 3_600_000);
      expect(await bench.provide()).toBeUndefined();
    }
    vi.restoreAllMocks();
    expect(bench.builds).toBe(1);
  });
});

describe('templates that nobody uses', () => {
  const usedBefore = (template: Template, seconds: number) => {
    const at = Date.now() / 1000 - seconds;
    utimesSync(join(template.directory, 'template.json'), at, at);
  };

  test('are removed by their age, which each use begins anew', async () => {
    const old = await bench.template();
    const used = await bench.template({ vcpus: 2 });
    for (const template of [old, used]) usedBefore(template, 8 * days);
    await bench.template({ vcpus: 2 });
    await bench.store.collectGarbage({ ...noLimits, keepDays: 7 });
    expect(bench.kept()).toEqual([used.key]);
    expect((await bench.template()).key).toBe(old.key);
    expect(bench.builds).toBe(3);
  });

  test('are removed when all are too large, the one that was used last never', async () => {
    const templates = [];
    for (const vcpus of [1, 2, 3, 4]) templates.push(await bench.template({ vcpus }));
    for (const [index, template] of templates.entries()) usedBefore(template, 100 - index);
    await bench.store.collectGarbage({ ...noLimits, maxTotalMib: 3 });
    expect(bench.kept().sort()).toEqual([templates[2]?.key, templates[3]?.key].sort());
    await bench.store.collectGarbage({ ...noLimits, maxTotalMib: 1 });
    expect(bench.kept()).toEqual([templates[3]?.key]);
  });

  test('stay while another kilnd makes one', async () => {
    const old = await bench.template();
    usedBefore(old, 8 * days);
    const started = Promise.withResolvers<void>();
    const finish = Promise.withResolvers<void>();
    bench.build = async (directory) => {
      started.resolve();
      await finish.promise;
      bench.fill(directory);
    };
    const making = bench.provide(bench.another(), { vcpus: 2 });
    await started.promise;
    await bench.store.collectGarbage({ ...noLimits, keepDays: 7 });
    expect(bench.kept()).toContain(old.key);
    finish.resolve();
    await making;
  });
});
