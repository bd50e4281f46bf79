import { Command } from 'commander';
import { KilnError } from '../errors.ts';
import { kilnVersion } from '../version.ts';
import { poolCommand } from './pool.ts';
import { statusCommand } from './status.ts';
import { stopCommand } from './stop.ts';
import { timelineCommand } from './timeline.ts';

const program = new Command('kiln')
  .description('Kiln runs every container in a microVM of its own. containerd is the way to start one; see the README.')
  .version(kilnVersion)
  .showHelpAfterError()
  .addCommand(statusCommand())
  .addCommand(stopCommand())
  .addCommand(timelineCommand())
  .addCommand(poolCommand());

program.parseAsync().catch((error: unknown) => {
  process.stderr.write(`kiln: ${KilnError.from(error).userMessage}\n`);
  process.exitCode = 1;
});
