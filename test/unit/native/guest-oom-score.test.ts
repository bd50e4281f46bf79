import { spawnSync } from 'node:child_process';
import { rmSync } from 'node:fs';
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { oomScoreOf } from '../../../agent/oom-score.ts';
import { compile, hasGcc, temporaryFolder } from './harness.ts';

describe.skipIf(!hasGcc)('kiln-oom-score', () => {
  const folder = temporaryFolder();
  const program = path.join(folder, 'oom-score');
  beforeAll(() => compile(['guest-oom-score.c'], program));
  afterAll(() => rmSync(folder, { recursive: true }));

  const run = (...args: string[]) => spawnSync(program, args, { encoding: 'utf8' });

  it('gives a program its score from the first moment, and its arguments as they are', () => {
    // What needs no privilege.
    const score = Math.min(1000, oomScoreOf(process.pid) + 7);
    const script = 'cat /proc/self/oom_score_adj; printf "%s|" "$@"';
    const { stdout } = run(String(score), 'sh', '-c', script, 'sh', 'a b', '$HOME', '', '*');
    expect(stdout).toBe(`${score}\na b|$HOME||*|`);
  });

  it.each([
    [[], 'usage: kiln-oom-score SCORE PROGRAM [ARGUMENT...]'],
    [['5'], 'usage: kiln-oom-score SCORE PROGRAM [ARGUMENT...]'],
    [['5000', 'true'], '5000: Invalid argument'],
    [['1000', 'no-such-program'], 'no-such-program: No such file or directory'],
  ])('says why it does not run for %j', (args, words) => {
    const { status, stderr } = run(...args);
    expect({ status, stderr }).toEqual({ status: 1, stderr: `${words}\n` });
  });
});
