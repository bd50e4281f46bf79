/** The process that `exec` runs: of a file, or the container's own with another command line, as runc's exec.go makes it. */
import { readFileSync } from 'node:fs';
import { KilnError } from '../../errors.ts';
import { parseProcess } from '../../oci/bundle.ts';
import type { Process } from '../../oci/spec.ts';

/** Options of `exec` that say what to run. */
export interface ProcessOptions {
  readonly process?: string;
  readonly tty?: boolean;
  readonly cwd?: string;
  readonly env?: readonly string[];
  readonly user?: string;
  readonly additionalGids?: readonly string[];
  readonly cap?: readonly string[];
  readonly noNewPrivs?: boolean;
  readonly apparmor?: string;
  readonly processLabel?: string;
}

/**
 * @param base the container's own process
 * @throws KilnError invalid-argument, in runc's words
 */
export function execProcess(base: Process, command: readonly string[], options: ProcessOptions): Process {
  if (command.length === 0) throw new KilnError('invalid-argument', 'exec args cannot be empty');
  const { cwd = base.cwd, tty = false, env = [], noNewPrivs, apparmor, processLabel } = options;
  return {
    ...base,
    ...withCapabilities(base, options.cap ?? []),
    ...withUser(base, options),
    args: command,
    cwd,
    terminal: tty,
    env: [...(base.env ?? []), ...env],
    ...(noNewPrivs === true ? { noNewPrivileges: true } : {}),
    ...(apparmor === undefined ? {} : { apparmorProfile: apparmor }),
    ...(processLabel === undefined ? {} : { selinuxLabel: processLabel }),
  };
}

/** @throws KilnError invalid-argument for a file that is none, or no process */
export function readProcess(file: string): Process {
  let text: string;
  try {
    text = readFileSync(file, 'utf8');
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    throw new KilnError('invalid-argument', `cannot read the process from ${file}: ${code}`, { cause: error });
  }
  return parseProcess(text, file);
}

function withCapabilities({ capabilities = {} }: Process, added: readonly string[]): Partial<Process> {
  if (added.length === 0) return {};
  // An ambient one must be inheritable, too, and `--cap` makes none so.
  const sets = ['bounding', 'effective', 'permitted', ...(capabilities.inheritable === undefined ? [] : ['ambient'])];
  const grown = sets.map((set) => [set, [...new Set([...(capabilities[set] ?? []), ...added])]]);
  return { capabilities: { ...capabilities, ...Object.fromEntries(grown) } };
}

function withUser({ user = {} }: Process, options: ProcessOptions): Partial<Process> {
  const given = options.user === undefined ? {} : parseUser(options.user);
  const gids = (options.additionalGids ?? []).map(parseGid);
  if (options.user === undefined && gids.length === 0) return {};
  const additional = gids.length === 0 ? {} : { additionalGids: [...(user.additionalGids ?? []), ...gids] };
  return { user: { ...user, ...given, ...additional } };
}

function parseUser(text: string): { uid: number; gid?: number } {
  const [, uid, gid] = /^(\d+)(?::(\d+))?$/.exec(text) ?? [];
  if (uid === undefined) {
    throw new KilnError('invalid-argument', `--user ${text}: must be UID or UID:GID, as numbers`);
  }
  return { uid: Number(uid), ...(gid === undefined ? {} : { gid: Number(gid) }) };
}

function parseGid(text: string): number {
  if (/^\d+$/.test(text)) return Number(text);
  throw new KilnError('invalid-argument', `additional-gids must be a positive number ${text}`);
}
