import { writeFileSync } from 'node:fs';

/**
 * kilnd itself is protected from the OOM killer, since it serves every container; what it starts must not inherit that.
 * proc(5), /proc/pid/oom_score_adj.
 */
export function resetOomScore(pid: number): void {
  try {
    writeFileSync(`/proc/${pid}/oom_score_adj`, '0');
  } catch {
    // It has ended already; whoever waits for it will see why.
  }
}
