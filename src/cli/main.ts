import type { Command } from 'commander';
import { KilnError } from '../errors.ts';
import { openLog, report } from './oci/report.ts';
import { isOfRuntime, makeProgram } from './program.ts';
import { throwUsageErrors, UsageError } from './usage.ts';

const program = makeProgram();
throwUsageErrors(program);

let running: Command = program;
program.hook('preAction', (_program, command) => {
  running = command;
  openLog(program.opts());
});

/** Whoever types a command wrongly is shown how it is meant, as runc does: on stdout, for the error is on stderr. */
function showUsage({ command, message }: UsageError): void {
  running = command;
  const output = isOfRuntime(command) ? process.stdout : process.stderr;
  output.write(`Incorrect Usage: ${message}\n\n${command.helpInformation()}\n`);
}

async function run(): Promise<void> {
  if (process.argv.length === 2) program.outputHelp();
  else await program.parseAsync();
}

run().catch((error: unknown) => {
  if (error instanceof UsageError) showUsage(error);
  if (isOfRuntime(running)) report(error, program.opts());
  else process.stderr.write(`kiln: ${KilnError.from(error).userMessage}\n`);
  process.exitCode ||= error instanceof UsageError ? error.exitCode : 1;
});
