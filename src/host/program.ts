import { accessSync, constants, statSync } from 'node:fs';
import path from 'node:path';
import { KilnError } from '../errors.ts';

/** So long a program is taken to be the first of its name on PATH, in ms; that it is still there is looked at each time. */
const rememberedMs = 10_000;

/** Where programs were found, by PATH and name: each start asks for the same, and most folders of PATH have none. */
const remembered = new Map<string, { readonly file: string; readonly until: number }>();

/**
 * Where execvp(3) would find a program: a name is looked for on PATH, anything with a slash is a path. One that comes to an
 * earlier folder of PATH than the one that was found may be found 10 s later.
 *
 * @returns its absolute path, or undefined where there is no such file, or nobody may execute it
 */
export function findProgram(program: string, searchPath = process.env.PATH ?? ''): string | undefined {
  if (program.includes('/')) return isExecutable(program) ? path.resolve(program) : undefined;
  const key = `${program}:${searchPath}`;
  const known = remembered.get(key);
  if (known !== undefined && performance.now() < known.until && isExecutable(known.file)) return known.file;
  const folders = searchPath.split(':').filter((folder) => path.isAbsolute(folder));
  const file = folders.map((folder) => path.join(folder, program)).find(isExecutable);
  if (file === undefined) remembered.delete(key);
  else remembered.set(key, { file, until: performance.now() + rememberedMs });
  return file;
}

/**
 * A text that is another one after each change of the program's file, such as an upgrade.
 *
 * @throws KilnError failed-precondition when it is not there
 */
export function programIdentity(program: string): string {
  const file = findProgram(program);
  if (file === undefined) throw new KilnError('failed-precondition', `there is no program ${program}`);
  return fileIdentity(file);
}

/** A text that is another one after each change of a file. @throws the error of stat(2) */
export function fileIdentity(file: string): string {
  const { dev, ino, size, mtimeNs } = statSync(file, { bigint: true });
  return `${file} ${dev}:${ino} ${size} bytes of ${mtimeNs}`;
}

function isExecutable(file: string): boolean {
  try {
    // First what says without an error that nothing is there: of most folders on PATH.
    if (statSync(file, { throwIfNoEntry: false })?.isFile() !== true) return false;
    accessSync(file, constants.X_OK);
    return true;
  } catch {
    return false;
  }
}
