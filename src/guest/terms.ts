/** Containers and their processes as the guest is told of them, and tells of them; and the same in the agent's messages. */
import type { Mount, Stdio } from '../../gen/kiln/agent/v1/agent.ts';
import { KilnError } from '../errors.ts';
import type { NetworkConfig } from '../network/config.ts';

/** One mount of a container's root filesystem, in the guest's terms. */
export interface GuestMount {
  /** A disk of the VM by its slot name, or any other source for mount(2). */
  readonly source: { readonly disk: string } | { readonly device: string };
  readonly target: string;
  readonly type: string;
  readonly options: readonly string[];
  /** Directories below target to create after the mount. */
  readonly directories: readonly string[];
}

/** A process of a container: its init has the empty exec id. */
export interface ProcessRef {
  readonly id: string;
  readonly execId: string;
}

/** How a process reads and writes: a pipe each or /dev/null, or one terminal for all three. */
export interface GuestStdio {
  readonly stdin: boolean;
  readonly stdout: boolean;
  readonly stderr: boolean;
  readonly terminal: boolean;
  /** The terminal's size in characters; undefined leaves it as the spec has it. */
  readonly size: TerminalSize | undefined;
}

export interface TerminalSize {
  readonly width: number;
  readonly height: number;
}

export interface GuestContainer {
  readonly id: string;
  /** The guest's runtime-spec, JSON. */
  readonly spec: string;
  readonly mounts: readonly GuestMount[];
  readonly stdio: GuestStdio;
  /** v9fs's mount options for the host's files; absent for a spec that needs none of them. */
  readonly volumeOptions?: string | undefined;
  /** The serials of disks that it has as devices. */
  readonly disks?: readonly string[] | undefined;
  /** What the guest has to take over before; absent when there is nothing new. */
  readonly network?: NetworkConfig | undefined;
  /** Files for its root filesystem before its program is looked for; see `provideFiles` of files.ts. */
  readonly files?: AsyncIterable<Buffer> | undefined;
}

/** What the containers of a pod share. */
export interface GuestPod {
  /** Empty for the guest's own. */
  readonly hostname: string;
  readonly domainname: string;
  /** Parameters of the network and of the IPC namespace. */
  readonly sysctl: Readonly<Record<string, string>>;
  /** Size of /dev/shm. */
  readonly shmBytes: number;
}

export interface GuestProcess {
  /** In the guest. */
  readonly pid: number;
  /** Of a process that was exec'd; else empty. */
  readonly execId: string;
  readonly init: boolean;
}

/** PID_MAX_LIMIT, linux/threads.h. */
const largestPid = 2 ** 22;

export function toMount({ source, target, type, options, directories }: GuestMount): Mount {
  return {
    source: 'disk' in source ? { $case: 'disk', value: source.disk } : { $case: 'device', value: source.device },
    target,
    type,
    options: [...options],
    directories: [...directories],
  };
}

export function toStdio({ size, ...stdio }: GuestStdio): Stdio {
  return { ...stdio, width: size?.width ?? 0, height: size?.height ?? 0 };
}

/** @throws KilnError internal for what no process has; 0 would mean one that does not exist yet */
export function pidOf({ pid }: { readonly pid: number }): number {
  if (pid >= 1 && pid <= largestPid) return pid;
  throw new KilnError('internal', `the agent in the guest names a process ${pid}, which cannot be`);
}
