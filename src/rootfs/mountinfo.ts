import { readFileSync, realpathSync } from 'node:fs';
import { readFile, realpath } from 'node:fs/promises';

/**
 * A mount point somewhere below `directory` in this mount namespace, or undefined. Converting a tree would go into it,
 * and without end if it is /proc.
 */
export async function submountBelow(directory: string): Promise<string | undefined> {
  const [real, table] = await Promise.all([realpath(directory), readFile('/proc/self/mountinfo', 'utf8')]);
  return findBelow(real, mountPoints(table));
}

/** Tells of any path whether something is mounted below it, as it is when it is asked for the first time. */
export function mountsNow(): (source: string) => boolean {
  let points: string[] | undefined;
  return (source) => {
    points ??= mountPoints(readFileSync('/proc/self/mountinfo', 'utf8'));
    try {
      return findBelow(realpathSync(source), points) !== undefined;
    } catch {
      return false; // What is not there cannot be mounted either, and who mounts it says so.
    }
  };
}

function findBelow(real: string, points: readonly string[]): string | undefined {
  return points.find((point) => point.startsWith(real === '/' ? '/' : `${real}/`) && point !== real);
}

/** The mount points (field 5) of a table in the format of /proc/self/mountinfo, see proc(5). */
export function mountPoints(table: string): string[] {
  const lines = table.split('\n').filter((line) => line !== '');
  return lines.map((line) => unescapeOctal(line.split(' ')[4] ?? ''));
}

/** Space, tab, newline and backslash are written as \040, \011, \012 and \134. */
function unescapeOctal(field: string): string {
  return field.replaceAll(/\\([0-7]{3})/g, (_, digits: string) => String.fromCharCode(Number.parseInt(digits, 8)));
}
