/** A wall clock of one program's own, which a test can let jump: shifted-clock.c. */
import { execFileSync } from 'node:child_process';
import { writeFileSync } from 'node:fs';
import { open } from 'node:fs/promises';
import { join } from 'node:path';
import { projectRoot } from './paths.ts';

export interface ShiftedClock {
  /** For the program's environment. */
  readonly env: Readonly<Record<string, string>>;
  /** From now on the program's wall clock is so many seconds ahead of the machine's, or behind it. */
  jumpTo(seconds: number): Promise<void>;
}

/**
 * @param folder an existing one, for the library and its file
 * @param commandPart what the program's command line has in it, and no other's that inherits its environment
 */
export function shiftedClock(folder: string, commandPart: string): ShiftedClock {
  const library = join(folder, 'clock.so');
  const file = join(folder, 'clock');
  const source = join(projectRoot, 'test', 'support', 'shifted-clock.c');
  execFileSync('gcc', ['-O2', '-Wall', '-Wextra', '-Werror', '-shared', '-fPIC', '-o', library, source, '-ldl']);
  writeFileSync(file, Buffer.alloc(8));
  return {
    env: { LD_PRELOAD: library, KT_CLOCK: file, KT_CLOCK_OF: commandPart },
    async jumpTo(seconds) {
      const shift = Buffer.alloc(8);
      shift.writeBigInt64LE(BigInt(seconds));
      // Into the file as it is: the program has it mapped.
      await using handle = await open(file, 'r+');
      await handle.write(shift);
    },
  };
}
