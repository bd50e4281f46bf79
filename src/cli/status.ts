import { Command } from 'commander';
import { pathsFromEnv } from '../config/paths.ts';
import { controlCall } from '../shim/control/client.ts';

/** `kiln status`: what the kilnd of the state folder (KILN_STATE_DIR) is doing, as JSON. */
export function statusCommand(): Command {
  return new Command('status').description('show the running kilnd and its containers, as JSON').action(async () => {
    const { stateDir } = pathsFromEnv({ env: process.env, guestDir: '/' });
    const { stdout } = await controlCall(stateDir, { kind: 'status' });
    process.stdout.write(stdout);
  });
}
