/**
 * What the containers of a pod share beside the guest itself: an IPC and a UTS namespace, a filesystem for /dev/shm and, for
 * those that want it, a PID namespace. All are files in one directory, which a container's spec names. A container can also
 * join the PID namespace of another one alone.
 *
 * The network is the guest's own. The pod's PID namespace has an init that collects what the containers leave behind, as a
 * pod's pause process does; the others live by their mounts alone.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { mkdirSync, rmSync, writeFileSync } from 'node:fs';
import { basename, dirname, join } from 'node:path';
import type { PreparePodRequest } from '../gen/kiln/agent/v1/agent.ts';
import * as sys from '../src/sys/mount.ts';
import { inNewNamespaces, setdomainname } from '../src/sys/namespaces.ts';
import { sethostname } from '../src/sys/process.ts';
import { AgentError, describe } from './errors.ts';
import type { Reaper } from './reaper.ts';

export interface PodOptions {
  /** Namespaces and filesystem are files in it: /run/kiln/pod. */
  readonly directory: string;
  readonly reaper: Reaper;
}

/** Where the PID namespaces of certain containers are, below the directory. src/oci/pod.ts has the same name. */
const pidOf = 'pid-of';

export class Pod {
  readonly #options: PodOptions;
  #prepared = false;
  #init: ChildProcess | undefined;
  /** By containers whose PID namespace others have joined, the names of the files. */
  readonly #joined = new Map<string, string>();

  constructor(options: PodOptions) {
    this.#options = options;
  }

  /** @throws AgentError invalid-argument for a parameter that the kernel refuses */
  prepare({ hostname, domainname, sysctl, shmBytes }: PreparePodRequest): void {
    if (this.#prepared) return;
    const { directory } = this.#options;
    mkdirSync(join(directory, 'shm'), { recursive: true, mode: 0o755 });
    const { MS_NOSUID, MS_NODEV, MS_NOEXEC } = sys;
    sys.mount('shm', join(directory, 'shm'), 'tmpfs', MS_NOSUID | MS_NODEV | MS_NOEXEC, `mode=1777,size=${shmBytes}`);
    inNewNamespaces(['ipc', 'uts'], () => {
      if (hostname !== '') sethostname(hostname);
      if (domainname !== '') setdomainname(domainname);
      for (const [name, value] of Object.entries(sysctl)) setParameter(name, value);
      for (const kind of ['ipc', 'uts']) this.#bind(`/proc/thread-self/ns/${kind}`, kind);
    });
    this.#prepared = true;
  }

  /**
   * Makes the PID namespaces that a spec joins be there.
   *
   * @param initOf the process id of another container's init; throws when it has none
   */
  provideFor(spec: Uint8Array, initOf: (container: string) => number): void {
    const { directory } = this.#options;
    for (const path of joinedBy(spec)) {
      if (path === join(directory, 'pid')) this.#provideShared();
      else if (dirname(path) === join(directory, pidOf)) this.#provideOf(basename(path), initOf);
    }
  }

  /** To be called when a container is removed. */
  forget(container: string): void {
    const name = this.#joined.get(container);
    if (name === undefined) return;
    this.#joined.delete(container);
    const path = join(this.#options.directory, name);
    sys.umount2(path, sys.MNT_DETACH);
    rmSync(path);
  }

  #provideOf(container: string, initOf: (container: string) => number): void {
    const pid = initOf(container);
    if (this.#joined.has(container)) return;
    const name = join(pidOf, container);
    mkdirSync(join(this.#options.directory, pidOf), { recursive: true, mode: 0o755 });
    this.#bind(`/proc/${pid}/ns/pid`, name);
    this.#joined.set(container, name);
  }

  /** The pod's own, if it is not there, or is dead. */
  #provideShared(): void {
    if (this.#init?.exitCode === null && this.#init.signalCode === null) return;
    const path = join(this.#options.directory, 'pid');
    const init = inNewNamespaces(['pid'], () => {
      const child = spawn('tini-static', ['--', 'tail', '-f', '/dev/null'], { stdio: 'ignore', cwd: '/' });
      this.#options.reaper.leaveToNode(child);
      child.on('error', () => {});
      return child;
    });
    if (init.pid === undefined) throw new AgentError('internal', 'cannot make the PID namespace of the pod');
    if (this.#init !== undefined) sys.umount2(path, sys.MNT_DETACH);
    this.#bind(`/proc/${init.pid}/ns/pid`, 'pid');
    this.#init = init;
  }

  #bind(namespace: string, name: string): void {
    const path = join(this.#options.directory, name);
    writeFileSync(path, '');
    sys.mount(namespace, path, null, sys.MS_BIND, null);
  }
}

/** The paths of the namespaces that a spec joins. */
function joinedBy(spec: Uint8Array): string[] {
  try {
    const { linux } = JSON.parse(Buffer.from(spec).toString()) as { linux?: { namespaces?: { path?: string }[] } };
    return linux?.namespaces?.flatMap(({ path }) => path ?? []) ?? [];
  } catch {
    return []; // crun has the word for that.
  }
}

/** sysctl.d(5): whichever of `.` and `/` comes first separates; the other is part of a name. */
function setParameter(name: string, value: string): void {
  const separator = /[./]/.exec(name)?.[0] ?? '.';
  const parts = name.split(separator);
  if (parts.some((part) => ['', '.', '..'].includes(part))) {
    throw new AgentError('invalid-argument', `"${name}" is no name of a kernel parameter`);
  }
  try {
    writeFileSync(join('/proc/sys', ...parts), value, { flag: 'r+' });
  } catch (error) {
    throw new AgentError(
      'invalid-argument',
      `sysctl ${name}=${value}: the guest's kernel refuses it: ${describe(error)}`,
    );
  }
}
