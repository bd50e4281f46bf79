import { Command } from 'commander';
import { ask } from './ask.ts';

/** `kiln stop`: asks kilnd to end when its last container is gone; twice, to end the containers too. */
export function stopCommand(): Command {
  return new Command('stop')
    .description('ask kilnd to stop once no container runs; ask a second time to end the containers too')
    .action(async () => {
      process.stdout.write(await ask({ kind: 'stop' }));
    });
}
