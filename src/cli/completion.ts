/**
 * Completions of the three common shells, each made of the same tree of commands. What they look up while the user types are
 * the ids of containers: `kiln list --quiet`, with the same --root.
 */
import { Argument, Command } from 'commander';
import { type CommandNode, type Flag, treeOf } from './command-tree.ts';

export const shells = ['bash', 'zsh', 'fish'] as const;
export type Shell = (typeof shells)[number];

/** `kiln completion SHELL`: the script to be loaded by it. */
export function completionCommand(program: Command): Command {
  return new Command('completion')
    .description('print a script that lets a shell complete kiln’s commands, flags and ids')
    .addArgument(new Argument('<shell>', 'which shell').choices(shells))
    .addHelpText(
      'after',
      '\nTo load it:\n' +
        '  kiln completion bash > /usr/share/bash-completion/completions/kiln\n' +
        '  kiln completion zsh  > /usr/share/zsh/vendor-completions/_kiln\n' +
        '  kiln completion fish > /usr/share/fish/vendor_completions.d/kiln.fish',
    )
    .action((shell: Shell) => {
      process.stdout.write(completion(shell, treeOf(program)));
    });
}

export function completion(shell: Shell, tree: CommandNode): string {
  return { bash, zsh, fish }[shell](tree);
}

/** Values that are files or folders, by the name that usage has for them; of others only the choices are known. */
const paths: ReadonlySet<string> = new Set(['file', 'path', 'dir']);
const formats: Readonly<Record<string, readonly string[]>> = {
  format: ['table', 'json'],
  'log-format': ['text', 'json'],
};

function choicesOf({ long }: Flag): readonly string[] {
  return Object.hasOwn(formats, long) ? (formats[long] ?? []) : [];
}

function takesId(node: CommandNode): boolean {
  return node.arguments[0] === '<id>' && !['create', 'run', 'restore'].includes(node.name);
}

/** A value of the text may hold anything. */
function quoted(text: string): string {
  return `'${text.replaceAll("'", `'\\''`)}'`;
}

function words({ long, short }: Flag): string[] {
  return short === undefined ? [`--${long}`] : [`--${long}`, `-${short}`];
}

function bash(tree: CommandNode): string {
  const valued = [tree, ...tree.commands].flatMap(({ flags }) => flags.filter(({ value }) => value !== undefined));
  const global = tree.flags.filter(({ value }) => value !== undefined).flatMap(words);
  const files = [...new Set(valued.filter(({ value = '' }) => paths.has(value)).flatMap(words))];
  const choices = [...new Map(valued.map((flag) => [flag.long, flag])).values()].filter(
    (flag) => choicesOf(flag).length > 0,
  );
  const cases = tree.commands.map((node) => {
    const flags = node.flags.flatMap(words).join(' ');
    const more = takesId(node) ? `$(kiln \${root:+--root "$root"} list --quiet 2>/dev/null)` : '';
    const shell = node.name === 'completion' ? shells.join(' ') : '';
    return `    ${node.name}) flags="${flags}"; arguments="${more}${shell}" ;;`;
  });
  return `# bash completion for kiln. Made by: kiln completion bash
_kiln() {
  local current=\${COMP_WORDS[COMP_CWORD]} previous=\${COMP_WORDS[COMP_CWORD - 1]}
  local verb= root= flags= arguments= i
  for ((i = 1; i < COMP_CWORD; i++)); do
    case \${COMP_WORDS[i]} in
    --root) root=\${COMP_WORDS[++i]} ;;
    ${global.filter((flag) => flag !== '--root').join(' | ')}) ((i++)) ;;
    -*) ;;
    *)
      verb=\${COMP_WORDS[i]}
      break
      ;;
    esac
  done
  case $previous in
${choices.map((flag) => `  ${words(flag).join(' | ')}) COMPREPLY=($(compgen -W "${choicesOf(flag).join(' ')}" -- "$current")); return ;;`).join('\n')}
  ${files.join(' | ')}) compopt -o filenames; COMPREPLY=($(compgen -f -- "$current")); return ;;
  esac
  case $verb in
    '') flags="${tree.flags.flatMap(words).join(' ')}"; arguments="${tree.commands.map(({ name }) => name).join(' ')}" ;;
${cases.join('\n')}
  esac
  if [[ $current == -* ]]; then
    COMPREPLY=($(compgen -W "$flags" -- "$current"))
  else
    COMPREPLY=($(compgen -W "$arguments" -- "$current"))
  fi
}
complete -F _kiln kiln
`;
}

/** _arguments has "[", "]" and ":" for itself. */
function zshText(text: string): string {
  return text.replaceAll(/[[\]:\\]/g, (character) => `\\${character}`);
}

function zshFlag(flag: Flag): string[] {
  const { value } = flag;
  const choices = choicesOf(flag);
  const action = choices.length > 0 ? `(${choices.join(' ')})` : paths.has(value ?? '') ? '_files' : ' ';
  const after = value === undefined ? '' : `:${zshText(value)}:${action}`;
  return words(flag).map((word) => {
    const joined = value !== undefined && word.startsWith('--') ? '=' : '';
    return `    ${quoted(`${word}${joined}[${zshText(flag.description)}]${after}`)}`;
  });
}

function zsh(tree: CommandNode): string {
  const cases = tree.commands.map((node) => {
    const rest = takesId(node) ? [`    '1:container:_kiln_ids'`] : [];
    const shell = node.name === 'completion' ? [`    '1:shell:(${shells.join(' ')})'`] : [];
    const lines = [...node.flags.flatMap(zshFlag), ...rest, ...shell, `    '*::argument:_default'`];
    return `  ${node.name})\n    _arguments -s \\\n${lines.join(' \\\n')}\n    ;;`;
  });
  const described = tree.commands.map(
    (node) => `    ${quoted(`${node.name}:${node.description.replaceAll(':', '\\:')}`)}`,
  );
  return `#compdef kiln
# zsh completion for kiln. Made by: kiln completion zsh
_kiln_ids() {
  local -a ids
  ids=(\${(f)"$(kiln \${opt_args[--root]:+--root \${opt_args[--root]}} list --quiet 2>/dev/null)"})
  compadd -a ids
}
_kiln_verbs() {
  local -a verbs
  verbs=(
${described.join('\n')}
  )
  _describe command verbs
}
_kiln() {
  local curcontext=$curcontext state line
  typeset -A opt_args
  _arguments -C \\
${tree.flags.flatMap(zshFlag).join(' \\\n')} \\
    '1:command:_kiln_verbs' \\
    '*::argument:->arguments'
  [[ $state == arguments ]] || return
  case $line[1] in
${cases.join('\n')}
  esac
}
if [[ $funcstack[1] == _kiln ]]; then _kiln "$@"; else compdef _kiln kiln; fi
`;
}

function fish(tree: CommandNode): string {
  const option = (condition: string, flag: Flag) => {
    const choices = choicesOf(flag);
    const value = flag.value === undefined ? '' : paths.has(flag.value) ? ' -r -F' : ' -x';
    return [
      `complete -c kiln -n ${quoted(condition)} -l ${flag.long}`,
      ...(flag.short === undefined ? '' : ` -s ${flag.short}`),
      value,
      ...(choices.length === 0 ? '' : ` -a ${quoted(choices.join(' '))}`),
      ` -d ${quoted(flag.description)}`,
    ].join('');
  };
  const verbs = tree.commands.map(({ name }) => name).join(' ');
  const before = `not __fish_seen_subcommand_from ${verbs}`;
  const lines = [
    ...tree.flags.map((flag) => option(before, flag)),
    ...tree.commands.flatMap((node) => {
      const within = `__fish_seen_subcommand_from ${node.name}`;
      const ids = takesId(node) ? [`complete -c kiln -n ${quoted(within)} -a '(__kiln_ids)'`] : [];
      const shell =
        node.name === 'completion' ? [`complete -c kiln -n ${quoted(within)} -a ${quoted(shells.join(' '))}`] : [];
      return [
        `complete -c kiln -n ${quoted(before)} -a ${node.name} -d ${quoted(node.description)}`,
        ...node.flags.map((flag) => option(within, flag)),
        ...ids,
        ...shell,
      ];
    }),
  ];
  return `# fish completion for kiln. Made by: kiln completion fish
function __kiln_ids
  set -l words (commandline -opc)
  set -l root
  if set -l at (contains -i -- --root $words)
    set root --root $words[(math $at + 1)]
  end
  kiln $root list --quiet 2>/dev/null
end
complete -c kiln -f
${lines.join('\n')}
`;
}
