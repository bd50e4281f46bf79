import { execFileSync } from 'node:child_process';
import { mkdirSync } from 'node:fs';

/** A file system of the host's that a test can fill, make read-only and unmount; shared, as Debian's all are. */
export function mountTmpfs(folder: string, options = 'size=1m'): Disposable {
  mkdirSync(folder, { recursive: true });
  execFileSync('mount', ['-t', 'tmpfs', '-o', options, 'kiln-test', folder]);
  execFileSync('mount', ['--make-shared', folder]);
  return { [Symbol.dispose]: () => void execFileSync('umount', ['--lazy', '--recursive', folder]) };
}
