/** What `--help` and the manual pages say beyond descriptions and flags: examples, exit codes, and what is worth knowing. */
import type { Command } from 'commander';

export interface Example {
  readonly command: string;
  readonly does: string;
}

export interface VerbHelp {
  readonly examples: readonly Example[];
  /** By exit code; where it says nothing else, 0 is success and 1 an error. */
  readonly exitCodes?: Readonly<Record<string, string>>;
  /** Whole sentences, a paragraph each. */
  readonly notes?: readonly string[];
}

const ofProcess = {
  '0 to 255': 'that of the program; 128 + N when signal N ended it',
  '0': 'with --detach, when it runs',
};

/** By the name of the verb; the empty one is the program's. */
export const verbHelp: Readonly<Record<string, VerbHelp>> = {
  '': {
    examples: [
      { command: 'mkdir rootfs && kiln spec && kiln run demo', does: 'run a bundle; rootfs must have a sh' },
      { command: 'podman --runtime /usr/local/bin/kiln run --rm IMAGE', does: 'run podman’s containers in microVMs' },
    ],
    exitCodes: { '3': 'there is no such command' },
  },
  spec: {
    examples: [
      { command: 'kiln spec', does: 'write ./config.json, which runs "sh" on a terminal in ./rootfs' },
      { command: 'kiln spec --bundle demo', does: 'write demo/config.json' },
    ],
    notes: ['A file that is there is never overwritten.'],
  },
  create: {
    examples: [
      { command: 'kiln create --bundle demo --pid-file pid c1', does: 'make c1; "kiln start c1" runs its program' },
      {
        command: 'kiln create --bundle demo --console-socket tty.sock c1',
        does: 'the same with a terminal, whose master goes to the socket',
      },
    ],
    notes: ['The standard streams of this command become those of the container.'],
  },
  start: { examples: [{ command: 'kiln start c1', does: 'run the program of c1, which was created' }] },
  run: {
    examples: [
      { command: 'kiln run --bundle demo c1', does: 'run it until it ends, then remove it' },
      { command: 'kiln run --image alpine.tar c1 -- ls -l /', does: 'run a command in an image that was saved' },
      { command: 'kiln run --detach --bundle demo c1 </dev/null >out 2>&1', does: 'run it in the background' },
    ],
    exitCodes: { ...ofProcess, '1': 'it could not be started, or the program said so' },
    notes: [
      'SIGTERM, SIGHUP, SIGQUIT, SIGUSR1 and SIGUSR2 that this command gets are for the container.',
      'With --image the image is unpacked to a folder below KILN_CACHE_DIR that lives as long as the container. It has a ' +
        'terminal where this command has one, and no network but lo.',
    ],
  },
  exec: {
    examples: [
      { command: 'kiln exec c1 ls -l /', does: 'run one more program in c1' },
      { command: 'kiln exec -t c1 sh', does: 'the same on this terminal' },
      { command: 'kiln exec --user 1000:1000 --cwd /tmp c1 id', does: 'as another user, elsewhere' },
    ],
    exitCodes: { ...ofProcess, '255': 'it could not be started, or the program said so' },
    notes: ['Flags come before the id: what follows it is the command.'],
  },
  kill: {
    examples: [
      { command: 'kiln kill c1', does: 'send SIGTERM' },
      { command: 'kiln kill c1 KILL', does: 'send SIGKILL; names with and without SIG, and numbers, are signals' },
    ],
  },
  delete: {
    examples: [
      { command: 'kiln delete c1', does: 'remove c1, which has ended' },
      { command: 'kiln delete --force c1', does: 'kill it first; one that does not exist is no error' },
    ],
  },
  pause: { examples: [{ command: 'kiln pause c1', does: 'freeze all processes of c1' }] },
  resume: { examples: [{ command: 'kiln resume c1', does: 'let them go on' }] },
  update: {
    examples: [
      { command: 'kiln update --memory 256m --pids-limit 100 c1', does: 'change two limits' },
      { command: 'echo \'{"cpu":{"quota":50000}}\' | kiln update -r - c1', does: 'the same way Docker does it' },
    ],
    notes: [
      'Limits that are not given stay as they are. A limit above what the virtual machine has is refused: its size was ' +
        'fixed when the container was created.',
    ],
  },
  checkpoint: { examples: [], notes: ['It ends with an error that says so.'] },
  restore: { examples: [], notes: ['It ends with an error that says so.'] },
  state: { examples: [{ command: 'kiln state c1 | jq -r .status', does: 'created, running, paused or stopped' }] },
  list: {
    examples: [
      { command: 'kiln list', does: 'a table' },
      { command: 'kiln list --quiet', does: 'the ids, a line each' },
    ],
  },
  ps: {
    examples: [
      { command: 'kiln ps c1', does: 'the processes of c1, as "ps -ef" has them, with their pids in the guest' },
      { command: 'kiln ps --format json c1', does: 'pids on the host: of c1, and of each exec' },
    ],
    notes: ['The pid that "state" tells is the host’s. In the guest the container’s process has another one.'],
  },
  events: {
    examples: [
      { command: 'kiln events --stats c1', does: 'what c1 uses now, as one JSON object' },
      { command: 'kiln events --interval 1s c1', does: 'the same each second, until c1 ends' },
    ],
  },
  features: {
    examples: [{ command: 'kiln features | jq .linux.namespaces', does: 'the namespaces that a container can have' }],
  },
};

/** Puts it at the end of each verb's `--help`. */
export function addHelp(program: Command): void {
  for (const command of [program, ...program.commands]) {
    const help = verbHelp[command === program ? '' : command.name()];
    if (help !== undefined) command.addHelpText('after', () => textOf(help));
  }
}

function textOf({ examples, exitCodes, notes = [] }: VerbHelp): string {
  const wide = Math.max(0, ...examples.map(({ command }) => command.length));
  const sections = [
    ...notes.map((note) => `\n${note}`),
    ...(examples.length === 0 ? [] : ['\nExamples:']),
    ...examples.flatMap(({ command, does }) =>
      wide > 50 ? [`  ${command}`, `      ${does}`] : [`  ${command.padEnd(wide)}  ${does}`],
    ),
    ...(exitCodes === undefined ? [] : ['\nExit codes:']),
    ...Object.entries(exitCodes ?? {}).map(([code, means]) => `  ${code.padEnd(8)}  ${means}`),
  ];
  return sections.join('\n');
}
