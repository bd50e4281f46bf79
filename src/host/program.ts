import { accessSync, constants, statSync } from 'node:fs';
import path from 'node:path';
import { KilnError } from '../errors.ts';

/**
 * Where execvp(3) would find a program: a name is looked for on PATH, anything with a slash is a path.
 *
 * @returns its absolute path, or undefined where there is no such file, or nobody may execute it
 */
export function findProgram(program: string, searchPath = process.env.PATH ?? ''): string | undefined {
  if (program.includes('/')) return isExecutable(program) ? path.resolve(program) : undefined;
  const folders = searchPath.split(':').filter((folder) => path.isAbsolute(folder));
  return folders.map((folder) => path.join(folder, program)).find(isExecutable);
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
