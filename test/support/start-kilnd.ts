import { watch } from 'node:fs';
import { join } from 'node:path';
import { distBin } from './paths.ts';
import { Lines, type RunningProgram, stream } from './spawn.ts';

/** Starts kilnd by hand; returns when it answers. */
export async function startKilnd(env: Record<string, string>): Promise<RunningProgram> {
  const stateDir = env.KILN_STATE_DIR ?? '';
  const program = stream(join(distBin, 'kilnd'), [], { env: { ...process.env, ...env }, timeout: 600_000 });
  program.stdout.resume();
  const errors = new Lines(program.stderr);
  const { promise, resolve } = Promise.withResolvers<void>();
  const watcher = watch(stateDir, (_event, name) => {
    if (name === 'kilnd.sock') resolve();
  });
  await Promise.race([
    promise,
    program.exit.then((code) => {
      throw new Error(`kilnd ended with ${code}: ${errors.all.join('\n')}`);
    }),
  ]).finally(() => watcher.close());
  return program;
}
