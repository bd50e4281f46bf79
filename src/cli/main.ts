import path from 'node:path';
import { Command, Option } from 'commander';
import { pathsFromEnv } from '../config/paths.ts';
import { KilnError } from '../errors.ts';
import { kilnVersion } from '../version.ts';
import { addOciCommands } from './oci/commands.ts';
import { type ReportOptions, report } from './oci/report.ts';
import { poolCommand } from './pool.ts';
import { statusCommand } from './status.ts';
import { stopCommand } from './stop.ts';
import { timelineCommand } from './timeline.ts';

const { stateDir } = pathsFromEnv({ env: process.env, guestDir: '/' });

const program = new Command('kiln')
  .description(
    'Kiln runs every container in a microVM of its own. This is its OCI runtime command line, for podman, Docker, conmon ' +
      'and bundles by hand; with containerd, containers are started by containerd. See the README.',
  )
  .version(kilnVersion, '-v, --version')
  .showHelpAfterError()
  .enablePositionalOptions()
  .option('--root <dir>', 'where the state of containers is kept', path.join(stateDir, 'oci'))
  .option('--log <file>', 'a file that errors are written to, beside stderr')
  .addOption(new Option('--log-format <format>', 'of that file').choices(['text', 'json']).default('text'))
  .option('--debug', 'accepted for the sake of callers; kilnd has a log level of its own')
  .option('--systemd-cgroup', 'accepted: cgroupsPath is then slice:prefix:name')
  .option('--rootless <mode>', 'accepted: Kiln needs root')
  .option('--criu <path>', 'accepted, and not used');

const forOperators = [statusCommand(), stopCommand(), timelineCommand(), poolCommand()];
addOciCommands(program);
for (const command of forOperators) program.addCommand(command);

let running: Command | undefined;
program.hook('preAction', (_program, command) => {
  running = command;
});

program.parseAsync().catch((error: unknown) => {
  if (running !== undefined && forOperators.includes(running)) {
    process.stderr.write(`kiln: ${KilnError.from(error).userMessage}\n`);
  } else {
    const { log, logFormat } = program.opts<{ log?: string; logFormat: ReportOptions['format'] }>();
    report(error, { log, format: logFormat });
  }
  process.exitCode ||= 1;
});
