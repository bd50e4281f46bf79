/** Containers whose virtual machines are clones of a template, and what happens when there is none, or a bad one. */
import { execFileSync } from 'node:child_process';
import { existsSync, readdirSync } from 'node:fs';
import { readFile, rename, rm, writeFile } from 'node:fs/promises';
import { basename, join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { afterEach, describe, expect, it } from 'vitest';
import { templateKey } from '../../src/template/key.ts';
import { readTemplateRecord, writeTemplateRecord } from '../../src/template/record.ts';
import { hasKvm } from '../support/failure.ts';
import { execIn, short } from '../support/fault-notes.ts';
import { distBin, underKiln } from '../support/paths.ts';
import type { Scene } from '../support/scene.ts';
import { run } from '../support/spawn.ts';
import { useScene } from '../support/use-scene.ts';
import { Gate, helpersOf, startVictim, Watched } from '../support/victims.ts';
import { signal, waitForEnd } from '../support/wait-for-end.ts';

interface Counts {
  readonly restored: number;
  readonly restoresFailed: number;
  readonly built: number;
  readonly buildsFailed: number;
  readonly damaged: number;
}

async function counts(scene: Scene): Promise<Counts> {
  const { stdout } = await run(join(distBin, 'kiln'), ['status'], { env: { ...process.env, ...scene.kilnEnv } });
  return JSON.parse(stdout.toString()).templates;
}

/** Those in the scene's folder, and what is half made. */
function templatesOf(scene: Scene): string[] {
  return existsSync(scene.templatesDir) ? readdirSync(scene.templatesDir).filter((name) => name !== 'lock') : [];
}

/** The one template's directory. */
function onlyTemplate(scene: Scene): string {
  const [name = ''] = templatesOf(scene);
  expect(templatesOf(scene)).toEqual([name]);
  return join(scene.templatesDir, name);
}

/** Processes that work for a template that is being made. */
async function buildersOf(scene: Scene): Promise<number[]> {
  const found = await run('grep', ['-lsaE', `KILN_SANDBOX_DIR=${scene.templatesDir}/`, ...environFiles()]);
  return found.stdout
    .toString()
    .split('\n')
    .filter(Boolean)
    .map((file) => Number(file.split('/')[2]));
}

function environFiles(): string[] {
  return readdirSync('/proc')
    .filter((name) => /^\d+$/.test(name))
    .map((pid) => `/proc/${pid}/environ`);
}

/** Waits for a process that works for a template: there is no event for it. */
async function builderOf(scene: Scene): Promise<number> {
  for (;;) {
    const [pid] = await buildersOf(scene);
    if (pid !== undefined) return pid;
    await sleep(20);
  }
}

async function echo(scene: Scene, id = scene.id()): Promise<void> {
  expect(await scene.run(id, ['echo', id])).toMatchObject({ code: 0, stdout: Buffer.from(`${id}\n`) });
}

async function warnings(scene: Scene): Promise<string[]> {
  const lines = (await readFile(scene.kilndLog, 'utf8')).trim().split('\n');
  const parsed = lines.map((line) => JSON.parse(line) as { level: string; msg: string; err?: { message: string } });
  return parsed.filter(({ level, err }) => level === 'warn' && err).map(({ msg, err }) => `${msg}: ${err?.message}`);
}

describe.runIf(underKiln)('a container from a template', () => {
  const scene = useScene({ version: '2.1', ownTemplates: true });

  it('is restored; the template is made at the first start, for many at once too, and is there for the next kilnd', async () => {
    const count = 20;
    const ids = Array.from({ length: count }, () => scene.id());
    await Promise.all(ids.map((id) => echo(scene, id)));
    expect(await counts(scene)).toEqual({ restored: count, restoresFailed: 0, built: 1, buildsFailed: 0, damaged: 0 });
    await scene.stopKilnd();
    await echo(scene);
    expect(await counts(scene)).toMatchObject({ restored: 1, built: 0 });
    expect(await warnings(scene)).toEqual([]);
  });

  it('has a machine of its own: boot id, machine id, random numbers, and the time of now', async () => {
    const ids = [scene.id(), scene.id(), scene.id()];
    const script =
      'cat /proc/sys/kernel/random/boot_id /proc/sys/kernel/random/uuid; head -c 16 /dev/urandom | xxd -p; date +%s';
    const results = await Promise.all(ids.map((id) => scene.run(id, ['sh', '-c', script])));
    const lines = results.map(({ stdout }) => stdout.toString().trim().split('\n'));
    for (const column of [0, 1, 2]) expect(new Set(lines.map((line) => line[column])).size).toBe(ids.length);
    for (const line of lines) expect(Math.abs(Number(line[3]) - Date.now() / 1000)).toBeLessThan(5);
  });

  it('with a limit on memory is cloned from one of few sizes', async () => {
    for (const mib of [500, 700]) {
      const flags = ['--rm', '--memory-limit', String(mib << 20)];
      const { stdout } = await scene.run(scene.id(), ['grep', 'MemTotal', '/proc/meminfo'], { flags });
      const totalKib = Number(/(\d+) kB/.exec(stdout.toString())?.[1]);
      expect(totalKib).toBeGreaterThan(900 << 10);
      expect(totalKib).toBeLessThan(1024 << 10);
    }
    expect(templatesOf(scene).length).toBe(2);
  });

  it('lives on when its template is removed, and the next start makes another', async () => {
    const id = scene.id();
    await scene.start(id, ['sleep', '1000']);
    const { built } = await counts(scene);
    for (const name of templatesOf(scene)) await rm(join(scene.templatesDir, name), { recursive: true });
    expect((await execIn(scene, id, ['cat', '/etc/passwd'])).code).toBe(0);
    await echo(scene);
    expect(await counts(scene)).toMatchObject({ built: built + 1, damaged: 0 });
    await scene.remove(id);
  });

  it('is made anew when its template is damaged: the next kilnd looks', async () => {
    const directory = onlyTemplate(scene);
    await scene.stopKilnd();
    execFileSync(
      'dd',
      ['if=/dev/urandom', `of=${directory}/memory`, 'bs=4096', 'count=1', 'seek=5000', 'conv=notrunc'],
      {
        stdio: 'ignore',
      },
    );
    await echo(scene);
    expect(await counts(scene)).toMatchObject({ restored: 1, built: 1, damaged: 1 });
    expect((await warnings(scene)).at(-1)).toMatch(
      /^a template is damaged, and made anew: the files in .* are not what/,
    );
  });

  it('is never one of a host with another CPU, nor one that was copied from there', async () => {
    const here = onlyTemplate(scene);
    const record = readTemplateRecord(here);
    const parts = { ...record.parts, host: { ...record.parts.host, cpu: 'vendor_id : Another' } };
    const there = join(scene.templatesDir, templateKey(parts));
    await scene.stopKilnd();
    // As a cache that was taken along from another machine.
    await rename(here, there);
    writeTemplateRecord(there, { ...record, parts });
    await echo(scene);
    expect(await counts(scene)).toMatchObject({ restored: 1, built: 1, damaged: 0 });
    expect(templatesOf(scene).toSorted()).toEqual([basename(here), basename(there)].toSorted());
    await scene.stopKilnd();
    await rm(here, { recursive: true });
    await rename(there, here);
    await echo(scene);
    expect(await counts(scene)).toMatchObject({ restored: 1, built: 1, damaged: 1 });
    expect((await warnings(scene)).at(-1)).toMatch(
      /^a template is damaged, and made anew: .* was made for something else$/,
    );
    onlyTemplate(scene);
  });

  it('boots when it cannot be restored, with a warning', async () => {
    const directory = onlyTemplate(scene);
    const state = join(directory, 'state');
    // As if the disk had done it: nobody wrote to the file.
    await writeFile(join(scene.dir, 'reference'), '');
    execFileSync('touch', ['-r', state, join(scene.dir, 'reference')]);
    execFileSync('dd', ['if=/dev/urandom', `of=${state}`, 'bs=4096', 'count=1', 'conv=notrunc'], { stdio: 'ignore' });
    execFileSync('touch', ['-r', join(scene.dir, 'reference'), state]);
    const before = await counts(scene);
    await echo(scene);
    expect(await counts(scene)).toEqual({ ...before, restoresFailed: before.restoresFailed + 1 });
    expect((await warnings(scene)).at(-1)).toMatch(
      /^cannot restore from a template, which is removed: .*: QEMU ended at the restore of its state \(exit code 1\): /,
    );
    expect(templatesOf(scene)).toEqual([]);
  });
});

describe.runIf(underKiln)('a template that cannot be made', () => {
  const scene = useScene({ version: '2.1', ownTemplates: true });
  afterEach(() => scene.stopKilnd());

  it('because its virtual machine is killed: the container boots, and nothing is left', async () => {
    const id = scene.id();
    const started = echo(scene, id);
    signal(await builderOf(scene), 'SIGKILL');
    await started;
    expect(await counts(scene)).toMatchObject({ restored: 0, buildsFailed: 1 });
    expect((await warnings(scene)).at(-1)).toMatch(/^cannot make a template: virtual machines boot instead: /);
    expect(templatesOf(scene)).toEqual([]);
  });

  it('because nobody waits for it any more leaves nothing', async () => {
    const id = scene.id();
    await using program = scene.runStream(id, ['true']);
    const builder = await builderOf(scene);
    program.kill('SIGKILL');
    await program.exit;
    await scene.purge();
    await waitForEnd(builder, 20_000);
    // Its files are removed after it, and nobody is told.
    await expect.poll(() => templatesOf(scene), { timeout: 5_000 }).toEqual([]);
    await scene.assertNothingLeft();
  });

  it('because kilnd is killed is made by the next one, for the same start', async () => {
    const id = scene.id();
    const started = echo(scene, id);
    const builder = await builderOf(scene);
    for (const pid of scene.kilndPids()) signal(pid, 'SIGKILL');
    await started;
    await waitForEnd(builder, 20_000);
    expect(await counts(scene)).toMatchObject({ restored: 1, built: 1 });
    onlyTemplate(scene);
  });

  it('for want of room on the disk: the container boots, and the log says how much is there', async () => {
    await rm(scene.templatesDir, { recursive: true });
    execFileSync('mkdir', [scene.templatesDir]);
    execFileSync('mount', ['-t', 'tmpfs', '-o', 'size=64m', 'tmpfs', scene.templatesDir]);
    try {
      await echo(scene);
      expect(await counts(scene)).toMatchObject({ restored: 0, buildsFailed: 1 });
      expect((await warnings(scene)).at(-1)).toMatch(
        /: a template of 512 MiB of memory needs as much room in .*, which has 64 MiB$/,
      );
      await scene.stopKilnd();
    } finally {
      execFileSync('umount', [scene.templatesDir]);
    }
  });

  it.skipIf(hasKvm)('in the time that a boot may take: Create fails as without templates', async () => {
    await scene.configure('[vm]\nboot_timeout_s = 1\n');
    const { code, stderr } = await scene.run(scene.id(), ['true']);
    expect([code, stderr]).toEqual([1, expect.stringContaining('vm.boot_timeout_s')]);
    expect((await warnings(scene)).at(-1)).toMatch(/: no virtual machine was booted and saved within 1 s$/);
    await scene.configure('');
  });

  it('since templates are not wanted: the container boots', async () => {
    await scene.configure('[template]\nenabled = false\n');
    await echo(scene);
    expect(await counts(scene)).toMatchObject({ restored: 0, built: 0 });
    expect(templatesOf(scene)).toEqual([]);
  });
});

describe.runIf(underKiln)('a clone', () => {
  const scene = useScene({ version: '2.1' });

  it('that is killed ends its container alone', async () => {
    const [victim, survivor] = [scene.id(), scene.id()];
    await using events = await scene.events();
    for (const id of [victim, survivor]) await scene.start(id, ['sleep', '1000']);
    for (const pid of await helpersOf(scene, victim, 'qemu-system')) signal(pid, 'SIGKILL');
    expect((await events.waitFor('/tasks/exit', victim)).event.exit_status).toBe(137);
    expect((await execIn(scene, survivor, ['echo', 'here'])).stdout.toString()).toBe('here\n');
    for (const id of [victim, survivor]) await scene.remove(id);
  });

  it('that is killed during Create fails it, with the reason, and nothing is left', async () => {
    const id = scene.id();
    const gate = await Gate.make(scene, id);
    const hooks = { createRuntime: [gate.hook] };
    const watched = new Watched(await startVictim(scene, id, { command: short, hooks }));
    await gate.reached();
    for (const pid of await helpersOf(scene, id, 'qemu-system')) signal(pid, 'SIGKILL');
    await gate.open();
    const { code, said } = await watched.end();
    expect([code, said]).toEqual([1, expect.stringMatching(/the VM ended \(SIGKILL\) while .* was attached/)]);
    await scene.ctr(['container', 'rm', id]);
    await scene.assertNothingLeft();
  });

  it('whose kilnd is killed during Create is made again by the next one, and the container runs', async () => {
    const id = scene.id();
    const gate = await Gate.make(scene, id);
    const hooks = { createRuntime: [gate.hook] };
    const watched = new Watched(await startVictim(scene, id, { command: short, hooks }));
    await gate.reached();
    for (const pid of scene.kilndPids()) {
      signal(pid, 'SIGKILL');
      await waitForEnd(pid, 20_000);
    }
    await gate.open();
    const { code, said } = await watched.end();
    expect([code, said]).toEqual([5, '']);
    await scene.containerd.ctr(['task', 'rm', '--force', id]);
    await scene.ctr(['container', 'rm', id]);
  });
});
