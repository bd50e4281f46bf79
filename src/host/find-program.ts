import { accessSync, constants, statSync } from 'node:fs';
import path from 'node:path';

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

function isExecutable(file: string): boolean {
  try {
    accessSync(file, constants.X_OK);
    return statSync(file).isFile();
  } catch {
    return false;
  }
}
