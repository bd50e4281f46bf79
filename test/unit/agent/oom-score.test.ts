import { expect, it } from 'vitest';
import { oomScoreOf, withOomScore } from '../../../agent/oom-score.ts';

it('leaves a command line as it is where its score is the agent’s, or lower', () => {
  const own = oomScoreOf(process.pid);
  for (const score of [own, own - 1]) {
    expect(withOomScore(score, 'kiln-oom-score', ['crun', 'create'])).toEqual(['crun', 'create']);
  }
});

it('has a program raise the score before it is the other one', () => {
  const score = oomScoreOf(process.pid) + 1;
  const line = withOomScore(score, 'kiln-oom-score', ['crun', 'create', 'a b']);
  expect(line).toEqual(['kiln-oom-score', String(score), 'crun', 'create', 'a b']);
});
