/**
 * Manual pages, in the macros of man(7): kiln(1), and one for each verb. Of the tree of commands and of what `--help` says, so
 * that none can say otherwise.
 */
import type { CommandNode, Flag } from './command-tree.ts';
import type { VerbHelp } from './oci/help.ts';

export interface ManPageOptions {
  /** Kiln's. */
  readonly version: string;
  /** By the name of the verb; the program's is the empty one. */
  readonly help: Readonly<Record<string, VerbHelp>>;
}

const variables: readonly (readonly [name: string, means: string])[] = [
  ['KILN_CONFIG', 'the configuration; /etc/kiln/config.toml'],
  ['KILN_STATE_DIR', 'sockets, locks, logs and the state of containers; /run/kiln'],
  ['KILN_CACHE_DIR', 'converted layers and templates; /var/lib/kiln'],
  ['KILN_GUEST_DIR', 'the guest’s kernel, initrd and image'],
];

/** The pages' texts by the names of their files. */
export function manPages(tree: CommandNode, options: ManPageOptions): ReadonlyMap<string, string> {
  const pages = tree.commands.map((node) => [`kiln-${node.name}.1`, verbPage(node, options)] as const);
  return new Map([['kiln.1', programPage(tree, options)], ...pages]);
}

function programPage(tree: CommandNode, options: ManPageOptions): string {
  const headings = [...new Set(tree.commands.map(({ heading }) => heading))];
  return page('kiln', options, [
    ['NAME', ['kiln \\- run containers in microVMs']],
    ['SYNOPSIS', ['.B kiln', '[\\fIoptions\\fR] \\fIcommand\\fR [\\fIarguments\\fR]']],
    ['DESCRIPTION', [text(tree.description)]],
    ['OPTIONS', tree.flags.flatMap(flag)],
    [
      'COMMANDS',
      headings.flatMap((heading) => [
        `.SS ${quoted(heading.replace(/:$/, ''))}`,
        ...tree.commands
          .filter((node) => node.heading === heading)
          .flatMap((node) => item(`\\fBkiln\\-${text(node.name)}\\fR(1)`, node.description)),
      ]),
    ],
    ...helpSections(options.help['']),
    ['ENVIRONMENT', variables.flatMap(([name, means]) => item(`\\fB${name}\\fR`, means))],
    ['SEE ALSO', ['.BR runc (8),', '.BR crun (1),', '.BR podman (1)']],
  ]);
}

function verbPage(node: CommandNode, options: ManPageOptions): string {
  const help = options.help[node.name];
  return page(`kiln-${node.name}`, options, [
    ['NAME', [`kiln\\-${text(node.name)} \\- ${text(node.description)}`]],
    ['SYNOPSIS', [`.B kiln ${text(node.name)}`, `[\\fIoptions\\fR] ${node.arguments.map(text).join(' ')}`.trimEnd()]],
    ['DESCRIPTION', [text(sentence(node.description)), ...(help?.notes ?? []).flatMap((note) => ['.PP', text(note)])]],
    ['OPTIONS', node.flags.flatMap(flag)],
    ...helpSections(help),
    ['SEE ALSO', ['.BR kiln (1)']],
  ]);
}

type Section = readonly [heading: string, lines: readonly string[]];

function helpSections(help: VerbHelp | undefined): Section[] {
  const { examples = [], exitCodes = {} } = help ?? {};
  const codes = {
    ...(exitCodes['0'] === undefined ? { '0': 'success' } : {}),
    '1': 'an error, told on stderr and in the log',
  };
  return [
    [
      'EXIT STATUS',
      Object.entries({ ...codes, ...exitCodes }).flatMap(([code, means]) => item(`\\fB${text(code)}\\fR`, means)),
    ],
    [
      'EXAMPLES',
      examples.flatMap(({ command, does }) => [
        text(`${sentence(does)}`),
        '.PP',
        '.EX',
        `    ${text(command)}`,
        '.EE',
        '.PP',
      ]),
    ],
  ];
}

function page(name: string, { version }: ManPageOptions, sections: readonly Section[]): string {
  const lines = sections.flatMap(([heading, body]) => (body.length === 0 ? [] : [`.SH ${quoted(heading)}`, ...body]));
  return `${[`.TH ${name.toUpperCase().replace('-', '\\-')} 1 "" "kiln ${version}" "Kiln"`, ...lines].join('\n')}\n`;
}

function flag({ long, short, value, description, defaultValue }: Flag): string[] {
  const name = `\\fB\\-\\-${text(long)}\\fR${value === undefined ? '' : ` \\fI${text(value)}\\fR`}`;
  const both = short === undefined ? name : `\\fB\\-${text(short)}\\fR, ${name}`;
  const otherwise = defaultValue === undefined || defaultValue === '' ? '' : ` (default: ${String(defaultValue)})`;
  return item(both, `${description}${otherwise}`);
}

function item(term: string, means: string): string[] {
  return ['.TP', term, text(means)];
}

function sentence(words: string): string {
  return `${words.charAt(0).toUpperCase()}${words.slice(1)}.`;
}

function quoted(words: string): string {
  return `"${text(words).replaceAll('"', '\\(dq')}"`;
}

/** roff has "\" for itself, dots and quotes at a line's beginning, and makes hyphens of dashes. */
function text(words: string): string {
  const escaped = words
    .replaceAll('\\', '\\e')
    .replaceAll('-', '\\-')
    .replaceAll("'", '\\(aq')
    .replaceAll('’', '\\(cq')
    .replaceAll('–', '\\(en');
  return /^[.']/.test(escaped) ? `\\&${escaped}` : escaped;
}
