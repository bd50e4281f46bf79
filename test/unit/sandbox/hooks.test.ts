import { chmodSync, existsSync, mkdirSync, readFileSync, rmdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterEach, describe, expect, it } from 'vitest';
import { KilnError } from '../../../src/errors.ts';
import type { ContainerHook } from '../../../src/sandbox/hooks.ts';
import { failure, type Script } from '../guest/scripted-agent.ts';
import { canMakeNetns, isAlive, Workbench } from './workbench.ts';

const benches: Workbench[] = [];
function bench(script: Script = {}): Workbench {
  const made = new Workbench(script);
  benches.push(made);
  return made;
}
afterEach(async () => {
  for (const made of benches.splice(0)) await made[Symbol.asyncDispose]();
});

/** A hook that is a few lines of shell; they run in the bundle, which is the workbench's own folder. */
const hook = (name: string, script: string, more: Partial<ContainerHook> = {}): ContainerHook => ({
  name,
  path: '/bin/sh',
  args: ['sh', '-c', script],
  env: ['PATH=/usr/bin:/bin'],
  ...more,
});

/** A hook that writes its name and its state into `trace`. */
const tracing = (name: string, then = 'true'): ContainerHook =>
  hook(name, `printf '%s ' ${name} >> trace; cat >> trace; echo >> trace; ${then}`);

interface Traced {
  readonly name: string;
  readonly state: { status: string; pid?: number; annotations: Record<string, string> };
}

function trace(made: Workbench): Traced[] {
  const file = join(made.root, 'trace');
  if (!existsSync(file)) return [];
  return readFileSync(file, 'utf8')
    .trim()
    .split('\n')
    .map((line) => {
      const space = line.indexOf(' ');
      return { name: line.slice(0, space), state: JSON.parse(line.slice(space + 1)) };
    });
}
const names = (made: Workbench): string[] => trace(made).map(({ name }) => name);

async function failureOf(promise: Promise<unknown>): Promise<KilnError> {
  const error: unknown = await promise.then(
    () => new Error('it succeeded'),
    (thrown: unknown) => thrown,
  );
  return KilnError.from(error);
}

const allHooks = {
  prestart: [tracing('prestart[0]'), tracing('prestart[1]')],
  createRuntime: [tracing('createRuntime[0]')],
  poststart: [tracing('poststart[0]')],
  poststop: [tracing('poststop[0]'), tracing('poststop[1]')],
};

describe.skipIf(!canMakeNetns)('the hooks of a container', () => {
  it('run in the order of its life, each told the state of that moment', async () => {
    const made = bench();
    made.hooks = allHooks;
    const container = await made.create();
    expect(names(made)).toEqual(['prestart[0]', 'prestart[1]', 'createRuntime[0]']);
    await container.start();
    await container.destroy();
    const traced = trace(made);
    expect(traced.map(({ name, state }) => `${name} ${state.status}`)).toEqual([
      'prestart[0] creating',
      'prestart[1] creating',
      'createRuntime[0] creating',
      'poststart[0] running',
      'poststop[0] stopped',
      'poststop[1] stopped',
    ]);
    const alive = { ociVersion: '1.2.1', id: 'c1', bundle: made.root, pid: container.pid };
    const annotations = { 'org.example': 'x' };
    const namespace = { 'nerdctl/network-namespace': `/proc/${container.pid}/ns/net` };
    expect(traced[0]?.state).toEqual({ ...alive, status: 'creating', annotations: { ...annotations, ...namespace } });
    expect(traced[3]?.state).toEqual({ ...alive, status: 'running', annotations });
    const { pid: _, ...ended } = alive;
    expect(traced[4]?.state).toEqual({ ...ended, status: 'stopped', annotations });
  });

  it("run while the container's network namespace is there, and before the guest has made anything", async () => {
    const made = bench({
      createContainer: (_call, done) => {
        made.events.push('created in the guest');
        expect(existsSync(join(made.root, 'namespace'))).toBe(true);
        done(null, { pid: 1 });
      },
    });
    const script = `pid=$(sed 's/.*"pid":\\([0-9]*\\).*/\\1/'); readlink /proc/$pid/ns/net > namespace`;
    made.hooks = { createRuntime: [hook('createRuntime[0]', script)] };
    await made.create();
    expect(made.events).toContain('created in the guest');
    const namespace = readFileSync(join(made.root, 'namespace'), 'utf8').trim();
    expect(namespace).toMatch(/^net:/);
  });

  it('after the end run when all else is gone, and once', async () => {
    const made = bench();
    made.hooks = { poststop: [tracing('poststop[0]', '[ ! -e c1 ] && : > nothing-left')] };
    const container = await made.create();
    const pid = container.pid;
    await Promise.all([container.destroy(), container.destroy()]);
    await container.destroy();
    expect(names(made)).toEqual(['poststop[0]']);
    expect(existsSync(join(made.root, 'nothing-left'))).toBe(true);
    expect(isAlive(pid)).toBe(false);
  });
});

describe.skipIf(!canMakeNetns)('a bundle that is gone', () => {
  it('does not keep the poststop hooks from running', async () => {
    const made = bench();
    made.bundle = join(made.root, 'bundle');
    mkdirSync(made.bundle);
    made.hooks = { poststop: [hook('poststop[0]', `pwd > ${made.root}/where`)] };
    const container = await made.create();
    rmdirSync(made.bundle);
    await container.destroy();
    expect(readFileSync(join(made.root, 'where'), 'utf8')).toBe('/\n');
  });
});

describe.skipIf(!canMakeNetns)('a hook that fails', () => {
  it.each(['prestart', 'createRuntime'] as const)('at %s fails Create with its words, and ends all', async (moment) => {
    const made = bench();
    const list = [tracing('first'), hook('failing', 'echo no bridge >&2; exit 2'), tracing('last')];
    made.hooks = { ...allHooks, prestart: [], createRuntime: [], [moment]: list };
    const error = await failureOf(made.create());
    expect([error.code, error.message]).toEqual(['internal', 'failing: /bin/sh failed (exit code 2): no bridge']);
    expect(names(made)).toEqual(['first', 'poststop[0]', 'poststop[1]']);
    expect(made.clean).toBe(true);
    expect(made.events).toEqual(['vm killed', 'rootfs released']);
  });

  it('at poststart fails Start with its words, and the container is ended', async () => {
    const made = bench();
    made.hooks = { ...allHooks, poststart: [hook('poststart[0]', 'echo too late >&2; exit 2'), tracing('never')] };
    const container = await made.create();
    const error = await failureOf(container.start());
    expect(error.message).toBe('poststart[0]: /bin/sh failed (exit code 2): too late');
    expect(container.state).toMatchObject({ kind: 'stopped', exit: { status: 137 } });
    await container.delete();
    expect(names(made).slice(3)).toEqual(['poststop[0]', 'poststop[1]']);
  });

  it('at poststop is told in the log, and the next ones run', async () => {
    const made = bench();
    made.hooks = { poststop: [hook('poststop[0]', 'echo stuck >&2; exit 1'), tracing('poststop[1]')] };
    const container = await made.create();
    await container.destroy();
    expect(made.logged('warn')).toContain('a poststop hook failed: poststop[0]: /bin/sh failed (exit code 1): stuck');
    expect(names(made)).toEqual(['poststop[1]']);
  });

  it('because it took too long fails Create in time', async () => {
    const made = bench();
    made.hooks = { createRuntime: [hook('createRuntime[0]', 'sleep 1000', { timeoutMs: 100 })] };
    const error = await failureOf(made.create());
    expect([error.code, error.message]).toEqual([
      'deadline-exceeded',
      'createRuntime[0]: /bin/sh took longer than its timeout of 0.1 s',
    ]);
  });
});

describe.skipIf(!canMakeNetns)('a Create that fails', () => {
  it('after the hooks runs the poststop hooks', async () => {
    const made = bench({ createContainer: (_call, done) => done(failure('INVALID_ARGUMENT', 'bad spec')) });
    made.hooks = allHooks;
    expect((await failureOf(made.create())).message).toBe('bad spec');
    expect(names(made).slice(3)).toEqual(['poststop[0]', 'poststop[1]']);
  });

  it('before the hooks runs none', async () => {
    const made = bench();
    made.hooks = allHooks;
    made.prepareRootfs = async () => {
      throw new KilnError('resource-exhausted', 'no space');
    };
    await failureOf(made.create());
    expect(names(made)).toEqual([]);
  });
});

describe.skipIf(!canMakeNetns)('a hook that never ends', () => {
  it('is ended when its Create is given up', async () => {
    const made = bench();
    const abort = new AbortController();
    const reason = new KilnError('canceled', 'deleted meanwhile');
    const path = join(made.root, 'hook');
    writeFileSync(path, '#!/bin/sh\necho $$ > pid.new; mv pid.new pid; exec sleep 1000\n');
    chmodSync(path, 0o755);
    made.hooks = { createRuntime: [{ name: 'createRuntime[0]', path, env: ['PATH=/usr/bin:/bin'] }] };
    const creating = failureOf(made.create(abort.signal));
    while (!existsSync(join(made.root, 'pid'))) await new Promise(setImmediate);
    abort.abort(reason);
    expect(await creating).toBe(reason);
    expect(isAlive(Number(readFileSync(join(made.root, 'pid'), 'utf8')))).toBe(false);
    expect(made.clean).toBe(true);
  });

  it('at poststart is ended when the container is deleted', async () => {
    const made = bench();
    made.hooks = { poststart: [hook('poststart[0]', ': > running; sleep 1000')], poststop: [tracing('poststop[0]')] };
    const container = await made.create();
    const starting = failureOf(container.start());
    while (!existsSync(join(made.root, 'running'))) await new Promise(setImmediate);
    await container.destroy();
    expect((await starting).code).toBe('canceled');
    expect(names(made)).toEqual(['poststop[0]']);
  });
});
