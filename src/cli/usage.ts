/**
 * Commands that were typed wrongly. commander's own errors go to stderr and end the process; here they are thrown instead,
 * so that they reach `--log` as any other error does, in the words of runc's command line where it has some.
 */
import type { Command, CommanderError } from 'commander';

/** runc's exit status for a command that does not exist. */
const unknownCommand = 3;

export class UsageError extends Error {
  override readonly name = 'UsageError';
  readonly command: Command;
  readonly exitCode: number;

  constructor(command: Command, message: string, exitCode: number) {
    super(message);
    this.command = command;
    this.exitCode = exitCode;
  }
}

/** Has all commands of the program throw UsageError. Help and the version are printed as ever. */
export function throwUsageErrors(command: Command): void {
  command.configureOutput({ outputError: () => {} });
  command.exitOverride((error) => {
    if (error.exitCode === 0 || error.code === 'commander.help') process.exit(error.exitCode);
    throw new UsageError(command, wordsFor(error, command), exitCodeOf(error));
  });
  for (const subcommand of command.commands) throwUsageErrors(subcommand);
}

function exitCodeOf({ code }: CommanderError): number {
  return code === 'commander.unknownCommand' ? unknownCommand : 1;
}

function wordsFor({ code, message }: CommanderError, command: Command): string {
  const words = message.replace(/^error: /, '').replaceAll('\n', ' ');
  if (code === 'commander.missingArgument' || code === 'commander.excessArguments') {
    return `kiln: "${command.name()}" requires ${countOf(command)} argument(s)`;
  }
  const option = /^unknown option '(.*?)'/.exec(words)?.[1];
  if (option !== undefined) return `flag provided but not defined: ${option.replace(/^--/, '-')}`;
  const [, flags, value, reason] = /^option '(.*)' argument '(.*)' is invalid\. (.*)$/.exec(words) ?? [];
  if (flags !== undefined) return `invalid value "${value}" for flag ${nameOf(flags)}: ${reason}`;
  const without = /^option '(.*)' argument missing$/.exec(words)?.[1];
  return without === undefined ? words : `flag needs an argument: ${nameOf(without)}`;
}

/** `-preserve-fds` of `--preserve-fds <n>`, as Go's flag package calls it. */
function nameOf(flags: string): string {
  return (/--[\w-]+/.exec(flags)?.[0] ?? flags).replace(/^--/, '-');
}

function countOf(command: Command): string {
  const { registeredArguments } = command;
  const required = registeredArguments.filter((argument) => argument.required).length;
  return required === registeredArguments.length ? `exactly ${required}` : `a minimum of ${required}`;
}
