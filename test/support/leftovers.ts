/**
 * What a test could leave on the machine, and the check that it did not.
 *
 * `snapshotHost` lists everything that belongs to one Kiln (by its state and cache folder) or that nobody but Kiln would
 * make: processes, mounts, Unix sockets, files, network namespaces, taps, cgroups, loop devices, and what kilnd itself
 * still holds open. `assertNothingLeft` lists again and fails with every line that was not there before.
 */
import { type Dirent, readdirSync, readFileSync, readlinkSync } from 'node:fs';
import { join, relative } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';

export const leftoverKinds = [
  'process',
  'mount',
  'socket',
  'file',
  'netns',
  'interface',
  'cgroup',
  'loop',
  'open-file',
] as const;
export type LeftoverKind = (typeof leftoverKinds)[number];

export interface Leftover {
  readonly kind: LeftoverKind;
  /** For a reader: names the thing so that it can be found and removed. */
  readonly what: string;
  /** Only processes: to end them. */
  readonly pid?: number;
}

export interface HostScope {
  /** KILN_STATE_DIR of the Kiln under test. */
  readonly stateDir: string;
  /** KILN_CACHE_DIR of the Kiln under test. */
  readonly cacheDir: string;
  /** Folders of a private containerd: bundles, mounts and sockets in them count too. */
  readonly containerdDir?: string;
  /** What the ids of this containerd's containers have in them, by which their control groups are known. */
  readonly idMark?: string;
  /** Processes that are the test's own and may be there: containerd. Read at each listing. */
  readonly ownPids?: () => readonly number[];
  /** True while kilnd may live: it, its sockets and its pid file are then no leftovers. Its children are. */
  readonly daemonMayRun?: boolean;
}

export interface HostSnapshot {
  readonly scope: HostScope;
  readonly before: ReadonlySet<string>;
}

interface Process {
  readonly pid: number;
  readonly parent: number;
  readonly zombie: boolean;
  readonly name: string;
  readonly started: string;
  readonly commandLine: string;
  readonly environment: string;
  readonly places: readonly string[];
}

/** Everything the test's Kiln has on the machine now; see `assertNothingLeft`. */
export function snapshotHost(scope: HostScope): HostSnapshot {
  return { scope, before: new Set(listLeftovers(scope).map(keyOf)) };
}

/**
 * Fails with a list when something is there that was not there at the snapshot.
 *
 * The kernel has no event for "the last of these is gone", so the list is taken anew until it is empty or `within`
 * milliseconds are over; a clean machine passes at the first look.
 */
export async function assertNothingLeft(
  snapshot: HostSnapshot,
  options: { within?: number; daemonMayRun?: boolean } = {},
): Promise<void> {
  const deadline = performance.now() + (options.within ?? 2_000);
  for (;;) {
    const left = findLeft(snapshot, options.daemonMayRun);
    if (left.length === 0) return;
    if (performance.now() > deadline) {
      throw new Error(`left behind:\n${left.map((item) => `  ${keyOf(item)}`).join('\n')}`);
    }
    await sleep(25);
  }
}

/** What is there now and was not at the snapshot. */
export function findLeft(snapshot: HostSnapshot, daemonMayRun = snapshot.scope.daemonMayRun ?? false): Leftover[] {
  return listLeftovers({ ...snapshot.scope, daemonMayRun }).filter((item) => !snapshot.before.has(keyOf(item)));
}

/** The kilnd processes of a state folder. */
export function kilndPids(stateDir: string): number[] {
  return processes()
    .filter((process) => isDaemon(process, stateDir))
    .map((process) => process.pid);
}

const keyOf = (item: Leftover): string => `${item.kind}: ${item.what}`;

function listLeftovers(scope: HostScope): Leftover[] {
  const dirs = [scope.stateDir, scope.cacheDir, ...(scope.containerdDir === undefined ? [] : [scope.containerdDir])];
  const all = processes();
  return [
    ...processLeftovers(all, scope, dirs),
    ...mountLeftovers(dirs),
    ...socketLeftovers(all, scope),
    ...fileLeftovers(scope),
    ...netnsLeftovers(),
    ...interfaceLeftovers(),
    ...cgroupLeftovers(scope),
    ...loopLeftovers(dirs),
    ...openFileLeftovers(all, scope),
  ];
}

// --- processes ---

function processes(): Process[] {
  return readdirOrEmpty('/proc')
    .filter((entry) => /^\d+$/.test(entry.name))
    .flatMap((entry) => readProcess(Number(entry.name)) ?? []);
}

/** How often a process without a command line is looked at again, 1 ms apart: it may be in the middle of its execve(2). */
const execLooks = 500;

function readProcess(pid: number): Process | undefined {
  let found = lookAtProcess(pid);
  // execve(2) closes the parent's pipe, by which the parent knows of it, before the new program has its command line
  // and environment. For that moment nothing tells whose process it is.
  for (let look = 1; found?.inExec === true && look < execLooks; look += 1) {
    // Not a turn of the event loop: whoever calls has to see one moment. It lets the other process have this CPU.
    Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 1);
    found = lookAtProcess(pid);
  }
  return found;
}

function lookAtProcess(pid: number): (Process & { readonly inExec: boolean }) | undefined {
  const dir = `/proc/${pid}`;
  const stat = readOrEmpty(`${dir}/stat`);
  const match = /^\d+ \((.*)\) (\S) (\d+) (.*)$/s.exec(stat);
  // It has ended since the folder was listed.
  if (match === null) return undefined;
  const [, name = '', state = '', parent = '', rest = ''] = match;
  const zombie = state === 'Z' || state === 'X';
  const commandLine = readOrEmpty(`${dir}/cmdline`).split('\0').join(' ').trim();
  // vsize, field 23 of proc_pid_stat(5), is 0 for the kernel's own threads.
  const hasMemory = rest.split(' ')[18] !== '0';
  return {
    pid,
    parent: Number(parent),
    zombie,
    inExec: !zombie && hasMemory && commandLine === '',
    name,
    // starttime is field 22 of proc_pid_stat(5); `rest` begins with field 5.
    started: rest.split(' ')[17] ?? '',
    commandLine,
    environment: `\0${readOrEmpty(`${dir}/environ`)}`,
    places: ['cwd', 'root', 'exe'].map((link) => linkOrEmpty(`${dir}/${link}`)),
  };
}

/** The state folder a process was told to use; undefined when its environment names none. */
function stateDirOf(process: Process): string | undefined {
  return /\0KILN_STATE_DIR=([^\0]*)/.exec(process.environment)?.[1];
}

function isDaemon(process: Process, stateDir: string): boolean {
  return stateDirOf(process) === stateDir && /(^|[/ ])kilnd(\.[cm]?js)?( |$)/.test(process.commandLine);
}

function processLeftovers(all: readonly Process[], scope: HostScope, dirs: readonly string[]): Leftover[] {
  const byPid = new Map(all.map((process) => [process.pid, process]));
  const own = new Set([process.pid, process.ppid, ...(scope.ownPids?.() ?? [])]);
  const ours = (candidate: Process): boolean => {
    if (own.has(candidate.pid)) return false;
    // PID 1 of a container may not reap: a zombie there is nobody's leftover.
    if (candidate.zombie && candidate.parent === 1) return false;
    if (scope.daemonMayRun && isDaemon(candidate, scope.stateDir)) return false;
    const stateDir = stateDirOf(candidate);
    if (stateDir === scope.stateDir) return true;
    if (candidate.places.some((place) => isInside(place, dirs))) return true;
    if (dirs.some((dir) => candidate.commandLine.includes(dir))) return true;
    for (let p: Process | undefined = candidate; p !== undefined; p = byPid.get(p.parent)) {
      // A child of the scene's kilnd, or of somebody else's.
      if (isDaemon(p, scope.stateDir)) return true;
      if (stateDirOf(p) !== undefined) return false;
    }
    // Nobody's child any more and its folder is not to be seen. Only programs that nobody else starts are ours by their
    // name alone (a QEMU may be anybody's), and only when they name no other Kiln's folder.
    return candidate.name.startsWith('kiln') && !/ \//.test(candidate.commandLine);
  };
  return all.filter(ours).map((found) => ({
    kind: 'process',
    pid: found.pid,
    what: `${found.pid} (started ${found.started})${found.zombie ? ' zombie' : ''} ${found.name}: ${found.commandLine.slice(0, 200)}`,
  }));
}

// --- mounts, sockets, files ---

function mountLeftovers(dirs: readonly string[]): Leftover[] {
  return readOrEmpty('/proc/self/mountinfo')
    .split('\n')
    .filter((line) => dirs.some((dir) => line.includes(`${dir}/`) || line.includes(`${dir} `)))
    .map((line) => {
      const [, , , root = '', point = ''] = line.split(' ');
      return { kind: 'mount', what: `${point} (${root}) ${line.slice(line.indexOf(' - ') + 3)}`.slice(0, 300) };
    });
}

/** Listening and connected Unix sockets by path, in every network namespace that a process is in. */
function socketLeftovers(all: readonly Process[], scope: HostScope): Leftover[] {
  const dirs = [scope.stateDir, scope.cacheDir];
  const namespaces = new Map<string, number>();
  for (const { pid } of all) namespaces.set(linkOrEmpty(`/proc/${pid}/ns/net`), pid);
  const paths = new Set<string>();
  for (const pid of namespaces.values()) {
    for (const line of readOrEmpty(`/proc/${pid}/net/unix`).split('\n')) {
      // Num RefCount Protocol Flags Type St Inode Path; an abstract path begins with @.
      const path = line.trim().split(/\s+/).slice(7).join(' ');
      if (isInside(path.replace(/^@/, ''), dirs)) paths.add(path);
    }
  }
  return [...paths].filter((path) => !allowedInState(path, scope)).map((what) => ({ kind: 'socket', what }));
}

function fileLeftovers(scope: HostScope): Leftover[] {
  const found: string[] = [];
  for (const path of walk(scope.stateDir)) {
    // The daemon may keep empty folders at the top (a place for sandboxes); anything in them belongs to a sandbox.
    if (path.endsWith('/') && relative(scope.stateDir, path).split('/').length <= 1) continue;
    if (!allowedInState(path, scope)) found.push(path);
  }
  // The cache keeps finished images on purpose; halves of them are leftovers.
  const unfinished = /(^|[._-])(tmp|temp|partial|part|new)([._-]|$)/i;
  for (const path of walk(scope.cacheDir)) {
    const name = path.replace(/\/$/, '').split('/').pop() ?? '';
    if (unfinished.test(name.replace(/[A-Za-z0-9]{32,}/g, ''))) found.push(path);
  }
  if (scope.containerdDir !== undefined) {
    const bundles = join(scope.containerdDir, 'state', 'io.containerd.runtime.v2.task');
    for (const namespace of readdirOrEmpty(bundles)) {
      for (const bundle of readdirOrEmpty(join(bundles, namespace.name))) {
        found.push(join(bundles, namespace.name, bundle.name));
      }
    }
  }
  return found.map((what) => ({ kind: 'file', what }));
}

/** Logs and locks stay for good; the daemon's own sockets and pid file as long as it may run. */
function allowedInState(path: string, scope: HostScope): boolean {
  const name = relative(scope.stateDir, path);
  if (name.includes('/')) return false;
  return /\.(log|lock|stderr)$/.test(name) || (scope.daemonMayRun === true && /^(kilnd\.|relay\.sock$)/.test(name));
}

// --- kernel objects ---

function netnsLeftovers(): Leftover[] {
  const named = ['/run/netns', '/run/docker/netns'].flatMap((dir) =>
    readdirOrEmpty(dir).map((entry) => join(dir, entry.name)),
  );
  const bound = readOrEmpty('/proc/self/mountinfo')
    .split('\n')
    .filter((line) => line.includes(' - nsfs '))
    .map((line) => line.split(' ')[4] ?? '');
  return [...new Set([...named, ...bound])].map((what) => ({ kind: 'netns', what }));
}

/** Taps of the host's namespace, and whatever interface carries our name. Those in a namespace go away with it. */
function interfaceLeftovers(): Leftover[] {
  return readdirOrEmpty('/sys/class/net')
    .map((entry) => entry.name)
    .filter((name) => /^kiln/.test(name) || readOrEmpty(`/sys/class/net/${name}/tun_flags`) !== '')
    .map((what) => ({ kind: 'interface', what }));
}

/**
 * Groups that carry our name, and those of single containers: ctr puts container ID of namespace NS into /NS/ID. (The
 * group /NS itself stays with runc too.) The namespaces are those of the private containerd, the ids those of its scene: others
 * may be at work on the machine.
 */
function cgroupLeftovers(scope: HostScope): Leftover[] {
  const namespaces =
    scope.containerdDir === undefined
      ? []
      : readdirOrEmpty(join(scope.containerdDir, 'root', 'io.containerd.runtime.v2.task')).map((entry) => entry.name);
  const found: Leftover[] = [];
  for (const path of walk('/sys/fs/cgroup', 5)) {
    if (!path.endsWith('/')) continue;
    const parts = path.slice('/sys/fs/cgroup/'.length, -1).split('/');
    const name = parts.at(-1) ?? '';
    const parent = parts.at(-2) ?? '';
    const ours = namespaces.includes(parent) && name.includes(`-${scope.idMark ?? ''}`);
    if (/^kiln/.test(name) || ours) found.push({ kind: 'cgroup', what: path });
  }
  return found;
}

function loopLeftovers(dirs: readonly string[]): Leftover[] {
  return readdirOrEmpty('/sys/block')
    .filter((entry) => entry.name.startsWith('loop'))
    .map((entry) => ({ name: entry.name, file: readOrEmpty(`/sys/block/${entry.name}/loop/backing_file`).trim() }))
    .filter(({ file }) => isInside(file, dirs))
    .map(({ name, file }) => ({ kind: 'loop', what: `/dev/${name} on ${file}` }));
}

/** FIFOs of containerd, deleted files and files of sandboxes that a living kilnd still holds. */
function openFileLeftovers(all: readonly Process[], scope: HostScope): Leftover[] {
  return all
    .filter((candidate) => isDaemon(candidate, scope.stateDir))
    .flatMap(({ pid }) =>
      readdirOrEmpty(`/proc/${pid}/fd`)
        .map((entry) => linkOrEmpty(`/proc/${pid}/fd/${entry.name}`))
        .filter((target) => {
          if (target.startsWith('/memfd:') || !target.startsWith('/')) return false;
          const path = target.replace(/ \(deleted\)$/, '');
          if (scope.containerdDir !== undefined && isInside(path, [scope.containerdDir])) return true;
          return isInside(path, [scope.stateDir, scope.cacheDir]) && !allowedInState(path, scope);
        })
        .map((target): Leftover => ({ kind: 'open-file', what: `${target} in kilnd ${pid}` })),
    );
}

// --- small things; everything read here may vanish while it is read ---

function isInside(path: string, dirs: readonly string[]): boolean {
  return dirs.some((dir) => path === dir || path.startsWith(`${dir}/`));
}

/** Paths below a folder; those of folders end in a slash. */
function* walk(dir: string, depth = 20): Generator<string> {
  for (const entry of readdirOrEmpty(dir)) {
    const path = join(dir, entry.name);
    if (!entry.isDirectory()) yield path;
    else {
      yield `${path}/`;
      if (depth > 1) yield* walk(path, depth - 1);
    }
  }
}

function readdirOrEmpty(dir: string): Dirent[] {
  try {
    return readdirSync(dir, { withFileTypes: true });
  } catch {
    return [];
  }
}

function readOrEmpty(file: string): string {
  try {
    return readFileSync(file, 'utf8');
  } catch {
    return '';
  }
}

function linkOrEmpty(link: string): string {
  try {
    return readlinkSync(link);
  } catch {
    return '';
  }
}
