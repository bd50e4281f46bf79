/** The matrix of test/support/fault-matrix.ts for the parts that serve all containers: kilnd and containerd. */
import { once } from 'node:events';
import { readdir } from 'node:fs/promises';
import { connect } from 'node:net';
import { basename, join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { beforeAll, describe, expect, it } from 'vitest';
import { type Part, report, stopMs } from '../support/fault-matrix.ts';
import { answerSeconds, goOn, kinds, lastLine, note, short } from '../support/fault-notes.ts';
import { underKiln } from '../support/paths.ts';
import type { Scene } from '../support/scene.ts';
import { useScene } from '../support/use-scene.ts';
import { Counter, directoryOf, Gate, letSaboteurIn, startIntoStart, startVictim, Watched } from '../support/victims.ts';
import { signal, waitForEnd } from '../support/wait-for-end.ts';
import { TaskClient } from '../unit/shim/task-client.ts';

/** A part that serves all containers of the host. */
interface Service {
  readonly part: Part;
  kill(scene: Scene): Promise<void>;
  pids(scene: Scene): number[];
  /** The exit code of the user's ctr, whose connection the fault may have ended. */
  readonly killedCode: number;
}

const services: readonly Service[] = [
  {
    part: 'kilnd',
    killedCode: 5,
    pids: (scene) => scene.kilndPids(),
    async kill(scene) {
      const pids = scene.kilndPids();
      expect(pids.length).toBe(1);
      for (const pid of pids) signal(pid, 'SIGKILL');
      for (const pid of pids) await waitForEnd(pid, 20_000);
    },
  },
  {
    part: 'containerd',
    killedCode: 1,
    pids: (scene) => [scene.containerd.pid],
    async kill(scene) {
      await scene.containerd.kill();
      await scene.containerd.restart();
    },
  },
];

for (const { part, kill, pids, killedCode } of services) {
  describe.runIf(underKiln).each(kinds)(`%s of ${part}`, (kind) => {
    const scene = useScene({ version: '2.1' });
    beforeAll(() => letSaboteurIn(scene));
    const strike = async () => {
      if (kind === 'SIGKILL') await kill(scene);
      else {
        const stopped = pids(scene);
        expect(stopped.length).toBe(1);
        for (const pid of stopped) signal(pid, kind);
        await sleep(stopMs);
        goOn(stopped);
      }
    };
    const expected = kind === 'SIGKILL' ? killedCode : 5;

    /** What is there of a container after its client's end; removes it. */
    async function rest(id: string): Promise<string> {
      const task = (await scene.tasks()).find((one) => one.id === id);
      if (task !== undefined) await scene.containerd.ctr(['task', 'rm', '--force', id]);
      await scene.ctr(['container', 'rm', id]);
      return task === undefined ? 'no task is there' : `the task is ${task.status}, and can be removed`;
    }

    async function throughGate(phase: 'Create' | 'Delete', point: 'createRuntime' | 'poststop'): Promise<void> {
      const id = scene.id();
      const gate = await Gate.make(scene, id);
      const watched = new Watched(await startVictim(scene, id, { command: short, hooks: { [point]: [gate.hook] } }));
      await gate.reached();
      const since = performance.now();
      const struck = strike();
      await gate.open();
      await struck;
      const { code, said } = await watched.end();
      const after = await rest(id);
      const saw = code === 5 ? 'nothing: the exit code arrives' : `ctr ends: ${lastLine(scene, said)}; then ${after}`;
      note({ part, fault: kind, phase, saw, code, since });
      expect(code, said).toBe(expected);
    }

    it('during Create', () => throughGate('Create', 'createRuntime'));

    it('during Start', async () => {
      const id = scene.id();
      const { watched, letGo } = await startIntoStart(scene, id, short);
      const since = performance.now();
      await strike();
      await letGo();
      const { code, said } = await watched.end();
      const after = await rest(id);
      const saw = code === 5 ? 'nothing: the exit code arrives' : `ctr ends: ${lastLine(scene, said)}; then ${after}`;
      note({ part, fault: kind, phase: 'Start', saw, code, since });
      expect(code, said).toBe(expected);
    });

    it('while running, idle and with output', async () => {
      const quiet = scene.id();
      const [, loud] = await Promise.all([
        scene.start(quiet, ['sh', '-c', 'trap "exit 7" TERM; while :; do sleep 1000 & wait $!; done']),
        Counter.start(scene),
      ]);
      await loud.goesOn();
      const since = performance.now();
      const struck = strike();
      // Nobody else can be asked, and ctr waits 10 s for a containerd that stands still for as long.
      if (kind === 'SIGKILL' || part === 'containerd') await struck;
      const tasks = await scene.tasks();
      const states = [quiet, loud.id].map((id) => tasks.find((task) => task.id === id)?.status ?? 'gone');
      await struck;
      const after = await scene.tasks();
      expect(after.map(({ status }) => status)).toEqual(['RUNNING', 'RUNNING']);
      const exec = await scene.ctr([
        ...['task', 'exec', '--fifo-dir', scene.fifoDir, '--exec-id', 'e', quiet, 'echo', 'here'],
      ]);
      expect(exec).toBe('here\n');
      // containerd waits 2 s for a State, and says UNKNOWN then.
      const allowed = kind === 'SIGSTOP' && part === 'kilnd' ? ['RUNNING', 'UNKNOWN'] : ['RUNNING'];
      for (const [index, phase] of (['running idle', 'running with output'] as const).entries()) {
        const saw = `state ${allowed.join(' or ')} meanwhile; exec and output go on`;
        note({ part, fault: kind, phase, saw, since });
        expect(allowed).toContain(states[index]);
      }
      await loud.goesOn();
      await using events = await scene.events();
      await scene.ctr(['task', 'kill', '--signal', 'SIGTERM', quiet]);
      expect((await events.waitFor('/tasks/exit', quiet)).event.exit_status).toBe(7);
      await scene.remove(quiet);
      // What was delivered when kilnd was killed may have come twice; nothing is missing.
      await loud.end(scene, events);
    });

    it('during Delete', () => throughGate('Delete', 'poststop'));

    it('leaves a Kiln that starts containers', async () => {
      expect(await scene.run(scene.id(), ['echo', 'fine'])).toMatchObject({ code: 0, stdout: Buffer.from('fine\n') });
    });
  });
}

describe.runIf(underKiln)('kilnd killed under load', () => {
  const scene = useScene({ version: '2.1' });
  const count = 10;

  it(`with ${count} running containers: none is lost, no output is missing, and all answer again`, async () => {
    const counters = await Promise.all(Array.from({ length: count }, () => Counter.start(scene)));
    const ids = counters.map(({ id }) => id);
    await Promise.all(counters.map((counter) => counter.goesOn()));
    const before = await scene.tasks();
    const sockets = await readdir(join(scene.stateDir, 's'));
    expect(sockets.length).toBe(count);

    const clients = await Promise.all(ids.map((id) => taskClient(scene, id)));
    const [pid = 0] = scene.kilndPids();
    const killedAt = performance.now();
    signal(pid, 'SIGKILL');
    await waitForEnd(pid, 20_000);
    // Pids is answered by the guest: the container is there again, from end to end.
    const answeredMs = await Promise.all(
      clients.map(async (client) => {
        const { processes } = await client.pids();
        expect(processes.length).toBeGreaterThan(0);
        return performance.now() - killedAt;
      }),
    );
    for (const client of clients) client.ttrpc.close();
    const sorted = answeredMs.toSorted((one, other) => one - other);
    const takeover = {
      containers: count,
      medianMs: Math.round(sorted[count / 2] ?? 0),
      maxMs: Math.round(sorted.at(-1) ?? 0),
    };
    report({ rows: [], takeover });
    expect(takeover.maxMs).toBeLessThan(answerSeconds * 1000);

    const byId = (tasks: typeof before) => tasks.toSorted((one, other) => one.id.localeCompare(other.id));
    expect(byId(await scene.tasks())).toEqual(byId(before));
    const execs = await Promise.all(
      ids.map((id) => scene.ctr(['task', 'exec', '--fifo-dir', scene.fifoDir, '--exec-id', 'e', id, 'echo', id])),
    );
    expect(execs).toEqual(ids.map((id) => `${id}\n`));
    await Promise.all(counters.map((counter) => counter.goesOn()));
    await using events = await scene.events();
    await Promise.all(counters.map((counter) => counter.end(scene, events)));
  });
});

/** The task's own socket: the start of a `ctr` takes longer than what is measured. */
async function taskClient(scene: Scene, id: string): Promise<TaskClient> {
  const socket = connect(join(scene.stateDir, 's', basename(await directoryOf(scene, id))));
  await once(socket, 'connect');
  return new TaskClient(socket, id);
}
