/**
 * What the containers of a pod share beside the guest itself: an IPC and a UTS namespace, a filesystem for /dev/shm and, for
 * those that want it, a PID namespace. All are files in one directory, which a container's spec names.
 *
 * The network is the guest's own. The pod's PID namespace has an init that collects what the containers leave behind, as a
 * pod's pause process does; the others live by their mounts alone.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
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

export class Pod {
  readonly #options: PodOptions;
  #prepared = false;
  #init: ChildProcess | undefined;

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

  /** Makes the PID namespace, if the spec joins it and it is not there, or is dead. */
  provideFor(spec: Uint8Array): void {
    if (this.#init?.exitCode === null && this.#init.signalCode === null) return;
    const path = join(this.#options.directory, 'pid');
    if (!joins(spec, path)) return;
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

function joins(spec: Uint8Array, path: string): boolean {
  try {
    const { linux } = JSON.parse(Buffer.from(spec).toString()) as { linux?: { namespaces?: { path?: string }[] } };
    return linux?.namespaces?.some((namespace) => namespace.path === path) ?? false;
  } catch {
    return false; // crun has the word for that.
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
