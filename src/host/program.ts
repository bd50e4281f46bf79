import { accessSync, constants, statSync } from 'node:fs';
import path from 'node:path';
import { KilnError } from '../errors.ts';

/** Where a program lies: an absolute path as it is, a name as PATH has it; undefined when it is not there. */
export function findProgram(program: string, searchPath = process.env.PATH ?? ''): string | undefined {
  const candidates = program.includes('/') ? [program] : searchPath.split(':').map((dir) => path.join(dir, program));
  return candidates.find(isExecutable);
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
    accessSync(file, constants.X_OK);
    return statSync(file).isFile();
  } catch {
    return false;
  }
}
