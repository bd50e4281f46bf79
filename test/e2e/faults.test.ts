/**
 * The matrix of test/support/fault-matrix.ts for the parts of one virtual machine. Each phase is reached by what happens in
 * it, never by time: a hook that holds it up, a line of output, an event. That a new container starts after a fault is
 * shown by the next case, and at the end.
 */
import { constants } from 'node:os';
import { setTimeout as sleep } from 'node:timers/promises';
import { beforeAll, describe, expect, it } from 'vitest';
import { type Phase, stopMs } from '../support/fault-matrix.ts';
import {
  counting,
  execIn,
  goOn,
  idle,
  type Kind,
  kinds,
  lastLine,
  note,
  short,
  unread,
} from '../support/fault-notes.ts';
import { underKiln } from '../support/paths.ts';
import { ask } from '../support/saboteur.ts';
import type { Scene } from '../support/scene.ts';
import { openStdout } from '../support/stdout-fifo.ts';
import { useScene } from '../support/use-scene.ts';
import {
  createVictim,
  directoryOf,
  Gate,
  helpersOf,
  letSaboteurIn,
  startIntoStart,
  startVictim,
  Watched,
} from '../support/victims.ts';
import { signal } from '../support/wait-for-end.ts';

const vmParts = ['QEMU', 'vhost-device-vsock', 'agent', 'crun'] as const;
type VmPart = (typeof vmParts)[number];

/** Where the host sees the part itself. */
const hostPrograms: Partial<Record<VmPart, string>> = {
  QEMU: 'qemu-system',
  'vhost-device-vsock': 'vhost-device-vsock',
};

/** The verb of crun by which the saboteur knows it in a phase, where there is one; it waits for it. */
const crunVerbs: Readonly<Partial<Record<Phase, string>>> = {
  Create: 'create',
  'running idle': 'exec',
};

/**
 * Makes a part of one virtual machine fail: kills it, or stops it for a while. Resolves when that has happened, crun's
 * when it will; `over` when the part goes on.
 */
async function strikeVm(
  scene: Scene,
  id: string,
  part: VmPart,
  kind: Kind,
  phase: Phase,
): Promise<{ over: Promise<void> }> {
  const program = hostPrograms[part];
  if (program !== undefined) {
    const pids = await helpersOf(scene, id, program);
    expect(pids.length).toBeGreaterThan(0);
    for (const pid of pids) signal(pid, kind);
    return { over: kind === 'SIGKILL' ? Promise.resolve() : sleep(stopMs).then(() => goOn(pids)) };
  }
  const [comm, argument] = part === 'crun' ? ['crun', crunVerbs[phase]] : ['-', '/usr/lib/kiln/agent.cjs'];
  const seconds = kind === 'SIGKILL' ? 0 : stopMs / 1000;
  const command = `SIGNAL ${constants.signals[kind]} ${comm} ${argument} ${seconds}`;
  const { hit, done } = await ask(await directoryOf(scene, id), command);
  if (part !== 'crun') await hit;
  return { over: done };
}

/** The exit codes of a container whose virtual machine or agent is gone. */
const lost = [137, 255];

describe.runIf(underKiln).each(kinds)('%s of a part of a virtual machine', (kind) => {
  const scene = useScene({ version: '2.1' });
  /** Side by side, which also shows that no fault reaches a neighbour. */
  const each = async (run: (part: VmPart) => Promise<void>): Promise<void> => {
    await Promise.all(vmParts.map(run));
  };
  beforeAll(() => letSaboteurIn(scene));

  it('during Create: an error, or the container runs', () =>
    each(async (part) => {
      const id = scene.id();
      const gate = await Gate.make(scene, id);
      const watched = new Watched(
        await startVictim(scene, id, { command: short, hooks: { createRuntime: [gate.hook] } }),
      );
      await gate.reached();
      const since = performance.now();
      const { over } = await strikeVm(scene, id, part, kind, 'Create');
      await gate.open();
      const { code, said } = await watched.end();
      await over;
      const saw = code === 5 ? 'the container runs, its exit code arrives' : `Create fails: ${lastLine(scene, said)}`;
      note({ part, fault: kind, phase: 'Create', saw, code, since });
      expect([part, code], said).toEqual([part, kind === 'SIGKILL' ? 1 : 5]);
      await scene.ctr(['container', 'rm', id]);
    }));

  it('during Start: an error, the exit of a lost container, or the container runs', () =>
    each(async (part) => {
      if (part === 'crun') return;
      const id = scene.id();
      const { watched, letGo } = await startIntoStart(scene, id, short);
      const since = performance.now();
      const { over } = await strikeVm(scene, id, part, kind, 'Start');
      await letGo();
      const { code, said } = await watched.end();
      await over;
      const failed = lost.includes(code) ? `the task exits with ${code}` : `Start fails: ${lastLine(scene, said)}`;
      const saw = code === 5 ? 'the container runs, its exit code arrives' : failed;
      note({ part, fault: kind, phase: 'Start', saw, code, since });
      expect(kind === 'SIGKILL' ? [1, ...lost] : [5], `${part}: ${said}`).toContain(code);
      await scene.containerd.ctr(['task', 'rm', '--force', id]);
      await scene.ctr(['container', 'rm', id]);
    }));

  it.each([
    ['running idle', idle],
    ['running with output', counting],
  ] as const)('while %s: it exits as lost, or goes on', (phase, command) =>
    each(async (part) => {
      if (part === 'crun' && phase === 'running with output') return;
      const id = scene.id();
      const watched = new Watched(await startVictim(scene, id, { command }));
      await watched.lines.waitFor((line) => line === 'up' || line === '5', 'the first line');
      if (part === 'crun') await whileExec(id);
      else if (kind === 'SIGKILL') await untilLost(part, phase, id, watched);
      else await untilItGoesOn(part, phase, id, watched);
      if (part === 'crun' || kind === 'SIGSTOP') {
        watched.close();
        expect((await watched.end()).code).toBe(7);
      }
      await scene.ctr(['container', 'rm', id]);
    }),
  );

  async function untilLost(part: VmPart, phase: Phase, id: string, watched: Watched): Promise<void> {
    const since = performance.now();
    await strikeVm(scene, id, part, kind, phase);
    const { code, said } = await watched.end();
    note({ part, fault: kind, phase, saw: `the task exits with ${code}`, code, since });
    expect(lost, `${part}: ${said}`).toContain(code);
  }

  async function untilItGoesOn(part: VmPart, phase: Phase, id: string, watched: Watched): Promise<void> {
    const since = performance.now();
    const { over } = await strikeVm(scene, id, part, kind, phase);
    const status = (await scene.tasks()).find((task) => task.id === id)?.status;
    await over;
    const before = watched.lines.all.length;
    const exec = await execIn(scene, id, ['echo', 'here']);
    if (phase === 'running with output') {
      await watched.lines.waitFor(() => watched.lines.all.length > before + 20, 'more output');
      const numbers = watched.lines.all.map(Number);
      expect(numbers).toEqual(numbers.map((_, index) => index + 1));
    }
    note({ part, fault: kind, phase, saw: `state ${status} meanwhile; afterwards exec and output go on`, since });
    expect(status).toBe('RUNNING');
    expect(exec).toMatchObject({ code: 0, stdout: Buffer.from('here\n') });
  }

  /** crun is there while something is exec'd. */
  async function whileExec(id: string): Promise<void> {
    const since = performance.now();
    const { over } = await strikeVm(scene, id, 'crun', kind, 'running idle');
    const exec = await execIn(scene, id, ['echo', 'here']);
    await over;
    const saw = exec.code === 0 ? 'exec is late, and runs' : `exec fails: ${lastLine(scene, exec.stderr)}`;
    note({ part: 'crun', fault: kind, phase: 'running idle', saw, code: exec.code, since });
    expect(exec.code === 0, exec.stderr).toBe(kind === 'SIGSTOP');
    expect(await execIn(scene, id, ['echo', 'again'])).toMatchObject({ code: 0, stdout: Buffer.from('again\n') });
  }

  it('during Delete: it succeeds, with the exit code that was told', async () => {
    await using events = await scene.events();
    await each(async (part) => {
      if (part === 'crun') return;
      const id = scene.id();
      await createVictim(scene, id, { command: unread });
      await scene.ctr(['task', 'start', '--detach', '--fifo-dir', scene.fifoDir, id]);
      const exit = await events.waitFor('/tasks/exit', id);
      const since = performance.now();
      const removal = scene.containerd.ctr(['task', 'rm', id]);
      const { over } = await strikeVm(scene, id, part, kind, 'Delete');
      await drain(scene, id);
      const { code, stderr } = await removal;
      await over;
      // ctr warns of the exit code that Delete has returned.
      const ok = code === 0 && /exit code 5/.test(stderr);
      const saw = ok ? 'Delete succeeds, with the exit code' : `Delete fails: ${lastLine(scene, stderr)}`;
      note({ part, fault: kind, phase: 'Delete', saw, code, since });
      expect([part, ok, exit.event.exit_status], `${code}: ${stderr}`).toEqual([part, true, 5]);
      await scene.ctr(['container', 'rm', id]);
    });
  });

  it('leaves a Kiln that starts containers', async () => {
    expect(await scene.run(scene.id(), ['echo', 'fine'])).toMatchObject({ code: 0, stdout: Buffer.from('fine\n') });
  });
});

/** Reads all that a detached container has left in its FIFO, if that is still there. */
async function drain(scene: Scene, id: string): Promise<void> {
  const reader = openStdout(scene, id)?.resume();
  if (reader !== undefined) await new Promise((resolve) => reader.once('close', resolve));
}
