import { renameSync, rmSync, writeFileSync } from 'node:fs';

/**
 * Gives a file a new content, as a whole or not at all; for root only. Leaves no half when it throws: a disk that was
 * full must not keep what nobody would remove.
 */
export function replaceFile(file: string, text: string): void {
  const fresh = `${file}.new`;
  try {
    writeFileSync(fresh, text, { mode: 0o600 });
    renameSync(fresh, file);
  } catch (error) {
    rmSync(fresh, { force: true });
    throw error;
  }
}
