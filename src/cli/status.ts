import { Command } from 'commander';
import { ask } from './ask.ts';

/** `kiln status`: what the kilnd of the state folder (KILN_STATE_DIR) is doing, as JSON. */
export function statusCommand(): Command {
  return new Command('status').description('show the running kilnd and its containers, as JSON').action(async () => {
    process.stdout.write(await ask({ kind: 'status' }));
  });
}
