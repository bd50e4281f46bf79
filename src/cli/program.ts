import path from 'node:path';
import { Command } from 'commander';
import { pathsFromEnv } from '../config/paths.ts';
import { kilnVersion } from '../version.ts';
import { completionCommand } from './completion.ts';
import { copyCommand } from './copy.ts';
import { addOciCommands } from './oci/commands.ts';
import { addHelp } from './oci/help.ts';
import { poolCommand } from './pool.ts';
import { statusCommand } from './status.ts';
import { stopCommand } from './stop.ts';
import { timelineCommand } from './timeline.ts';

/** Headings of the two sorts of commands. */
export const groups = { oci: 'Containers (OCI runtime):', operators: 'kilnd:' } as const;

/** The whole command line: what `main.ts` runs, and of which completions and manual pages are made. */
export function makeProgram(): Command {
  const { stateDir } = pathsFromEnv({ env: process.env, guestDir: '/' });
  const program = new Command('kiln')
    .description(
      'Kiln runs every container in a microVM of its own. This is its OCI runtime command line, for podman, Docker, conmon ' +
        'and bundles by hand; with containerd, containers are started by containerd.',
    )
    .version(kilnVersion, '-v, --version')
    .enablePositionalOptions()
    .option('--root <dir>', 'where the state of containers is kept', path.join(stateDir, 'oci'))
    .option('--log <file>', 'a file that errors are written to, beside stderr')
    .option('--log-format <format>', 'of that file: "text" or "json"', 'text')
    .option('--debug', 'accepted for the sake of callers; kilnd has a log level of its own')
    .option('--systemd-cgroup', 'accepted: cgroupsPath may be slice:prefix:name with and without it')
    .option('--rootless <mode>', 'accepted: Kiln needs root')
    .option('--criu <path>', 'accepted, and not used');
  program.commandsGroup(groups.oci);
  addOciCommands(program);
  addHelp(program);
  for (const command of [
    statusCommand(),
    stopCommand(),
    timelineCommand(),
    poolCommand(),
    copyCommand(),
    completionCommand(program),
  ]) {
    program.addCommand(command.helpGroup(groups.operators));
  }
  // Where the command "help" stands, too.
  program.commandsGroup(groups.operators);
  return program;
}

/** Whether a command is one of an OCI runtime, whose callers read its errors, and not an operator's. */
export function isOfRuntime(command: Command): boolean {
  return command.helpGroup() !== groups.operators;
}
