/**
 * The OOM score of a container's processes. Every process inherits its parent's oom_score_adj, proc(5), and the agent's is
 * -1000: "never". crun sets the score of a container's init if the spec has one that is not 0, and never that of a process
 * which joins with `crun exec` (1.8); and there is no moment between crun and the process at which somebody else could. So
 * crun itself starts with the container's score. The other calls of crun keep the agent's.
 */
import { readFileSync } from 'node:fs';

/** The oom_score_adj of a process. */
export function oomScoreOf(pid: number): number {
  return Number(readFileSync(`/proc/${pid}/oom_score_adj`, 'utf8'));
}

/**
 * A command line that runs another one with an oom_score_adj, at least our own: to lower it takes privilege, and outside of
 * a guest nobody needs to.
 *
 * @param program kiln-oom-score (native/guest-oom-score.c)
 */
export function withOomScore(score: number, program: string, command: CommandLine): CommandLine {
  return score <= oomScoreOf(process.pid) ? command : [program, String(score), ...command];
}

/** A program, and its arguments. */
export type CommandLine = readonly [program: string, ...args: string[]];
