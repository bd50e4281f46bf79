import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdirSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { BeyondCrun, resolveIn } from '../../../agent/beyond-crun.ts';
import { AgentError } from '../../../agent/errors.ts';

let child: ChildProcess;
let pid: number;
beforeEach(async () => {
  child = spawn('sleep', ['1000'], { stdio: 'ignore' });
  await once(child, 'spawn');
  pid = child.pid as number;
});
afterEach(async () => {
  child.kill('SIGKILL');
  if (child.exitCode === null && child.signalCode === null) await once(child, 'exit');
});

const beyond = (spec: object) => new BeyondCrun(Buffer.from(JSON.stringify(spec)));
const ofProcess = (process: object) => beyond({ process });

function errorOf(action: () => void): AgentError {
  try {
    action();
  } catch (error) {
    if (error instanceof AgentError) return error;
    throw error;
  }
  throw new Error('no error was thrown');
}

/** A field of /proc/<pid>/stat by its number in proc_pid_stat(5). */
const stat = (number: number): number =>
  Number(
    readFileSync(`/proc/${pid}/stat`, 'utf8')
      .replace(/^.*\) /, '')
      .split(' ')[number - 3],
  );
const [nice, policy] = [19, 41];

describe('of a spec, the init gets', () => {
  it('its scheduling policy and nice value', () => {
    ofProcess({ scheduler: { policy: 'SCHED_BATCH', nice: 7 } }).apply(pid);
    expect([stat(policy), stat(nice)]).toEqual([3, 7]);
    ofProcess({ scheduler: { policy: 'SCHED_IDLE' } }).apply(pid);
    expect(stat(policy)).toBe(5);
  });

  it('its flags of scheduling', () => {
    ofProcess({ scheduler: { policy: 'SCHED_OTHER', flags: ['SCHED_FLAG_RESET_ON_FORK'] } }).apply(pid);
    expect(stat(policy)).toBe(0);
  });

  it('its I/O priority', async () => {
    ofProcess({ ioPriority: { class: 'IOPRIO_CLASS_IDLE', priority: 0 } }).apply(pid);
    const ionice = spawn('ionice', ['-p', String(pid)], { stdio: ['ignore', 'pipe', 'inherit'] });
    const chunks: Buffer[] = [];
    for await (const chunk of ionice.stdout) chunks.push(chunk);
    expect(Buffer.concat(chunks).toString()).toContain('idle');
  });

  it('an OOM score of 0, which crun takes for none', () => {
    const file = `/proc/${pid}/oom_score_adj`;
    writeFileSync(file, '500');
    ofProcess({ oomScoreAdj: 500 }).apply(pid);
    expect(readFileSync(file, 'utf8')).toBe('500\n');
    ofProcess({ oomScoreAdj: 0 }).apply(pid);
    expect(readFileSync(file, 'utf8')).toBe('0\n');
  });

  it('nothing of a spec that says nothing, or is none', () => {
    for (const spec of ['{}', 'null', '{"process":', '[1]']) {
      const of = new BeyondCrun(Buffer.from(spec));
      of.check();
      of.apply(pid);
    }
    expect([stat(policy), stat(nice)]).toEqual([0, 0]);
  });
});

it('what the kernel refuses is an error with the field', () => {
  const error = errorOf(() => ofProcess({ scheduler: { policy: 'SCHED_FIFO', priority: 1000 } }).apply(pid));
  expect(error.code).toBe('invalid-argument');
  expect(error.message).toMatch(/^process\.scheduler: the guest's kernel refuses it: .*EINVAL/);
});

describe('a hook of the guest', () => {
  it('that is there is none of our business', () => {
    const hooks = { createContainer: [{ path: '/bin/sh' }], startContainer: [{ path: '/bin/sh' }] };
    beyond({ hooks }).check();
    beyond({ hooks }).apply(pid);
  });

  it('that is not there is refused by its path', () => {
    const hooks = {
      createContainer: [{ path: '/bin/sh' }, { path: '/no/such' }],
      startContainer: [{ path: '/etc/passwd' }],
    };
    const created = errorOf(() => beyond({ hooks }).check());
    expect([created.code, created.message]).toEqual([
      'invalid-argument',
      "hooks.createContainer[1]: /no/such is no program in the guest's image; such a hook does not run on the host",
    ]);
    expect(errorOf(() => beyond({ hooks }).apply(pid)).message).toBe(
      'hooks.startContainer[0]: /etc/passwd is no program in the container; such a hook does not run on the host',
    );
  });
});

describe('a path below another root', () => {
  let root: string;
  beforeEach(() => {
    root = mkdtempSync(join(tmpdir(), 'kiln-root-'));
    mkdirSync(join(root, 'usr/bin'), { recursive: true });
    writeFileSync(join(root, 'usr/bin/tool'), '');
    symlinkSync('usr/bin', join(root, 'bin'));
    symlinkSync('/usr/bin/tool', join(root, 'absolute'));
    symlinkSync('../../../../usr/bin/tool', join(root, 'usr/up'));
    symlinkSync('loop', join(root, 'loop'));
  });
  afterEach(() => rmSync(root, { recursive: true, force: true }));

  it.each(['/usr/bin/tool', '/bin/tool', '/absolute', '/usr/up', '//usr/./bin/../bin/tool', '/../../usr/bin/tool'])(
    '%s does not leave it',
    (path) => {
      expect(resolveIn(root, path)).toBe(join(root, 'usr/bin/tool'));
    },
  );

  it('that does not exist, or goes round in circles, is an error', () => {
    expect(() => resolveIn(root, '/bin/none')).toThrow('ENOENT');
    expect(() => resolveIn(root, '/loop')).toThrow('too many symbolic links');
  });
});
