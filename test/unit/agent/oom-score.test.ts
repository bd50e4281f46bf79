import { execFileSync } from 'node:child_process';
import { describe, expect, it } from 'vitest';
import { oomScoreOf, withOomScore } from '../../../agent/oom-score.ts';

describe('a program that is started with an OOM score', () => {
  it('has it from its first moment, and its arguments as they are', () => {
    const score = Math.min(1000, oomScoreOf(process.pid) + 7);
    const script = 'cat /proc/self/oom_score_adj; printf "%s|" "$@"';
    const args = ['-c', script, 'sh', 'a b', '$HOME', '', '*'];
    const output = execFileSync(...withOomScore(score, 'sh', args), { encoding: 'utf8' });
    expect(output).toBe(`${score}\na b|$HOME||*|`);
  });

  it('keeps a higher one of its parent', () => {
    const [program, args] = withOomScore(-900, 'cat', ['/proc/self/oom_score_adj']);
    expect(Number(execFileSync(program, args, { encoding: 'utf8' }))).toBe(oomScoreOf(process.pid));
  });

  it('is not started when there is no such score', () => {
    expect(() => execFileSync(...withOomScore(5000, 'true', []), { stdio: 'pipe' })).toThrow();
  });
});
