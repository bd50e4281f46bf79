/** The commands, flags and arguments of the program as plain data: for completions and manual pages. */
import type { Command } from 'commander';

export interface Flag {
  /** Without dashes. */
  readonly long: string;
  readonly short: string | undefined;
  /** What its value is called; undefined for one without. */
  readonly value: string | undefined;
  readonly description: string;
  readonly defaultValue: unknown;
}

export interface CommandNode {
  readonly name: string;
  readonly description: string;
  readonly heading: string;
  readonly flags: readonly Flag[];
  /** Names of its arguments, as usage shows them. */
  readonly arguments: readonly string[];
  readonly commands: readonly CommandNode[];
}

export function treeOf(command: Command): CommandNode {
  const help = command.createHelp();
  return {
    name: command.name(),
    description: command.description(),
    heading: command.helpGroup(),
    flags: help.visibleOptions(command).map((option) => ({
      long: option.long?.replace(/^--/, '') ?? '',
      short: option.short?.replace(/^-/, ''),
      value: /[<[](.*)[>\]]/.exec(option.flags)?.[1],
      description: option.description,
      defaultValue: option.defaultValue,
    })),
    arguments: command.registeredArguments.map((argument) => {
      const name = `${argument.name()}${argument.variadic ? '...' : ''}`;
      return argument.required ? `<${name}>` : `[${name}]`;
    }),
    commands: command.commands.map(treeOf),
  };
}
