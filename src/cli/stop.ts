import { Command } from 'commander';
import { pathsFromEnv } from '../config/paths.ts';
import { controlCall } from '../shim/control/client.ts';

/** `kiln stop`: asks kilnd to end when its last container is gone; twice, to end the containers too. */
export function stopCommand(): Command {
  return new Command('stop')
    .description('ask kilnd to stop once no container runs; ask a second time to end the containers too')
    .action(async () => {
      const { stateDir } = pathsFromEnv({ env: process.env, guestDir: '/' });
      const { stdout } = await controlCall(stateDir, { kind: 'stop' });
      process.stdout.write(stdout);
    });
}
