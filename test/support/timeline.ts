/** The start timeline of a container, from kilnd's log. */
import { readFile } from 'node:fs/promises';

export interface TimelineMark {
  readonly name: string;
  /** Milliseconds since the Unix epoch. */
  readonly atMs: number;
}

/** The marks of a container that has been deleted, in order. Fails when the log has none. */
export async function readTimeline(kilndLog: string, id: string): Promise<TimelineMark[]> {
  const lines = (await readFile(kilndLog, 'utf8')).split('\n').filter((line) => line.includes('"timeline"'));
  for (const line of lines.reverse()) {
    const entry = JSON.parse(line) as { msg: string; id?: string; marks?: { name: string; at_ms: number }[] };
    if (entry.msg !== 'timeline' || entry.id !== id || entry.marks === undefined) continue;
    return entry.marks.map(({ name, at_ms }) => ({ name, atMs: at_ms })).sort((one, other) => one.atMs - other.atMs);
  }
  throw new Error(`${kilndLog} has no timeline of ${id}`);
}
