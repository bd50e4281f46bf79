import { execFileSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { constants, tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { busyboxLayer, type Image } from '../support/images.ts';
import { projectRoot, runtime, underKiln } from '../support/paths.ts';
import { Lines, type RunningProgram, type RunResult } from '../support/spawn.ts';
import { useScene } from '../support/use-scene.ts';

/** busybox, and /recorder: see signal-recorder.c. */
const recorderImage: Image = {
  name: 'docker.io/kiln/recorder:test',
  get layers() {
    const folder = mkdtempSync(join(tmpdir(), 'kt-recorder-'));
    try {
      const program = join(folder, 'recorder');
      const source = join(projectRoot, 'test', 'support', 'signal-recorder.c');
      execFileSync('gcc', ['-O2', '-s', '-static', '-Wall', '-Wextra', '-Werror', '-o', program, source]);
      const content = readFileSync(program);
      return [busyboxLayer(), [{ kind: 'file', path: 'recorder', mode: 0o755, content }] as const];
    } finally {
      rmSync(folder, { recursive: true });
    }
  },
};

const numbers = Array.from({ length: 64 }, (_, index) => index + 1);
const untouchable: readonly number[] = [constants.signals.SIGKILL, constants.signals.SIGSTOP];
const catchable = numbers.filter((number) => !untouchable.includes(number));

/** Every name that `ctr` knows, with its number: those of signal(7), and the real-time signals counted from both ends. */
const names: readonly (readonly [string, number])[] = [
  ...Object.entries(constants.signals).filter(([name, number]) => name !== 'SIGUNUSED' && catchable.includes(number)),
  ...Array.from({ length: 16 }, (_, index) => [index === 0 ? 'SIGRTMIN' : `SIGRTMIN+${index}`, 34 + index] as const),
  ...Array.from({ length: 15 }, (_, index) => [index === 0 ? 'SIGRTMAX' : `RTMAX-${index}`, 64 - index] as const),
];

const numbersOf = (lines: readonly string[], who: 'init' | 'child'): number[] =>
  lines.flatMap((line) => (line.startsWith(`${who} `) ? [Number(line.split(' ')[1])] : [])).sort((a, b) => a - b);

describe('signals', () => {
  const scene = useScene({ version: '2.1', images: [recorderImage] });
  const kill = (id: string, ...flags: string[]): Promise<RunResult> =>
    scene.containerd.ctr(['task', 'kill', ...flags, id]);

  /** A recorder that runs; `lines` is what it said since the last `take`. */
  async function recorder(id: string): Promise<{ program: RunningProgram; lines: Lines; take(): string[] }> {
    const program = scene.runStream(id, ['/recorder'], { image: recorderImage.name });
    program.stderr.resume();
    const lines = new Lines(program.stdout);
    for (const who of ['init', 'child']) await lines.waitFor((line) => line === `${who} ready`, `${who} ready`);
    return { program, lines, take: () => lines.all.splice(0) };
  }

  it('reach the init process by number and by name, or all processes, and end it in the end', async () => {
    const id = scene.id();
    const { program, lines, take } = await recorder(id);
    await using _program = program;
    const seen = (who: 'init' | 'child', number: number) =>
      lines.waitFor((line) => line === `${who} ${number}`, `${who} ${number}`);
    const succeed = { code: 0, stderr: '' };
    take();

    // One after the other, as a second one of a kind would be lost while the first is pending.
    for (const number of catchable) {
      expect(await kill(id, '--signal', `${number}`), `signal ${number}`).toMatchObject(succeed);
      await seen('init', number);
    }
    expect(numbersOf(lines.all, 'init')).toEqual(catchable);
    expect(numbersOf(lines.all, 'child')).toEqual([]);

    for (const [name, number] of names) {
      take();
      expect(await kill(id, '--signal', name), name).toMatchObject(succeed);
      await seen('init', number);
      expect(lines.all).toEqual([`init ${number}`]);
    }

    for (const name of ['SIGTERM', 'SIGUSR1', 'SIGRTMIN+5']) {
      take();
      const [, number = 0] = names.find(([known]) => known === name) ?? [];
      expect(await kill(id, '--all', '--signal', name), name).toMatchObject(succeed);
      await Promise.all([seen('init', number), seen('child', number)]);
      expect(lines.all.toSorted()).toEqual([`child ${number}`, `init ${number}`]);
    }

    // Without --signal it is the image's stop signal, or SIGTERM.
    take();
    expect(await kill(id)).toMatchObject(succeed);
    await seen('init', constants.signals.SIGTERM);

    // Stopped, the init says nothing, however long ago the child has answered; continued, it has lost nothing.
    take();
    expect(await kill(id, '--signal', 'SIGSTOP')).toMatchObject(succeed);
    expect(await kill(id, '--signal', 'SIGUSR1')).toMatchObject(succeed);
    expect(await kill(id, '--all', '--signal', 'SIGUSR2')).toMatchObject(succeed);
    await seen('child', constants.signals.SIGUSR2);
    expect(numbersOf(lines.all, 'init')).toEqual([]);
    expect(await scene.tasks()).toMatchObject([{ id, status: 'RUNNING' }]);
    expect(await kill(id, '--signal', 'SIGCONT')).toMatchObject(succeed);
    for (const number of [constants.signals.SIGCONT, constants.signals.SIGUSR1, constants.signals.SIGUSR2]) {
      await seen('init', number);
    }

    for (const wrong of ['65', '99', '4294967295', '-1']) {
      const refused = await kill(id, `--signal=${wrong}`);
      expect(refused.code, wrong).toBe(1);
      if (underKiln) expect(refused.stderr).toContain(`there is no signal ${wrong === '-1' ? '4294967295' : wrong}`);
    }
    for (const wrong of ['0', 'SIGNONE', 'SIGRTMAX+1']) expect((await kill(id, `--signal=${wrong}`)).code).toBe(1);
    expect(await scene.tasks()).toMatchObject([{ id, status: 'RUNNING' }]);

    expect(await kill(id, '--signal', 'KILL')).toMatchObject(succeed);
    expect(await program.exit).toBe(137);
  });

  /** `ctr` that creates the task, and then cannot write its pid: it leaves a task that was never started. */
  async function createOnly(id: string): Promise<void> {
    await scene.ctr(['container', 'create', '--runtime', runtime, recorderImage.name, id, '/recorder']);
    const flags = ['--detach', '--null-io', '--fifo-dir', scene.fifoDir, '--pid-file', join(scene.dir, 'none', 'pid')];
    expect((await scene.containerd.ctr(['task', 'start', ...flags, id])).stderr).toContain('no such file');
    expect(await scene.tasks()).toMatchObject([{ id, status: 'CREATED' }]);
  }

  it.each([
    ['SIGKILL', 137, 137],
    // runc's init is a program of Go, whose runtime makes 2 of it.
    ['SIGTERM', 143, 2],
  ])(
    'before the start: %s ends the task, and what comes after its end finds no process',
    async (deadly, status, runcStatus) => {
      const id = scene.id();
      await using events = await scene.events();
      await createOnly(id);
      for (const unheard of ['SIGUSR1', 'SIGWINCH', 'SIGRTMIN+3']) {
        expect(await kill(id, '--signal', unheard)).toMatchObject({ code: 0, stderr: '' });
      }
      expect(await scene.tasks()).toMatchObject([{ id, status: 'CREATED' }]);
      expect(await kill(id, '--signal', deadly)).toMatchObject({ code: 0, stderr: '' });
      expect((await events.waitFor('/tasks/exit', id)).event.exit_status).toBe(underKiln ? status : runcStatus);
      expect(await scene.tasks()).toMatchObject([{ id, status: 'STOPPED' }]);
      // With --all, runc looks for processes that are left. Kiln's went with the virtual machine.
      for (const flags of [['SIGTERM'], ['SIGKILL'], ...(underKiln ? [['SIGKILL', '--all']] : [])]) {
        const late = await kill(id, '--signal', ...flags);
        expect(late.code).toBe(1);
        expect(late.stderr).toContain('process already finished');
      }
      const removed = await scene.containerd.ctr(['task', 'rm', id]);
      expect(removed.stderr).toContain(`${underKiln ? status : runcStatus}`);
      await scene.ctr(['container', 'rm', id]);
    },
  );
});
