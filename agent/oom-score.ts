/**
 * The OOM score of processes that join a container. Every process inherits its parent's oom_score_adj, proc(5), and the
 * agent's is -1000: "never". For a container's init crun sets what the spec says; for a process that joins with
 * `crun exec` it sets nothing (1.8), and there is no moment between crun and the process at which somebody else could.
 * So crun itself starts with the container's score.
 */
import { readFileSync } from 'node:fs';

/** The oom_score_adj of a process. */
export function oomScoreOf(pid: number): number {
  return Number(readFileSync(`/proc/${pid}/oom_score_adj`, 'utf8'));
}

/** A command line that runs a program with an oom_score_adj. Raising it needs no privilege. */
export function withOomScore(
  score: number,
  command: string,
  args: readonly string[],
): [command: string, args: string[]] {
  return ['/bin/sh', ['-c', 'echo "$0" >/proc/self/oom_score_adj && exec "$@"', String(score), command, ...args]];
}
