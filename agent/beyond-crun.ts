/**
 * What a spec asks for and crun 1.8 does not do, or does without a word for the user: checked before crun runs, and done
 * to the container's init while that waits for `crun start`. kilnd has checked the values; see docs/oci-spec.md.
 */
import { accessSync, constants, lstatSync, readlinkSync, statSync, writeFileSync } from 'node:fs';
import { SysError } from '../src/sys/error.ts';
import {
  ioPriorityClasses,
  ioprioSet,
  schedSetattr,
  schedulingFlags,
  schedulingPolicies,
} from '../src/sys/scheduling.ts';
import { AgentError } from './errors.ts';

/** The members of a runtime-spec that are read here. */
interface Spec {
  readonly process?: {
    readonly oomScoreAdj?: number;
    readonly scheduler?: {
      readonly policy: keyof typeof schedulingPolicies;
      readonly flags?: readonly (keyof typeof schedulingFlags)[];
      readonly nice?: number;
      readonly priority?: number;
      readonly runtime?: number;
      readonly deadline?: number;
      readonly period?: number;
    };
    readonly ioPriority?: { readonly class: keyof typeof ioPriorityClasses; readonly priority?: number };
  };
  readonly hooks?: {
    readonly createContainer?: readonly { readonly path: string }[];
    readonly startContainer?: readonly { readonly path: string }[];
  };
}

/** Symbolic links that a path may have, path_resolution(7). */
const linkLimit = 40;

export class BeyondCrun {
  readonly #spec: Spec;

  /** @param spec config.json. One that is no JSON asks for nothing here: crun has the word for that. */
  constructor(spec: Uint8Array) {
    this.#spec = parse(spec);
  }

  /**
   * Before `crun create`.
   *
   * @throws AgentError invalid-argument for a createContainer hook that the guest's image does not have
   */
  check(): void {
    requireHooks('createContainer', this.#spec.hooks?.createContainer, '/', "guest's image");
  }

  /**
   * After `crun create`.
   *
   * @param pid of the container's init
   * @throws AgentError invalid-argument for what the kernel refuses, and for a startContainer hook that the container
   * does not have
   */
  apply(pid: number): void {
    requireHooks('startContainer', this.#spec.hooks?.startContainer, `/proc/${pid}/root`, 'container');
    const { oomScoreAdj, scheduler, ioPriority } = this.#spec.process ?? {};
    // crun takes 0 for none, and the init would keep the agent's own.
    if (oomScoreAdj === 0) writeFileSync(`/proc/${pid}/oom_score_adj`, '0');
    if (scheduler !== undefined) {
      const { policy, flags = [], nice = 0, priority = 0, runtime = 0, deadline = 0, period = 0 } = scheduler;
      const attributes = {
        ...{ policy: schedulingPolicies[policy], nice, priority },
        flags: flags.reduce((all, flag) => all | schedulingFlags[flag], 0),
        ...{ runtime: BigInt(runtime), deadline: BigInt(deadline), period: BigInt(period) },
      };
      applied('process.scheduler', () => schedSetattr(pid, attributes));
    }
    if (ioPriority !== undefined) {
      const { class: ioClass, priority = 0 } = ioPriority;
      applied('process.ioPriority', () => ioprioSet(pid, ioPriorityClasses[ioClass], priority));
    }
  }
}

function parse(spec: Uint8Array): Spec {
  try {
    return JSON.parse(Buffer.from(spec).toString()) ?? {};
  } catch {
    return {};
  }
}

function applied(path: string, action: () => void): void {
  try {
    action();
  } catch (error) {
    if (!(error instanceof SysError)) throw error;
    throw new AgentError('invalid-argument', `${path}: the guest's kernel refuses it: ${error.message}`, {
      cause: error,
    });
  }
}

function requireHooks(
  moment: 'createContainer' | 'startContainer',
  hooks: readonly { readonly path: string }[] | undefined,
  root: string,
  where: string,
): void {
  for (const [index, { path }] of (hooks ?? []).entries()) {
    if (isProgram(root, path)) continue;
    const message = `hooks.${moment}[${index}]: ${path} is no program in the ${where}; such a hook does not run on the host`;
    throw new AgentError('invalid-argument', message);
  }
}

function isProgram(root: string, path: string): boolean {
  try {
    const real = resolveIn(root, path);
    accessSync(real, constants.X_OK);
    return statSync(real).isFile();
  } catch {
    return false;
  }
}

/**
 * The path of a file below another root, symbolic links resolved there, as chroot(2) would.
 *
 * @throws Error when it does not exist
 */
export function resolveIn(root: string, path: string): string {
  const base = root === '/' ? '' : root;
  let resolved: string[] = [];
  const rest = path.split('/');
  for (let links = 0; rest.length > 0; ) {
    const name = rest.shift() ?? '';
    if (name === '' || name === '.') continue;
    if (name === '..') {
      resolved.pop();
      continue;
    }
    const file = `${base}/${[...resolved, name].join('/')}`;
    if (lstatSync(file).isSymbolicLink()) {
      links += 1;
      if (links > linkLimit) throw new Error(`too many symbolic links in ${path}`);
      const target = readlinkSync(file);
      if (target.startsWith('/')) resolved = [];
      rest.unshift(...target.split('/'));
    } else resolved.push(name);
  }
  return `${base}/${resolved.join('/')}`;
}
