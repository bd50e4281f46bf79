/** The matrix of test/support/fault-matrix.ts for full disks. */
import { mkdir, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import type { Part, Phase } from '../support/fault-matrix.ts';
import { counting, execIn, idle, lastLine, note, short } from '../support/fault-notes.ts';
import { underKiln } from '../support/paths.ts';
import { ask } from '../support/saboteur.ts';
import { mustRun, run } from '../support/spawn.ts';
import { useScene } from '../support/use-scene.ts';
import { createVictim, directoryOf, letSaboteurIn, startIntoStart, startVictim, Watched } from '../support/victims.ts';

/** A small filesystem in memory over a folder, with what was in the folder; gone when it is disposed. */
async function smallDisk(
  folder: string,
  spareMib: number,
): Promise<AsyncDisposable & { fill(): Promise<void>; free(): Promise<void> }> {
  const { stdout } = await mustRun('du', ['-sm', folder]);
  const size = `size=${Number.parseInt(stdout.toString(), 10) + spareMib}m`;
  const next = `${folder}.small`;
  await mkdir(next);
  await mustRun('mount', ['-t', 'tmpfs', '-o', size, 'kt-small', next]);
  await mustRun('cp', ['-a', `${folder}/.`, next]);
  await mustRun('mount', ['--move', next, folder]);
  await rm(next, { recursive: true });
  const filler = join(folder, 'filler');
  return {
    fill: async () => {
      const { stderr } = await run('dd', ['if=/dev/zero', `of=${filler}`, 'bs=4k']);
      expect(stderr).toContain('No space left on device');
    },
    free: () => rm(filler, { force: true }),
    [Symbol.asyncDispose]: async () => {
      await mustRun('umount', [folder]);
    },
  };
}

describe.runIf(underKiln)('a full disk', () => {
  const scene = useScene({ version: '2.1' });
  beforeAll(() => letSaboteurIn(scene));
  const full = /no space left|disk is full|is full|ENOSPC/i;
  const fault = 'disk full';

  const rowsOf = (parts: readonly Part[], phases: readonly Phase[], saw: string, code: number, since: number) => {
    for (const part of parts) for (const phase of phases) note({ part, fault, phase, saw, code, since });
  };

  /** A container that comes into Start before the disk is full, and ends after. */
  async function fullFromStart(fill: () => Promise<void>, parts: readonly Part[]): Promise<string> {
    const id = scene.id();
    const { watched, letGo } = await startIntoStart(scene, id, short);
    const since = performance.now();
    await fill();
    await letGo();
    const { code, said } = await watched.end();
    const saw = code === 5 ? 'nothing: the exit code arrives' : `exit code ${code}: ${lastLine(scene, said)}`;
    rowsOf(parts, ['Start', 'Delete'], saw, code, since);
    expect(code, said).toBe(5);
    return id;
  }

  /** What a container that counts shows while the disk is full; ends it. */
  async function fullWhileRunning(id: string, watched: Watched, parts: readonly Part[], also = ''): Promise<void> {
    const since = performance.now();
    const seen = watched.lines.all.length;
    const [task] = await scene.tasks();
    await watched.lines.waitFor(() => watched.lines.all.length > seen + 20, 'more output');
    const exec = await execIn(scene, id, ['echo', 'here']);
    watched.close();
    const { code, said } = await watched.end();
    const execSaw = exec.code === 0 ? 'works' : `fails: ${lastLine(scene, exec.stderr)}`;
    const saw = `${also}state ${task?.status}; exec ${execSaw}, output goes on, the exit code arrives`;
    rowsOf(parts, ['running idle', 'running with output'], saw, code, since);
    expect(task?.status).toBe('RUNNING');
    expect(exec, exec.stderr).toMatchObject({ code: 0, stdout: Buffer.from('here\n') });
    expect(code, said).toBe(7);
  }

  it("of kilnd's state: containers start, run and end", async () => {
    await scene.stopKilnd();
    const disk = await smallDisk(scene.stateDir, 2);
    try {
      await disk.fill();
      const since = performance.now();
      const id = scene.id();
      const { code, stderr } = await scene.run(id, short);
      const saw = code === 5 ? 'nothing: the container runs' : `Create fails: ${lastLine(scene, stderr)}`;
      rowsOf(['kilnd'], ['Create'], saw, code, since);
      expect(code, stderr).toBe(5);
      await disk.free();

      await scene.ctr(['container', 'rm', await fullFromStart(disk.fill, ['kilnd'])]);
      await disk.free();

      const running = scene.id();
      const watched = new Watched(await startVictim(scene, running, { command: counting }));
      await watched.lines.waitFor((line) => line === '5', 'the first lines');
      await disk.fill();
      await fullWhileRunning(running, watched, ['kilnd']);
      await scene.ctr(['container', 'rm', running]);
      await disk.free();
      expect((await scene.run(scene.id(), ['true'])).code).toBe(0);
      await scene.stopKilnd();
      const { stdout } = await mustRun('find', [scene.stateDir, '-mindepth', '2']);
      expect(stdout.toString()).toBe('');
    } finally {
      await disk.free();
      await scene.purge();
      await scene.stopKilnd();
      await disk[Symbol.asyncDispose]();
    }
  });

  it('of containerd, with the writable layers: Create says so, the container sees it, and all can be removed', async () => {
    await scene.containerd.stop();
    const disk = await smallDisk(join(scene.containerd.dir, 'root'), 24);
    await scene.containerd.restart();
    try {
      const waiting = scene.id();
      await createVictim(scene, waiting, { command: short });
      const id = scene.id();
      const watched = new Watched(await startVictim(scene, id, { command: counting }));
      await watched.lines.waitFor((line) => line === '5', 'the first lines');
      await disk.fill();

      const since = performance.now();
      const start = await scene.containerd.ctr(['task', 'start', '--fifo-dir', scene.fifoDir, waiting]);
      rowsOf(['QEMU'], ['Create'], `Create fails: ${lastLine(scene, start.stderr)}`, start.code, since);
      expect(start.stderr).toMatch(full);
      const refused = await scene.run(scene.id(), ['true']);
      rowsOf(['containerd'], ['Create'], `Create fails: ${lastLine(scene, refused.stderr)}`, refused.code, since);
      expect(refused.stderr).toMatch(full);

      const write = await execIn(scene, id, ['dd', 'if=/dev/zero', 'of=/big', 'bs=1M', 'count=40', 'conv=fsync']);
      expect(write.code).not.toBe(0);
      const says = write.stderr.match(/^dd: .*: (.*)$/m)?.[1] ?? write.stderr.trim();
      await fullWhileRunning(id, watched, ['QEMU', 'containerd'], `a write in the container fails ("${says}"); `);
      await disk.free();
      await fullFromStart(disk.fill, ['QEMU', 'containerd']);
      await disk.free();
      expect((await scene.run(scene.id(), ['true'])).code).toBe(0);
    } finally {
      await disk.free();
      await scene.purge();
      await scene.stopKilnd();
      await scene.containerd.stop();
      await disk[Symbol.asyncDispose]();
      await scene.containerd.restart();
    }
  });

  it('of the guest, which the agent and crun share: exec says so, and works when there is space again', async () => {
    const id = scene.id();
    const watched = new Watched(await startVictim(scene, id, { command: idle }));
    await watched.lines.waitFor((line) => line === 'up', 'up');
    await (await ask(await directoryOf(scene, id), 'FILL')).hit;
    const since = performance.now();
    const exec = await execIn(scene, id, ['echo', 'here']);
    const saw = `exec fails: ${lastLine(scene, exec.stderr)}; works when there is space again`;
    note({ part: 'agent', fault, phase: 'running idle', saw, code: exec.code, since });
    expect(exec.stderr).toMatch(full);
    expect((await scene.tasks())[0]?.status).toBe('RUNNING');
    await (await ask(await directoryOf(scene, id), 'FREE')).hit;
    expect(await execIn(scene, id, ['echo', 'again'])).toMatchObject({ code: 0, stdout: Buffer.from('again\n') });
    watched.close();
    expect((await watched.end()).code).toBe(7);
    await scene.ctr(['container', 'rm', id]);
  });
});
