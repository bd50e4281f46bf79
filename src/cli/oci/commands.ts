/**
 * The commands of an OCI runtime, with runc's flags and answers: what calls runc can call `kiln`.
 * Sources: runc 1.1 and 1.2 (man/runc-*.8.md, *.go), the OCI runtime command line interface.
 */
import { type Command, InvalidArgumentError } from 'commander';
import { KilnError } from '../../errors.ts';
import { addEvents } from './events-command.ts';
import { execProcess, type ProcessOptions, readProcess } from './exec-process.ts';
import { addFeatures } from './features-command.ts';
import { makeImageBundle, removeImageBundle } from './image-bundle.ts';
import { describe, table } from './listing.ts';
import type { StandingProcess } from './process.ts';
import { addPs } from './ps-command.ts';
import { OciRuntime } from './runtime.ts';
import { parseSignal } from './signal.ts';
import { addSpec } from './spec-command.ts';
import { addUpdate } from './update-command.ts';

/** runc's answer when an exec could not be made. */
const execFailed = 255;
const execInCgroup =
  '--cgroup: a process of a container runs in the control group that the guest has for the container';

interface GlobalOptions {
  readonly root: string;
}

interface LaunchOptions {
  readonly bundle: string;
  readonly consoleSocket?: string;
  readonly pidFile?: string;
  readonly preserveFds?: number;
  readonly detach?: boolean;
  readonly keep?: boolean;
}

interface RunOptions extends LaunchOptions {
  readonly image?: string;
  readonly imageName?: string;
}

interface ExecOptions extends ProcessOptions {
  readonly consoleSocket?: string;
  readonly pidFile?: string;
  readonly detach?: boolean;
  readonly cgroup?: string[];
  readonly preserveFds?: number;
  readonly ignorePaused?: boolean;
}

/** Adds the commands to the program; all of them heed its `--root`. */
export function addOciCommands(program: Command): void {
  const runtime = () => new OciRuntime(program.opts<GlobalOptions>().root);
  addSpec(program);
  addLaunching(program, runtime);
  addLiving(program, runtime);
  addUpdate(program, runtime);
  addLooking(program, runtime);
  addPs(program, runtime);
  addEvents(program, runtime);
  addFeatures(program);
}

function addLaunching(program: Command, runtime: () => OciRuntime): void {
  const launch = (name: string, description: string) =>
    program
      .command(`${name} <id>`)
      .description(description)
      .option('-b, --bundle <dir>', 'the folder with config.json', '.')
      .option('--console-socket <path>', "a socket that gets the master of the container's terminal")
      .option('--pid-file <path>', 'a file for the pid')
      .option('--preserve-fds <n>', 'descriptors that the container gets beside its stdio; none is possible', number)
      .option('--no-pivot', 'accepted, and without a meaning: the root filesystem is the virtual machine’s')
      .option('--no-new-keyring', 'accepted, and without a meaning: keyrings are those of the guest’s kernel');
  launch('create', 'create a container; its program runs with "start"').action(
    async (id: string, options: LaunchOptions) => {
      refuseDescriptors(options);
      await failing('create', runtime().create({ ...options, id, foreground: false }));
    },
  );
  program
    .command('start <id>')
    .description('run the program of a container that was created')
    .action(async (id: string) => {
      await runtime().start(id);
    });
  launch('run', 'create and start a container, and wait for its end')
    .option('-d, --detach', 'do not wait')
    .option('--keep', 'keep the container when it has ended')
    .option('--no-subreaper', 'accepted, and without a meaning: there is nothing to reap')
    .option('--image <file>', 'make the bundle of an image: an archive of "docker save", or an OCI image layout')
    .option('--image-name <name>', 'which image of the archive')
    .argument('[command...]', 'with --image, in place of the image’s own')
    .action(async (id: string, command: string[], options: RunOptions) => {
      refuseDescriptors(options);
      if (options.image === undefined && command.length > 0) {
        throw new KilnError('invalid-argument', 'run takes a command with --image only: a bundle has one of its own');
      }
      process.exitCode = await run(runtime(), id, command, options);
    });
  program
    .command('exec <id> [command...]')
    .description('run one more process in a container')
    .passThroughOptions()
    .option('-p, --process <file>', 'a file with the process as config.json has it')
    .option('-d, --detach', 'do not wait for its end')
    .option('-t, --tty', 'give it a terminal')
    .option('--console-socket <path>', 'a socket that gets the master of its terminal')
    .option('--pid-file <path>', 'a file for the pid')
    .option('--cwd <dir>', 'its working directory')
    .option('-e, --env <name=value>', 'one more variable', collect)
    .option('-u, --user <uid[:gid]>', 'who it runs as')
    .option('-g, --additional-gids <gid>', 'one more group', collect)
    .option('-c, --cap <capability>', 'one more capability', collect)
    .option('--cgroup <path>', 'refused: it runs in the container’s control group', collect)
    .option('--no-new-privs', 'it gains no privileges by what it executes')
    .option('--apparmor <profile>', 'its AppArmor profile, which is not applied in the guest')
    .option('--process-label <label>', 'its SELinux label, which is not applied in the guest')
    .option('--preserve-fds <n>', 'descriptors that it gets beside its stdio; none is possible', number)
    .option('--ignore-paused', 'also in a paused container')
    .action(async (id: string, command: string[], options: ExecOptions) => {
      process.exitCode = await exec(runtime(), id, command, options);
    });
}

function addLiving(program: Command, runtime: () => OciRuntime): void {
  program
    .command('kill <id> [signal]')
    .description('send a signal to the container’s first process')
    .option('-a, --all', 'to all of its processes')
    .action(async (id: string, signal = 'SIGTERM', { all = false }: { all?: boolean }) => {
      const found = runtime();
      found.states.read(id);
      await found.kill(id, parseSignal(signal), all);
    });
  program
    .command('delete <id>')
    .description('remove a container that has ended')
    .option('-f, --force', 'also one that runs, after SIGKILL')
    .action(async (id: string, { force = false }: { force?: boolean }) => {
      await runtime().delete(id, force);
    });
  program
    .command('pause <id>')
    .description('freeze all processes of a container')
    .action((id: string) => runtime().pause(id));
  program
    .command('resume <id>')
    .description('let a paused container go on')
    .action((id: string) => runtime().resume(id));
  for (const name of ['checkpoint', 'restore']) {
    program
      .command(`${name} <id>`)
      .description('not supported yet')
      .allowUnknownOption()
      .action(() => {
        throw new KilnError('unimplemented', `${name} is not supported: Kiln cannot save a container yet`);
      });
  }
}

function addLooking(program: Command, runtime: () => OciRuntime): void {
  program
    .command('state <id>')
    .description('print the state of a container, as JSON')
    .action(async (id: string) => {
      const found = runtime();
      const state = await describe(found, found.states.read(id));
      process.stdout.write(`${JSON.stringify(state, null, 2)}\n`);
    });
  program
    .command('list')
    .description('list the containers of --root')
    .option('-f, --format <format>', '"table" or "json"', 'table')
    .option('-q, --quiet', 'ids only')
    .action(async ({ format, quiet = false }: { format: string; quiet?: boolean }) => {
      requireFormat(format);
      const found = runtime();
      const states = await Promise.all(found.states.ids().map((id) => describeIfWhole(found, id)));
      const there = states.filter((state) => state !== undefined);
      if (quiet) process.stdout.write(there.map(({ id }) => `${id}\n`).join(''));
      else if (format === 'json') process.stdout.write(JSON.stringify(there.length === 0 ? null : there));
      else process.stdout.write(table(there));
    });
}

/** One that is just being made or removed is none; of one that is damaged, nothing but that is told. */
async function describeIfWhole(runtime: OciRuntime, id: string) {
  try {
    return await describe(runtime, runtime.states.read(id));
  } catch (error) {
    const { code, message } = KilnError.from(error);
    if (code !== 'not-found') process.stderr.write(`load container ${id}: ${message}\n`);
    return undefined;
  }
}

/** runc's words for what went wrong with it. */
async function failing<T>(verb: 'create' | 'run', step: Promise<T>): Promise<T> {
  try {
    return await step;
  } catch (error) {
    throw KilnError.from(error).after(`kiln ${verb} failed`);
  }
}

async function run(runtime: OciRuntime, id: string, command: string[], options: RunOptions): Promise<number> {
  const foreground = options.detach !== true;
  const { image, imageName } = options;
  let { bundle } = options;
  if (image !== undefined) {
    const terminal = options.consoleSocket !== undefined || (foreground && process.stdin.isTTY && process.stdout.isTTY);
    const wanted = { id, image, imageName, command, terminal };
    bundle = await failing('run', makeImageBundle(runtime.states, wanted));
  }
  let standing: StandingProcess;
  try {
    standing = await failing('run', runtime.create({ ...options, bundle, id, foreground }));
  } catch (error) {
    removeImageBundle(bundle);
    throw error;
  }
  try {
    await failing('run', runtime.start(id));
  } catch (error) {
    await runtime.delete(id, true);
    throw error;
  }
  if (!foreground) return 0;
  const status = await follow(standing);
  if (options.keep !== true) await runtime.delete(id, true);
  return status;
}

async function exec(runtime: OciRuntime, id: string, command: string[], options: ExecOptions): Promise<number> {
  const foreground = options.detach !== true;
  let standing: StandingProcess;
  try {
    refuseDescriptors(options);
    runtime.states.read(id);
    if (options.cgroup !== undefined) throw new KilnError('unimplemented', execInCgroup);
    const file = options.process;
    const wanted = file === undefined ? execProcess(await runtime.processOf(id), command, options) : readProcess(file);
    standing = await runtime.exec({ ...options, id, process: wanted, foreground });
  } catch (error) {
    process.exitCode = execFailed;
    throw KilnError.from(error).after('exec failed');
  }
  return foreground ? follow(standing) : 0;
}

/** Waits for the end of a process in the foreground; the signals that we get are for it. */
async function follow({ pid, exited }: StandingProcess): Promise<number> {
  const forwarded: NodeJS.Signals[] = ['SIGTERM', 'SIGHUP', 'SIGQUIT', 'SIGUSR1', 'SIGUSR2'];
  // What a terminal sends, it sends to both of us.
  process.on('SIGINT', () => {});
  for (const signal of forwarded) {
    process.on(signal, () => {
      try {
        process.kill(pid, signal);
      } catch {
        // It has just ended.
      }
    });
  }
  return exited;
}

function refuseDescriptors({ preserveFds = 0 }: { readonly preserveFds?: number }): void {
  if (preserveFds === 0) return;
  throw new KilnError(
    'unimplemented',
    `--preserve-fds ${preserveFds}: descriptors of the host cannot be had in a guest`,
  );
}

function requireFormat(format: string): void {
  if (format === 'table' || format === 'json') return;
  throw new KilnError('invalid-argument', `invalid format option: ${format}; it is table or json`);
}

function number(text: string): number {
  if (/^\d+$/.test(text)) return Number(text);
  throw new InvalidArgumentError('must be a number');
}

function collect(value: string, before: string[] = []): string[] {
  return [...before, value];
}
