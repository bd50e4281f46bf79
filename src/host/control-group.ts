/**
 * The host's control group of a sandbox: what its OCI spec calls linux.cgroupsPath. The VMM with its helpers and the
 * processes that stand for containers are in it, so that the limits and the accounting of whoever made its parent (kubelet
 * for a pod) hold for the virtual machine. See docs/resources.md.
 *
 * A group is a directory of the same path in each hierarchy: one hierarchy where the host has cgroup v2 alone, one for each
 * controller with v1, and both kinds on a hybrid host.
 */
import { closeSync, existsSync, mkdirSync, openSync, readFileSync, write, writeFileSync } from 'node:fs';
import path from 'node:path';
import { promisify } from 'node:util';
import { z } from 'zod';
import { forLog, KilnError } from '../errors.ts';
import type { Logger } from '../observe/logger.ts';
import {
  type GroupLimits,
  type Hierarchy,
  hierarchiesIn,
  hostMounts,
  limitFiles,
  removalLimitMs,
  removeGroup,
  wordsOf,
} from './cgroups.ts';
import { isEnding } from './process-identity.ts';
import { replaceFile } from './replace-file.ts';
import { requireSystemd, type ScopeName, type SystemdHost, scopeOf, startScope, systemdHost } from './systemd-scope.ts';

const writeAside = promisify(write);

/** A process could not be put into a control group. */
export class ControlGroupError extends KilnError {}

/** Where helpers of a sandbox go. */
export interface ControlGroup {
  /** Moves a process there, with all its threads. One that has ended is none of an error. */
  add(pid: number): Promise<void>;
  /** Limits all that is in it together, where the host has the controllers. */
  limit(limits: GroupLimits): void;
}

export interface ControlGroupHost {
  readonly mounts: string;
  readonly systemd: SystemdHost;
}

export const controlGroupHost: ControlGroupHost = { mounts: hostMounts, systemd: systemdHost };

/** A group that is asked for. */
export interface GroupPlan {
  /** From the root of a hierarchy. */
  readonly group: string;
  /** Of one that systemd has to make. */
  readonly scope?: ScopeName | undefined;
}

/**
 * What a spec's linux.cgroupsPath asks for: an absolute path, one below the hierarchies' roots too, or systemd's
 * "slice:prefix:name". Undefined for none: then the processes stay where kilnd is.
 *
 * @throws KilnError invalid-argument for what is no slice, failed-precondition for systemd's name where it does not run
 */
export function planControlGroup(
  cgroupsPath: string | undefined,
  { systemd }: Pick<ControlGroupHost, 'systemd'> = controlGroupHost,
): GroupPlan | undefined {
  if (!cgroupsPath) return undefined;
  const scope = scopeOf(cgroupsPath);
  if (scope === undefined) return { group: path.posix.join('/', cgroupsPath) };
  requireSystemd(cgroupsPath, systemd);
  return { group: scope.group, scope };
}

const scopeName = z.object({ slice: z.string(), unit: z.string(), group: z.string() });
const groupRecord = z.object({
  group: z.string(),
  scope: scopeName.optional(),
  /** Directories that are ours to remove. */
  made: z.array(z.string()),
});
type GroupRecord = Readonly<z.infer<typeof groupRecord>>;

/** In the directory of each container that has the group. */
const recordName = 'control-group.json';

/** By its path, how many containers of this kilnd have a group, and what they have made of it: the last one removes that. */
const held = new Map<string, { holders: number; readonly made: Set<string> }>();

interface MakeOptions {
  /** Of the container that has it. */
  readonly directory: string;
  readonly plan: GroupPlan;
  readonly logger: Logger;
}

interface GroupParts {
  readonly logger: Logger;
  readonly host: ControlGroupHost;
  readonly hierarchies: readonly Hierarchy[];
}

export class HostControlGroup implements ControlGroup, AsyncDisposable {
  readonly #record: GroupRecord;
  readonly #host: ControlGroupHost;
  readonly #logger: Logger;
  readonly #hierarchies: readonly Hierarchy[];
  /** Of a scope: settled when systemd has made it. */
  #entered: Promise<void> | undefined;

  private constructor(
    record: GroupRecord,
    { logger, host, hierarchies, entered }: GroupParts & { readonly entered?: Promise<void> | undefined },
  ) {
    this.#record = record;
    this.#logger = logger;
    this.#host = host;
    this.#hierarchies = hierarchies;
    this.#entered = entered;
    const known = held.get(record.group) ?? { holders: 0, made: new Set() };
    known.holders += 1;
    for (const directory of record.made) known.made.add(directory);
    held.set(record.group, known);
  }

  /**
   * Makes the group. Those above it stay, as with other runtimes, and so does one that is there already.
   *
   * @throws KilnError internal when the kernel refuses, and then leaves none
   */
  static async make(
    { directory, plan, logger }: MakeOptions,
    host: ControlGroupHost = controlGroupHost,
  ): Promise<HostControlGroup> {
    const hierarchies = hierarchiesIn(host.mounts);
    const groups = hierarchies.map((hierarchy) => path.join(hierarchy.directory, plan.group));
    // systemd makes it with the first process.
    const made = plan.scope === undefined ? [] : groups.filter((group) => !existsSync(group));
    const record: GroupRecord = { ...plan, made };
    // Before the groups, so that they are found whenever this kilnd is killed. One that is there already counts as made only
    // until that is seen, a moment later.
    writeRecord(directory, plan.scope === undefined ? { ...plan, made: groups } : record, logger);
    await using stack = new AsyncDisposableStack();
    const group = stack.use(new HostControlGroup(record, { logger, host, hierarchies }));
    if (plan.scope === undefined) {
      group.#makeDirectories();
      if (made.length < groups.length) writeRecord(directory, record, logger);
    }
    stack.move();
    return group;
  }

  #noteMade(directory: string): void {
    if (!this.#record.made.includes(directory)) this.#record.made.push(directory);
    held.get(this.#record.group)?.made.add(directory);
  }

  /** That of a container of an earlier kilnd; undefined for one that has none. */
  static adopt(
    directory: string,
    logger: Logger,
    host: ControlGroupHost = controlGroupHost,
  ): HostControlGroup | undefined {
    const record = readRecord(directory);
    if (record === undefined) return undefined;
    const hierarchies = hierarchiesIn(host.mounts);
    // systemd has made its scope long ago.
    return new HostControlGroup(record, { logger, host, hierarchies, entered: Promise.resolve() });
  }

  /** The same group for one more container, which may outlive the others. */
  share(directory: string): HostControlGroup {
    writeRecord(directory, this.#record, this.#logger);
    const parts = { logger: this.#logger, host: this.#host, hierarchies: this.#hierarchies };
    return new HostControlGroup(this.#record, { ...parts, entered: this.#entered });
  }

  async add(pid: number): Promise<void> {
    const { scope, group } = this.#record;
    if (scope !== undefined) {
      this.#entered ??= this.#enterScope(scope, pid);
      await this.#entered;
    }
    const [first, ...others] = this.#hierarchies.map(({ directory }) => path.join(directory, group));
    if (first === undefined) return;
    // A move waits some 10 ms for all CPUs (Linux kernel/cgroup/cgroup.c, cgroup_attach_lock), unless another was just before.
    await putAside(pid, first);
    for (const directory of others) put(pid, directory);
  }

  limit(limits: GroupLimits): void {
    for (const { version, directory } of this.#hierarchies) {
      for (const [name, value] of Object.entries(limitFiles[version](limits))) {
        const file = path.join(directory, this.#record.group, name);
        if (existsSync(file)) attempt(`write ${value} to ${file}`, () => writeFileSync(file, String(value)));
      }
    }
  }

  async #enterScope(scope: ScopeName, pid: number): Promise<void> {
    try {
      await startScope(scope, pid, this.#host.systemd);
    } catch (cause) {
      const { code, message, hint } = KilnError.from(cause);
      throw new ControlGroupError(code, message, { ...(hint === undefined ? {} : { hint }), cause });
    }
    // systemd knows not all of v1's hierarchies.
    this.#makeDirectories();
  }

  #makeDirectories(): void {
    const { group } = this.#record;
    // Beside v1, it has no controller that counts.
    const delegates = this.#hierarchies.every(({ version }) => version === 2);
    for (const { directory, controllers } of this.#hierarchies) {
      const whole = path.join(directory, group);
      const inherits = controllers.includes('cpuset');
      attempt(`make the control group ${group} in ${directory}`, () => {
        if (!delegates && !inherits) {
          if (mkdirSync(whole, { recursive: true }) !== undefined) this.#noteMade(whole);
          return;
        }
        // Groups above one that systemd has made are systemd's to write to.
        if (existsSync(whole)) return;
        let parent = directory;
        const cpus = new Map<string, string>();
        for (const name of group.split('/').filter(Boolean)) {
          if (delegates) delegateControllers(parent);
          const child = path.join(parent, name);
          const isNew = mkdirSync(child, { recursive: true }) !== undefined;
          if (isNew && child === whole) this.#noteMade(whole);
          if (inherits) inheritCpus({ parent, group: child, isNew }, cpus);
          parent = child;
        }
      });
    }
  }

  /** Of its last holder: removes what was made. What is in use stays, and is told of. Never rejects. */
  async [Symbol.asyncDispose](): Promise<void> {
    const { group } = this.#record;
    const known = held.get(group);
    if (known === undefined) return;
    known.holders -= 1;
    if (known.holders > 0) return;
    held.delete(group);
    // All together have the time.
    const deadline = performance.now() + removalLimitMs;
    for (const directory of known.made) {
      try {
        await removeGroup(directory, Math.max(0, deadline - performance.now()));
      } catch (error) {
        this.#logger.warn({ err: forLog(error), directory }, 'a control group stays, since it cannot be removed');
      }
    }
  }
}

/**
 * Removes the group of a container whose kilnd is gone, and whose processes have ended. One in which somebody else is, such
 * as the rest of its pod, stays. Never rejects.
 */
export async function clearControlGroup(directory: string, logger: Logger): Promise<void> {
  // Processes leave it a little after their end; all groups together have the time.
  const deadline = performance.now() + removalLimitMs;
  try {
    for (const group of readRecord(directory)?.made ?? []) {
      const limitMs = hasOthers(group) ? 0 : Math.max(0, deadline - performance.now());
      await removeGroup(group, limitMs).catch((error: NodeJS.ErrnoException) => {
        if (error.code !== 'EBUSY') throw error;
      });
    }
  } catch (error) {
    logger.warn({ err: forLog(error), directory }, 'a control group of an earlier kilnd stays');
  }
}

/** Whether a process that goes on is in the group. */
function hasOthers(group: string): boolean {
  return wordsOf(group, 'cgroup.procs').some((pid) => !isEnding(Number(pid)));
}

/** What cannot be written down is lost only if this kilnd is killed: no reason to fail the container now. */
function writeRecord(directory: string, record: GroupRecord, logger: Logger): void {
  try {
    replaceFile(path.join(directory, recordName), JSON.stringify(record));
  } catch (error) {
    logger.error({ err: forLog(error) }, 'cannot write down the control group: it would stay after a killed kilnd');
  }
}

function readRecord(directory: string): GroupRecord | undefined {
  try {
    return groupRecord.parse(JSON.parse(readFileSync(path.join(directory, recordName), 'utf8')));
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return undefined;
    throw error;
  }
}

/** Has what is below a group of v2 counted and limited, as far as the group itself is. */
function delegateControllers(group: string): void {
  const delegated = wordsOf(group, 'cgroup.subtree_control');
  for (const controller of wordsOf(group, 'cgroup.controllers')) {
    if (delegated.includes(controller)) continue;
    try {
      writeFileSync(path.join(group, 'cgroup.subtree_control'), `+${controller}`);
    } catch {
      // A group that has processes can delegate none. Whoever made it has counted without it.
    }
  }
}

interface Heir {
  readonly parent: string;
  readonly group: string;
  /** It was made just now. */
  readonly isNew: boolean;
}

/**
 * A new group of v1's cpuset has no CPU and no memory, and can have no process until it has: cpuset(7).
 *
 * @param known the parent's, by file, as far as it was read; then the group's
 */
function inheritCpus({ parent, group, isNew }: Heir, known: Map<string, string>): void {
  for (const file of ['cpuset.cpus', 'cpuset.mems']) {
    const own = isNew ? '' : wordsOf(group, file).join(' ');
    const value = own || (known.get(file) ?? readFileSync(path.join(parent, file), 'utf8').trim());
    if (own === '') writeFileSync(path.join(group, file), value);
    known.set(file, value);
  }
}

/** As `put`, while kilnd does other things. */
async function putAside(pid: number, group: string): Promise<void> {
  try {
    const file = openSync(path.join(group, 'cgroup.procs'), 'w');
    try {
      await writeAside(file, String(pid));
    } finally {
      closeSync(file);
    }
  } catch (error) {
    throwUnlessEnded(pid, group, error);
  }
}

function put(pid: number, group: string): void {
  try {
    writeFileSync(path.join(group, 'cgroup.procs'), String(pid));
  } catch (error) {
    throwUnlessEnded(pid, group, error);
  }
}

function throwUnlessEnded(pid: number, group: string, error: unknown): void {
  if ((error as NodeJS.ErrnoException).code !== 'ESRCH') {
    throw cannot(`put process ${pid} into the control group ${group}`, error);
  }
}

function attempt(what: string, action: () => void): void {
  try {
    action();
  } catch (error) {
    throw cannot(what, error);
  }
}

function cannot(what: string, cause: unknown): ControlGroupError {
  return new ControlGroupError('internal', `cannot ${what}: ${(cause as Error).message}`, { cause });
}
